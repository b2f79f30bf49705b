"""The multi-similarity loss and its mining."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memdml.checks import check_finite, check_positive, check_types
from lightning_memdml.losses.pair_loss import AnchorTerms, Backend, Context, NegativeTerms, NegativeTotals, PairLoss
from lightning_memdml.losses.row_ops import row_min, softplus


class MultiSimilarityLoss(PairLoss):
    r"""Weighs each pair by its own similarity and by the similarities of the anchor's other pairs.

    $$
    l_i = \frac1\alpha \log\Big(1 + \sum_{j \in P_i} e^{-\alpha (s_{ij} - \lambda)}\Big)
    + \frac1\beta \log\Big(1 + \sum_{j \in N_i} e^{\beta (s_{ij} - \lambda)}\Big)
    $$

    $$
    w^+_{ij} = \frac{e^{-\alpha (s_{ij} - \lambda)}}{1 + \sum_{P_i} e^{-\alpha (s - \lambda)}}, \qquad
    w^-_{ij} = \frac{e^{\beta (s_{ij} - \lambda)}}{1 + \sum_{N_i} e^{\beta (s - \lambda)}}
    $$

    With mining ($\epsilon$ given) both sums keep only pairs that are hard relative to the other side: negatives with
    $s + \epsilon > \min_{P_i} s$, and positives with $s - \epsilon < \max_{N_i} s$. An anchor without positives then
    keeps no negatives, and an anchor without negatives no positives.

    Denominator: averaged over the B anchors, those without mined pairs included. The weights of each side sum to less
    than 1, for a memory of any size.

    Args:
        alpha: Scale of the positives, above 0.
        beta: Scale of the negatives, above 0.
        base: The similarity $\lambda$ that separates the sides.
        epsilon: Width of the mining, a difference of similarities. `None` keeps all pairs.
        backend: How the loss is computed against a memory, see `PairLoss`.

    Raises:
        ValueError: If `alpha` or `beta` is not above 0, or a number is not finite.

    References:
        Wang et al. 2019, arXiv 1904.06627.

    Example:
        >>> import torch.nn.functional as F
        >>> x = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]), dim=1)
        >>> MultiSimilarityLoss()(x, torch.tensor([0, 0, 1]))
        tensor(0.4527)
    """

    exponential = True
    needs_hardest = True

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 50.0,
        base: float = 0.5,
        epsilon: float | None = 0.1,
        *,
        backend: Backend = "auto",
    ) -> None:
        check_types(MultiSimilarityLoss.__init__, locals(), "backend")
        super().__init__(backend)
        self.alpha, self.beta = check_positive("alpha", alpha), check_positive("beta", beta)
        self.base = check_finite("base", base)
        self.epsilon = None if epsilon is None else check_finite("epsilon", epsilon)
        self.needs_negatives = epsilon is not None

    def context(self, similarity: Tensor, mask: Tensor) -> Context:
        """Return the similarity that a negative must exceed to be mined, `(B,)`."""
        if self.epsilon is None:
            return ()
        none = 2.0 + self.epsilon  # without positives the result is 2: above every similarity, and finite
        return (row_min(similarity.masked_fill(~mask, none), none) - self.epsilon,)

    def negative_threshold(self, context: Context) -> Tensor | float:
        """Return the mining threshold."""
        return context[0] if context else -torch.inf

    def negative_terms(self, similarity: Tensor, context: Context) -> NegativeTerms:
        """Return the logits of the negatives, `-inf` where not mined."""
        if not context:
            return NegativeTerms(similarity.sub_(self.base).mul_(self.beta))
        threshold = context[0][:, None]
        above = torch.threshold_(similarity.sub_(threshold), 0.0, -torch.inf)
        return NegativeTerms(above.add_(threshold - self.base).mul_(self.beta))

    def combine(self, similarity: Tensor, mask: Tensor, context: Context, negatives: NegativeTotals) -> AnchorTerms:
        """Mine and weigh the positives, and divide both sides by one plus their sums."""
        left_out = ~mask
        if self.epsilon is not None:
            left_out |= similarity - self.epsilon >= negatives.hardest[:, None]
        logits = torch.rsub(similarity, self.alpha * self.base, alpha=self.alpha).masked_fill_(left_out, -torch.inf)
        positives = softplus(torch.logsumexp(logits, dim=1))
        value = torch.add(positives / self.alpha, softplus(negatives.total), alpha=1 / self.beta)
        return AnchorTerms(value, logits.sub_(positives[:, None]).exp_(), torch.sigmoid(negatives.total))
