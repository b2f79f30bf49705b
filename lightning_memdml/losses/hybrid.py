"""The weights of positives of one loss with the weights of negatives of another."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memdml.checks import check_types
from lightning_memdml.losses.pair_loss import (
    AnchorTerms,
    Backend,
    Context,
    LossDefinition,
    NegativeTerms,
    NegativeTotals,
    PairLoss,
)
from lightning_memdml.losses.weight_mass import (
    Normalize,
    check_normalize,
    check_scale,
    inverse_or_zero,
    normalise_rows,
)


class HybridLoss(PairLoss):
    r"""Takes the weights of positives $w^+$ from one loss, and those of negatives $w^-$ from another.

    $$
    l_i = \sum_{j \in P_i} \bar w^+_{ij} (1 - s_{ij}) + \sum_{j \in N_i} \bar w^-_{ij} s_{ij}
    $$

    The bar holds the weights constant, so the gradient is exactly the assigned weights. The value is that of
    `DirectWeightLoss`, since one side of a loss has no value of its own.

    The sums of the weights of two losses can differ by a factor of 10. `normalize` compares their halves at equal sums.

    Denominator: summed over pairs, averaged over the B anchors. With `normalize="sum"` the weights of each side
    sum to 1 for every anchor whose weights do not sum to 0 there. With `normalize="mean"` they are divided by the
    number of the anchor's pairs of that side, weight or not.

    Args:
        positive: The loss that weighs the positives.
        negative: The loss that weighs the negatives.
        normalize: `None`, `"sum"` to divide each side's weights by their sum over the anchor's row, or `"mean"` to
            divide them by the number of pairs.
        positive_scale: Factor of the positives' weights, after the normalisation, at least 0.
        negative_scale: The same for negatives.
        backend: How the loss is computed against a memory, see `PairLoss`.

    Raises:
        TypeError: If one of them is not a `PairLoss`, or is a hybrid itself.
        ValueError: If `normalize` is something else, or a scale is below 0.

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

    def __init__(
        self,
        positive: PairLoss,
        negative: PairLoss,
        normalize: Normalize | None = None,
        positive_scale: float = 1.0,
        negative_scale: float = 1.0,
        *,
        backend: Backend = "auto",
    ) -> None:
        check_types(HybridLoss.__init__, locals(), "positive", "negative", "normalize", "backend")
        super().__init__(backend)
        for name, loss in (("positive", positive), ("negative", negative)):
            if not isinstance(loss, PairLoss) or isinstance(loss, HybridLoss):
                raise TypeError(
                    f"Expected `{name}` to be a PairLoss other than HybridLoss but got {type(loss)}. "
                    "Pass a loss such as ContrastiveLoss()."
                )
        check_normalize(normalize)
        self.positive, self.negative, self.normalize = positive, negative, normalize
        self.positive_scale = check_scale("positive_scale", positive_scale)
        self.negative_scale = check_scale("negative_scale", negative_scale)

    @property
    def parts(self) -> tuple[LossDefinition, ...]:  # type: ignore[override]  # a property follows the two losses
        """The loss that weighs negatives, the other one if its positive weights depend on negatives, and the sum."""
        positive = (self.positive,) if self.positive.needs_negatives else ()
        weight_sum = (_NegativeWeightSum(self.negative),) if self.normalize == "sum" else ()
        return (self.negative, *positive, *weight_sum)

    def negative_terms(self, similarity: Tensor, context: Context) -> NegativeTerms:
        """Return the terms of the negative loss."""
        return self.negative.negative_terms(similarity, context)

    def combine(  # type: ignore[override]  # a loss with parts gets lists
        self, similarity: Tensor, mask: Tensor, context: list[Context], negatives: list[NegativeTotals]
    ) -> AnchorTerms:
        """Combine the positives of one loss with the negatives of the other."""
        # A loss whose positive weights do not depend on negatives may get the totals of the other one.
        depends = self.positive.needs_negatives
        own = context[1] if depends else self.positive.context(similarity, mask)
        positive = self.positive.combine(similarity, mask, own, negatives[1 if depends else 0])
        weights = torch.where(mask, positive.positive_weights, 0.0)
        # Weights of a softmax over all pairs cancel where an anchor has no negatives: what is left is rounding error.
        rounding = 1000 * torch.finfo(weights.dtype).eps
        weights = self.positive_scale * normalise_rows(weights, mask, self.normalize, least=rounding)
        scale = self.negative.combine(similarity, mask, context[0], negatives[0]).negative_weight_scale
        if self.normalize == "sum":
            # The factor of the anchor cancels, unless it is 0.
            mass = negatives[-1].total
            if self.negative.exponential:
                mass = torch.where(negatives[0].number > 0, torch.exp(mass - negatives[0].total), 0.0)
            scale = torch.where(scale > 0, inverse_or_zero(mass), 0.0)
        elif self.normalize == "mean":
            scale = scale / negatives[0].number.clamp_min(1)
        scale = self.negative_scale * scale
        return AnchorTerms((weights * (1 - similarity)).sum(dim=1) + scale * negatives[0].weighted, weights, scale)


class _NegativeWeightSum(LossDefinition):
    """Sums the weights of a loss's negatives, up to the factor of the anchor. Its total is their sum, or its logarithm.

    Args:
        loss: The loss.
    """

    def __init__(self, loss: PairLoss) -> None:
        self.loss = loss
        self.exponential, self.needs_hardest, self.fill_value = loss.exponential, loss.needs_hardest, loss.fill_value
        self.hardest_negatives = loss.hardest_negatives

    def context(self, similarity: Tensor, mask: Tensor) -> Context:
        """Return that of the loss."""
        return self.loss.context(similarity, mask)

    def negative_threshold(self, context: Context) -> Tensor | float:
        """Return that of the loss."""
        return self.loss.negative_threshold(context)

    def negative_terms(self, similarity: Tensor, context: Context) -> NegativeTerms:
        """Return the weights of the loss as values."""
        weights, factor, _ = self.loss.negative_terms(similarity, context)
        if not self.exponential:
            return NegativeTerms(weights, weights.clone())
        return NegativeTerms(weights if factor is None else weights + factor.log())

    def combine(self, similarity: Tensor, mask: Tensor, context: Context, negatives: NegativeTotals) -> AnchorTerms:
        """Return the sum as the value; no pair has a weight."""
        nothing = torch.zeros_like(negatives.total)
        return AnchorTerms(negatives.total, torch.zeros_like(similarity), nothing)
