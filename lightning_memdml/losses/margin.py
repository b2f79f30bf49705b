"""The margin loss on distances."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memdml.checks import check_types
from lightning_memdml.losses.pair_loss import AnchorTerms, Backend, Context, NegativeTerms, NegativeTotals, PairLoss

MIN_SQUARED_DISTANCE = 1e-6  # so the weight 1/d is at most 1000, also of identical pairs


class MarginLoss(PairLoss):
    r"""Pulls positives inside, and pushes negatives outside, a boundary distance, each by a margin.

    $$
    l_i = \sum_{j \in P_i} [d_{ij} - \beta + m]_+ + \sum_{j \in N_i} [\beta + m - d_{ij}]_+, \qquad
    d = \sqrt{2 - 2s}
    $$

    $$
    w^+ = \mathbb{1}[d > \beta - m] / d, \qquad w^- = \mathbb{1}[d < \beta + m] / d
    $$

    The boundary is fixed, not learned. Distances below 0.001 count as 0.001, which bounds the weights.

    Denominator: summed over pairs, averaged over the B anchors.

    Args:
        margin: Half the width of the zone around the boundary, a Euclidean distance of at least 0.
        beta: The boundary, a Euclidean distance between unit vectors, in (0, 2).
        backend: How the loss is computed against a memory, see `PairLoss`.

    Raises:
        ValueError: If `margin` or `beta` is out of range.

    References:
        Wu et al. 2017, arXiv 1706.07567.

    Example:
        >>> import torch.nn.functional as F
        >>> x = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]), dim=1)
        >>> MarginLoss()(x, torch.tensor([0, 0, 1]))
        tensor(1.2565)
    """

    needs_negatives = False

    def __init__(self, margin: float = 0.2, beta: float = 1.2, *, backend: Backend = "auto") -> None:
        check_types(MarginLoss.__init__, locals(), "backend")
        super().__init__(backend)
        if not 0 <= margin < torch.inf:
            raise ValueError(f"Expected `margin` of at least 0 but got {margin}. Pass a width, such as 0.2.")
        if not 0 < beta < 2:
            raise ValueError(
                f"Expected `beta` to be a distance in (0, 2) but got {beta}. Pass a distance, such as 1.2."
            )
        self.margin, self.beta = margin, beta

    def negative_threshold(self, context: Context) -> float:
        """Return the similarity at the outer distance."""
        # Slightly below the exact value, so that rounding skips no pair that has a weight.
        return 1 - (self.beta + self.margin) ** 2 / 2 - 1e-6

    def negative_terms(self, similarity: Tensor, context: Context) -> NegativeTerms:
        """Return inverse distances inside the outer distance."""
        outer = self.beta + self.margin
        squared = similarity.mul_(-2).add_(2).clamp_min_(MIN_SQUARED_DISTANCE)
        inverse = squared.rsqrt()  # half the time of a root
        excess = (outer - squared.mul_(inverse)).clamp_min_(0)
        return NegativeTerms(torch.threshold_(inverse, 1 / outer, 0.0), excess)

    def combine(self, similarity: Tensor, mask: Tensor, context: Context, negatives: NegativeTotals) -> AnchorTerms:
        """Add the positives outside the inner distance."""
        distance = (2 - 2 * similarity).clamp_min_(MIN_SQUARED_DISTANCE).sqrt()
        excess = torch.where(mask, distance - self.beta + self.margin, 0.0).clamp_min(0)
        weights = torch.where(excess > 0, 1 / distance, 0.0)
        value = excess.sum(dim=1) + negatives.total
        return AnchorTerms(value, weights, torch.ones_like(value))
