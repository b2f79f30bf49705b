"""The circle loss."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memdml.checks import check_finite, check_positive, check_types
from lightning_memdml.losses.pair_loss import AnchorTerms, Backend, Context, NegativeTerms, NegativeTotals, PairLoss
from lightning_memdml.losses.row_ops import masked_logsumexp, masked_softmax, softplus


class CircleLoss(PairLoss):
    r"""Weighs each pair by its distance from its optimum, inside one soft maximum over all pairs.

    $$
    l_i = \log\Big(1 + \sum_{j \in N_i} e^{\gamma \bar a^-_{ij} (s_{ij} - m)}
    \sum_{j \in P_i} e^{-\gamma \bar a^+_{ij} (s_{ij} - 1 + m)}\Big), \quad
    a^+ = [1 + m - s]_+, \; a^- = [s + m]_+
    $$

    $$
    w^+ = \sigma(Z_i)\, \gamma\, a^+\, \mathrm{softmax}_{P_i}, \qquad
    w^- = \sigma(Z_i)\, \gamma\, a^-\, \mathrm{softmax}_{N_i}
    $$

    with $Z_i$ the logarithm of the product of the two sums. The bar holds $a$ constant, as in the paper. An anchor
    without positives or without negatives gives 0.

    Denominator: averaged over the B anchors.

    Args:
        margin: The relaxation $m$.
        scale: The factor $\gamma$, above 0.
        backend: How the loss is computed against a memory, see `PairLoss`.

    Raises:
        ValueError: If `scale` is not above 0, or a number is not finite.

    References:
        Sun et al. 2020, arXiv 2002.10857.

    Example:
        >>> import torch.nn.functional as F
        >>> x = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]), dim=1)
        >>> CircleLoss()(x, torch.tensor([0, 0, 1]))
        tensor(33.1093)
    """

    exponential = True

    def __init__(self, margin: float = 0.4, scale: float = 80.0, *, backend: Backend = "auto") -> None:
        check_types(CircleLoss.__init__, locals(), "backend")
        super().__init__(backend)
        self.margin, self.scale = check_finite("margin", margin), check_positive("scale", scale)

    def negative_terms(self, similarity: Tensor, context: Context) -> NegativeTerms:
        """Return the logits of the negatives and the factor of their softmax."""
        factor = (similarity + self.margin).clamp_min_(0).mul_(self.scale)
        return NegativeTerms(similarity.sub_(self.margin).mul_(factor), factor)

    def combine(self, similarity: Tensor, mask: Tensor, context: Context, negatives: NegativeTotals) -> AnchorTerms:
        """Combine both sides in one logarithm."""
        factor = self.scale * (1 + self.margin - similarity).clamp_min(0)
        logits = -factor * (similarity - 1 + self.margin)
        both = masked_logsumexp(logits, mask) + negatives.total
        share = torch.sigmoid(both)
        return AnchorTerms(softplus(both), share[:, None] * factor * masked_softmax(logits, mask), share)
