"""Direct weight assignment: the weights of pairs are given as functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_memdml.checks import check_types
from lightning_memdml.losses.pair_loss import AnchorTerms, Backend, Context, NegativeTerms, NegativeTotals, PairLoss
from lightning_memdml.losses.row_ops import hardest
from lightning_memdml.losses.weight_mass import (
    Normalize,
    check_normalize,
    check_scale,
    inverse_or_zero,
    normalise_rows,
)
from lightning_memdml.losses.weights import Constant, Threshold, WeightFunction

Weight = WeightFunction | Callable[[Tensor], Any]


class DirectWeightLoss(PairLoss):
    r"""Weighs positives and negatives by given functions of their similarity.

    $$
    l_i = \sum_{j \in P_i} \bar f(s_{ij}) (1 - s_{ij}) + \sum_{j \in N_i} \bar g(s_{ij}) s_{ij}, \qquad
    w^+ = f(s), \quad w^- = g(s)
    $$

    The bar holds the weights constant, so the gradient is exactly the assigned weights. Without arguments it is the
    contrastive loss with margin 0.5.

    Denominator: summed over pairs, averaged over the B anchors. With `normalize="sum"` the weights of each side
    sum to 1 for every anchor with a weight above 0 there; their sum before has to be within the range of the dtype.
    With `normalize="mean"` they are divided by the number of the anchor's pairs of that side, weight or not.

    Args:
        positive: Weight of a positive as a function of its similarity: a `WeightFunction`, or any function
            that maps a tensor of similarities to weights of the same shape (numbers, or truth values such as
            `s > 0.5`), or to one number for all. Default: 1.
        negative: The same for negatives. Default: 1 above 0.5, and 0 elsewhere.
        normalize: `None`, `"sum"` to divide each side's weights by their sum over the anchor's row, or `"mean"` to
            divide them by the number of pairs.
        hardest_positives: How many of the least similar positives of each anchor to keep. Default: all.
        hardest_negatives: How many of the most similar negatives of each anchor to keep. Default: all.
        dropped_positives: How many of the least similar positives of each anchor to leave out. Default: none. With
            `hardest_positives` they are left out first.
        positive_scale: Factor of the positives' weights, after the normalisation, at least 0. At 0 the positives have
            no weight, for example against a memory.
        negative_scale: The same for negatives.
        backend: How the loss is computed against a memory, see `PairLoss`.

    Raises:
        ValueError: If `normalize` is something else, or a number or a scale is out of range. When called, if a
            function returns weights of another shape.
        TypeError: If `positive` or `negative` is not a function. When called, if it returns neither a tensor nor a
            number.

    References:
        Zhang et al. 2021, arXiv 2103.14003 (direct weight assignment).

    Example:
        >>> import torch.nn.functional as F
        >>> from lightning_memdml import DirectWeightLoss, Exponential
        >>> loss = DirectWeightLoss(positive=lambda s: 1 - s, negative=Exponential(scale=10))
        >>> x = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]), dim=1)
        >>> loss(x, torch.tensor([0, 0, 1]))
        tensor(0.6079)
    """

    needs_negatives = False

    def __init__(
        self,
        positive: Weight | None = None,
        negative: Weight | None = None,
        normalize: Normalize | None = None,
        hardest_positives: int | None = None,
        hardest_negatives: int | None = None,
        dropped_positives: int = 0,
        positive_scale: float = 1.0,
        negative_scale: float = 1.0,
        *,
        backend: Backend = "auto",
    ) -> None:
        check_types(DirectWeightLoss.__init__, locals(), "positive", "negative", "normalize", "backend")
        super().__init__(backend)
        check_normalize(normalize)
        self.positive = Constant() if positive is None else _check_function("positive", positive)
        self.negative = Threshold(0.5) if negative is None else _check_function("negative", negative)
        self.normalize = normalize
        self.hardest_positives = _check_number("hardest_positives", hardest_positives)
        self.hardest_negatives = _check_number("hardest_negatives", hardest_negatives)
        if dropped_positives < 0:
            raise ValueError(
                f"Expected `dropped_positives` of at least 0 pairs but got {dropped_positives}. Pass 0 for none."
            )
        self.dropped_positives = dropped_positives
        self.positive_scale = check_scale("positive_scale", positive_scale)
        self.negative_scale = check_scale("negative_scale", negative_scale)

    def negative_threshold(self, context: Context) -> float:
        """Return the similarity below which the negative weight function is 0."""
        return getattr(self.negative, "zero_below", -torch.inf)

    def negative_terms(self, similarity: Tensor, context: Context) -> NegativeTerms:
        """Apply the negative weight function."""
        weights = _weigh(self.negative, similarity)
        return NegativeTerms(weights, weights.clone() if self.normalize == "sum" else None)

    def combine(self, similarity: Tensor, mask: Tensor, context: Context, negatives: NegativeTotals) -> AnchorTerms:
        """Apply the positive weight function, and the normalisation."""
        if self.dropped_positives:
            mask = mask & ~hardest(-similarity, mask, self.dropped_positives)
        if self.hardest_positives is not None:
            mask = hardest(-similarity, mask, self.hardest_positives)
        weights = torch.where(mask, _weigh(self.positive, similarity), 0.0)
        weights = self.positive_scale * normalise_rows(weights, mask, self.normalize)
        scale = torch.full_like(negatives.weighted, self.negative_scale)
        if self.normalize == "sum":
            scale = scale * inverse_or_zero(negatives.total)
        elif self.normalize == "mean":
            scale = scale / negatives.number.clamp_min(1)
        value = (weights * (1 - similarity)).sum(dim=1) + scale * negatives.weighted
        return AnchorTerms(value, weights, scale)


def _check_function(name: str, weight: Weight) -> Weight:
    if not callable(weight):
        raise TypeError(
            f"Expected `{name}` to be a function of similarities but got {weight!r}. Pass one such as Constant(1)."
        )
    return weight


def _weigh(function: Weight, similarity: Tensor) -> Tensor:
    """Return the weights of pairs, of the shape and dtype of their similarities."""
    weights = function(similarity)
    if isinstance(weights, int | float):
        return torch.full_like(similarity, weights)
    if not hasattr(weights, "to"):
        raise TypeError(
            f"Expected {function} to return a tensor of weights but got {type(weights).__name__}. "
            "Compute them with torch."
        )
    if weights.shape != similarity.shape:
        raise ValueError(
            f"Expected {function} to return weights of shape {tuple(similarity.shape)}, one for each similarity, "
            f"but got {tuple(weights.shape)}. Use element-wise operations."
        )
    return weights.to(similarity.dtype)


def _check_number(name: str, number: int | None) -> int | None:
    if number is not None and number < 1:
        raise ValueError(f"Expected `{name}` of at least 1 pair, or None for all, but got {number}. Pass 1 or more.")
    return number
