"""Direct weight assignment: the weights of pairs are given as functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_memdml.losses.pair_loss import AnchorTerms, Backend, Context, NegativeTerms, NegativeTotals, PairLoss
from lightning_memdml.losses.row_ops import hardest
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

    Args:
        positive: Weight of a positive as a function of its similarity: a `WeightFunction`, or any function
            that maps a tensor of similarities to weights of the same shape (numbers, or truth values such as
            `s > 0.5`), or to one number for all. Default: 1.
        negative: The same for negatives. Default: 1 above 0.5, and 0 elsewhere.
        normalize: `None`, or `"sum"` to divide each side's weights by their sum over the anchor's row.
        hardest_positives: How many of the least similar positives of each anchor to keep. Default: all.
        hardest_negatives: How many of the most similar negatives of each anchor to keep. Default: all.
        backend: How the loss is computed against a memory, see `PairLoss`.

    Raises:
        ValueError: If `normalize` is something else, or a number of pairs is below 1. When called, if a function
            returns weights of another shape.
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
        normalize: Literal["sum"] | None = None,
        hardest_positives: int | None = None,
        hardest_negatives: int | None = None,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(backend)
        if normalize not in (None, "sum"):
            raise ValueError(f'Expected `normalize` to be None or "sum" but got {normalize!r}. Leave it out.')
        self.positive = Constant() if positive is None else _check_function("positive", positive)
        self.negative = Threshold(0.5) if negative is None else _check_function("negative", negative)
        self.normalize = normalize
        self.hardest_positives = _check_number("hardest_positives", hardest_positives)
        self.hardest_negatives = _check_number("hardest_negatives", hardest_negatives)

    def negative_threshold(self, context: Context) -> float:
        """Return the similarity below which the negative weight function is 0."""
        return getattr(self.negative, "zero_below", -torch.inf)

    def negative_terms(self, similarity: Tensor, context: Context) -> NegativeTerms:
        """Apply the negative weight function."""
        weights = _weigh(self.negative, similarity)
        return NegativeTerms(weights, weights.clone() if self.normalize else None)

    def combine(self, similarity: Tensor, mask: Tensor, context: Context, negatives: NegativeTotals) -> AnchorTerms:
        """Apply the positive weight function, and the normalisation."""
        if self.hardest_positives is not None:
            mask = hardest(-similarity, mask, self.hardest_positives)
        weights = torch.where(mask, _weigh(self.positive, similarity), 0.0)
        scale = torch.ones_like(negatives.weighted)
        if self.normalize:
            weights = weights * _inverse_or_zero(weights.sum(dim=1, keepdim=True))
            scale = _inverse_or_zero(negatives.total)
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


def _inverse_or_zero(total: Tensor) -> Tensor:
    return torch.where(total > 0, 1 / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)  # never infinite
