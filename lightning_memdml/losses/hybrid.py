"""The weights of positives of one loss with the weights of negatives of another."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memdml.losses.pair_loss import AnchorTerms, Backend, Context, NegativeTerms, NegativeTotals, PairLoss


class HybridLoss(PairLoss):
    r"""Takes the weights of positives $w^+$ from one loss, and those of negatives $w^-$ from another.

    $$
    l_i = \sum_{j \in P_i} \bar w^+_{ij} (1 - s_{ij}) + \sum_{j \in N_i} \bar w^-_{ij} s_{ij}
    $$

    The bar holds the weights constant, so the gradient is exactly the assigned weights. The value is that of
    `DirectWeightLoss`, since one side of a loss has no value of its own.

    Denominator: summed over pairs, averaged over the B anchors.

    Args:
        positive: The loss that weighs the positives.
        negative: The loss that weighs the negatives.
        backend: How the loss is computed against a memory, see `PairLoss`.

    Raises:
        TypeError: If one of them is not a `PairLoss`, or is a hybrid itself.

    References:
        Zhang et al. 2021, arXiv 2103.14003 (decomposition of pair losses).

    Example:
        >>> import torch.nn.functional as F
        >>> from lightning_memdml import ContrastiveLoss, MultiSimilarityLoss
        >>> loss = HybridLoss(positive=ContrastiveLoss(), negative=MultiSimilarityLoss(epsilon=None))
        >>> x = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]), dim=1)
        >>> positive, negative = loss.pair_weights(x, torch.tensor([0, 0, 1]))
        >>> positive
        tensor([[0., 1., 0.],
                [1., 0., 0.],
                [0., 0., 0.]])
    """

    def __init__(self, positive: PairLoss, negative: PairLoss, *, backend: Backend = "auto") -> None:
        super().__init__(backend)
        for name, loss in (("positive", positive), ("negative", negative)):
            if not isinstance(loss, PairLoss) or isinstance(loss, HybridLoss):
                raise TypeError(
                    f"Expected `{name}` to be a PairLoss other than HybridLoss but got {type(loss)}. "
                    "Pass a loss such as ContrastiveLoss()."
                )
        self.positive, self.negative = positive, negative

    @property
    def parts(self) -> tuple[PairLoss, ...]:  # type: ignore[override]  # a property follows the two losses
        """The loss that weighs negatives, and the other one if its positive weights depend on negatives."""
        return (self.negative, self.positive) if self.positive.needs_negatives else (self.negative,)

    def negative_terms(self, similarity: Tensor, context: Context) -> NegativeTerms:
        """Return the terms of the negative loss."""
        return self.negative.negative_terms(similarity, context)

    def combine(  # type: ignore[override]  # a loss with parts gets lists
        self, similarity: Tensor, mask: Tensor, context: list[Context], negatives: list[NegativeTotals]
    ) -> AnchorTerms:
        """Combine the positives of one loss with the negatives of the other."""
        negative = self.negative.combine(similarity, mask, context[0], negatives[0])
        # A loss whose positive weights do not depend on negatives may get the totals of the other one.
        own = context[1] if self.positive.needs_negatives else self.positive.context(similarity, mask)
        positive = self.positive.combine(similarity, mask, own, negatives[-1])
        weights = torch.where(mask, positive.positive_weights, 0.0)
        value = (weights * (1 - similarity)).sum(dim=1) + negative.negative_weight_scale * negatives[0].weighted
        return AnchorTerms(value, weights, negative.negative_weight_scale)
