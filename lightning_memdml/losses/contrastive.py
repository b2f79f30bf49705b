"""The contrastive loss."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memdml.checks import check_similarity, check_types
from lightning_memdml.losses.pair_loss import AnchorTerms, Backend, Context, NegativeTerms, NegativeTotals, PairLoss


class ContrastiveLoss(PairLoss):
    r"""Pulls every positive, and pushes the negatives above a margin, all with weight 1.

    $$
    l_i = \sum_{j \in P_i} (1 - s_{ij}) + \sum_{j \in N_i,\, s_{ij} > m} s_{ij}, \qquad
    w^+ = 1, \quad w^- = \mathbb{1}[s > m]
    $$

    The value counts a negative as $s$ and not $s - m$, so it jumps at the margin. The gradient is the same.

    Denominator: summed over pairs, averaged over the B anchors.

    Args:
        margin: Cosine similarity in [-1, 1] above which a negative is pushed. Against a memory a higher margin
            than in the batch often helps, such as 0.7 against 0.5, since stored embeddings are outdated.
        backend: How the loss is computed against a memory, see `PairLoss`.

    Raises:
        ValueError: If `margin` is outside [-1, 1].

    References:
        Similarity form of Hadsell et al. 2006, as used with a memory by Wang et al. 2020, arXiv 1912.06798.

    Example:
        >>> import torch.nn.functional as F
        >>> x = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]), dim=1)
        >>> ContrastiveLoss(margin=0.5)(x, torch.tensor([0, 0, 1]))  # (0.4 + 0.8 + 0.4 + 0.96 + 0.8 + 0.96) / 3
        tensor(1.4400)
    """

    needs_negatives = False

    def __init__(self, margin: float = 0.5, *, backend: Backend = "auto") -> None:
        check_types(ContrastiveLoss.__init__, locals(), "backend")
        super().__init__(backend)
        self.margin = check_similarity("margin", margin)

    def negative_threshold(self, context: Context) -> float:
        """Return the margin."""
        return self.margin

    def negative_terms(self, similarity: Tensor, context: Context) -> NegativeTerms:
        """Return weight 1 above the margin, and 0 elsewhere."""
        # In place: a mask and its conversion to numbers would cost 10 times as much.
        return NegativeTerms(torch.gt(similarity, self.margin, out=similarity))

    def combine(self, similarity: Tensor, mask: Tensor, context: Context, negatives: NegativeTotals) -> AnchorTerms:
        """Add the positives, each of weight 1."""
        weights = mask.to(similarity.dtype)
        value = torch.addcmul(weights, weights, similarity, value=-1).sum(dim=1) + negatives.weighted
        return AnchorTerms(value, weights, weights.new_ones(weights.shape[0]))
