"""The softmax losses. InfoNCE, SupCon and NCA differ in what they do with several positives."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memdml.checks import check_positive, check_types
from lightning_memdml.losses.pair_loss import AnchorTerms, Backend, Context, NegativeTerms, NegativeTotals, PairLoss
from lightning_memdml.losses.row_ops import masked_logsumexp, masked_softmax, softplus


class _SoftmaxLoss(PairLoss):
    """The common part of the three: the weights of negatives are a softmax with one temperature."""

    exponential = True

    def __init__(self, temperature: float, backend: Backend) -> None:
        super().__init__(backend)
        self.temperature = check_positive("temperature", temperature)

    def negative_terms(self, similarity: Tensor, context: Context) -> NegativeTerms:
        """Return the logits of the negatives."""
        return NegativeTerms(similarity.div_(self.temperature))


class InfoNCELoss(_SoftmaxLoss):
    r"""Classifies each positive against all negatives, with one cross-entropy per positive.

    $$
    l_i = \sum_{p \in P_i} -\log q_p, \qquad
    q_p = \frac{e^{s_{ip}/t}}{e^{s_{ip}/t} + \sum_{n \in N_i} e^{s_{in}/t}}
    $$

    $$
    w^+_{ip} = (1 - q_p)/t, \qquad
    w^-_{in} = \frac1t \sum_{p \in P_i} \frac{e^{s_{in}/t}}{e^{s_{ip}/t} + \sum_{N_i} e^{s/t}}
    $$

    Denominator: summed over positives, averaged over the B anchors.

    Args:
        temperature: The temperature $t$, above 0.
        backend: How the loss is computed against a memory, see `PairLoss`.

    Raises:
        ValueError: If `temperature` is not above 0.

    References:
        van den Oord et al. 2018, arXiv 1807.03748; Sohn 2016 (N-pair).

    Example:
        >>> import torch.nn.functional as F
        >>> x = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]), dim=1)
        >>> InfoNCELoss()(x, torch.tensor([0, 0, 1]))
        tensor(2.6872)
    """

    def __init__(self, temperature: float = 0.07, *, backend: Backend = "auto") -> None:
        check_types(InfoNCELoss.__init__, locals(), "backend")
        super().__init__(temperature, backend)

    def combine(self, similarity: Tensor, mask: Tensor, context: Context, negatives: NegativeTotals) -> AnchorTerms:
        """Sum one cross-entropy per positive."""
        excess = torch.sub(negatives.total[:, None], similarity, alpha=1 / self.temperature)
        excess.masked_fill_(~mask, -torch.inf)  # weight 0, value 0
        weights = torch.sigmoid(excess).div_(self.temperature)  # (1 - q) / t
        value = softplus(excess).sum(dim=1)
        return AnchorTerms(value, weights, weights.sum(dim=1))


class SupConLoss(_SoftmaxLoss):
    r"""Spreads a softmax over all references evenly over the positives.

    $$
    l_i = -\frac{1}{|P_i|} \sum_{p \in P_i} \log \pi_p, \qquad
    \pi_j = \frac{e^{s_{ij}/t}}{\sum_{k \in P_i \cup N_i} e^{s_{ik}/t}}
    $$

    $$
    w^+_{ip} = \big(1/|P_i| - \pi_p\big)/t, \qquad w^-_{in} = \pi_n/t
    $$

    The weight of an easy positive, with $\pi_p > 1/|P_i|$, is negative. An anchor without positives gives 0.

    Denominator: averaged over the positives, then over the B anchors.

    Args:
        temperature: The temperature $t$, above 0.
        backend: How the loss is computed against a memory, see `PairLoss`.

    Raises:
        ValueError: If `temperature` is not above 0.

    References:
        Khosla et al. 2020, arXiv 2004.11362 (the form with the sum outside the logarithm).

    Example:
        >>> import torch.nn.functional as F
        >>> x = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]), dim=1)
        >>> SupConLoss()(x, torch.tensor([0, 0, 1]))
        tensor(1.9180)
    """

    def __init__(self, temperature: float = 0.1, *, backend: Backend = "auto") -> None:
        check_types(SupConLoss.__init__, locals(), "backend")
        super().__init__(temperature, backend)

    def combine(self, similarity: Tensor, mask: Tensor, context: Context, negatives: NegativeTotals) -> AnchorTerms:
        """Compare the softmax with an even spread over the positives."""
        logits = similarity / self.temperature
        log_sum = torch.logaddexp(masked_logsumexp(logits, mask), negatives.total)
        positives = mask.sum(dim=1).to(logits.dtype)
        spread = torch.where(mask, 1 / positives.clamp_min(1)[:, None], 0.0)
        has_positive = positives > 0
        value = torch.where(has_positive, log_sum - (spread * logits).sum(dim=1), 0.0)
        probability = torch.where(mask, torch.exp(logits - log_sum[:, None]), 0.0)
        scale = torch.where(has_positive, torch.exp(negatives.total - log_sum), 0.0) / self.temperature
        return AnchorTerms(value, (spread - probability) / self.temperature, scale)


class NCALoss(_SoftmaxLoss):
    r"""Maximises the probability of the positives together, under a softmax over all references.

    $$
    l_i = -\log \frac{\sum_{p \in P_i} e^{s_{ip}/t}}{\sum_{k \in P_i \cup N_i} e^{s_{ik}/t}}
    $$

    $$
    w^+_{ip} = \frac{\pi_N}{t}\, \mathrm{softmax}_{P_i}(s/t), \qquad
    w^-_{in} = \frac{\pi_N}{t}\, \mathrm{softmax}_{N_i}(s/t)
    $$

    with $\pi_N$ the probability of the negatives together. An anchor without positives gives 0.

    Denominator: averaged over the B anchors.

    Args:
        temperature: The temperature $t$, above 0.
        backend: How the loss is computed against a memory, see `PairLoss`.

    Raises:
        ValueError: If `temperature` is not above 0.

    References:
        Goldberger et al. 2004; with temperature and cosine similarity, Wu et al. 2018, arXiv 1808.04699.

    Example:
        >>> import torch.nn.functional as F
        >>> x = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]), dim=1)
        >>> NCALoss()(x, torch.tensor([0, 0, 1]))
        tensor(1.9180)
    """

    def __init__(self, temperature: float = 0.1, *, backend: Backend = "auto") -> None:
        check_types(NCALoss.__init__, locals(), "backend")
        super().__init__(temperature, backend)

    def combine(self, similarity: Tensor, mask: Tensor, context: Context, negatives: NegativeTotals) -> AnchorTerms:
        """Compare the probabilities of the two sides."""
        logits = similarity / self.temperature
        excess = torch.where(mask.any(dim=1), negatives.total - masked_logsumexp(logits, mask), -torch.inf)
        scale = torch.sigmoid(excess) / self.temperature
        return AnchorTerms(softplus(excess), scale[:, None] * masked_softmax(logits, mask), scale)
