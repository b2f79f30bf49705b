r"""The sum of the weights of an anchor's positives, and of its negatives.

Losses with similar weight curves can differ by a factor of 10 in the sum of their weights, which decides how much one
side outweighs the other. For a comparison at equal sums, the weights of a side are divided by their sum or by the
number of pairs, and multiplied by a scale that is chosen on validation classes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Normalize = Literal["sum", "mean"]


def check_normalize(normalize: str | None) -> None:
    """Check the option `normalize` of a loss.

    Raises:
        ValueError: If it is none of `None`, "sum" and "mean".
    """
    if normalize not in (None, "sum", "mean"):
        raise ValueError(f'Expected `normalize` to be None, "sum" or "mean" but got {normalize!r}. Leave it out.')


def check_scale(name: str, scale: float) -> float:
    """Return a factor of the weights of one side.

    Raises:
        ValueError: If it is below 0 or not finite.
    """
    if not 0 <= scale < math.inf:
        raise ValueError(f"Expected `{name}` of at least 0 but got {scale}. Pass 0 to leave this side out.")
    return scale


def normalise_rows(weights: Tensor, mask: Tensor, normalize: Normalize | None, least: float = 0.0) -> Tensor:
    r"""Divide the weights of each anchor by their sum, or by the number of its pairs.

    $$
    \text{sum: } \hat w_{ij} = w_{ij} \Big/ \sum_{j} w_{ij}, \qquad \text{mean: } \hat w_{ij} = w_{ij} / n_i
    $$

    An anchor whose weights sum to at most `least` gets weights of 0 by `sum`.

    Args:
        weights: `(B, P)`, 0 where there is no pair.
        mask: True where there is a pair, `(B, P)`.
        normalize: What to divide by.
        least: Sum of weights that is not above rounding errors. In some losses the weights of an anchor cancel.

    Example:
        >>> weights, mask = torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[True, True, False]])
        >>> normalise_rows(weights, mask, "sum"), normalise_rows(weights, mask, "mean")
        (tensor([[0.7500, 0.2500, 0.0000]]), tensor([[1.5000, 0.5000, 0.0000]]))
    """
    if normalize is None:
        return weights
    if normalize == "sum":
        total = weights.sum(dim=1, keepdim=True)
        return weights * torch.where(total > least, inverse_or_zero(total), 0.0)
    return weights / mask.sum(dim=1, keepdim=True).clamp_min(1)


def inverse_or_zero(total: Tensor) -> Tensor:
    """Return `1 / total`, and 0 where the total is not above 0."""
    return torch.where(total > 0, 1 / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)  # never infinite
