r"""Sums over all pairs of two sets of similarities, at the cost of sums over each set.

Between similarities, a smooth function of their difference is a polynomial of both up to rounding,
$f(x - y) = \sum_{ik} c_{ik} x^i y^k$. Its sum over all pairs then needs only the sums of the powers of either
side, and its sum over all y is one polynomial in x.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lightning_memdml.checks import UNIT_TOLERANCE
from lightning_memdml.losses.constants import constant_like

REACH = (1 + UNIT_TOLERANCE) ** 2  # the largest similarity of embeddings that are accepted as of unit length
# The error falls by a factor of 6 with each degree, as the nearest poles are at +-i pi; here to rounding of the type.
DEGREES = {torch.float32: 8, torch.float64: 20}


class DifferencePolynomial:
    r"""A polynomial in two similarities that equals a function of their difference up to rounding.

    Its coefficients fall with the degree and similarities are at most 1, so no large terms cancel, in float32 too.

    Args:
        function: A function that is analytic within $\pi$ of the real line.
    """

    def __init__(self, function: Callable[[np.ndarray], np.ndarray]) -> None:
        self.coefficients = {dtype: _interpolate(function, degree) for dtype, degree in DEGREES.items()}

    def like(self, tensor: Tensor) -> Tensor:
        """Return the coefficients, a row per power of x and a column per power of y, on the tensor's device."""
        return constant_like(self.coefficients[tensor.dtype], tensor)


def _interpolate(function: Callable[[np.ndarray], np.ndarray], degree: int) -> tuple[tuple[float, ...], ...]:
    nodes = REACH * np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
    powers = np.vander(nodes, increasing=True)
    values = function(nodes[:, None] - nodes)
    return tuple(map(tuple, np.linalg.solve(powers, np.linalg.solve(powers, values).T).T.tolist()))


def powers(block: Tensor) -> Tensor:
    """Return the powers 1, 2, ... of each entry, `(B, n, degree)`: one operation, and as many times the memory.

    With them, `power_sums` and `polynomial` are one product each. A GPU gains from that for the few positives; a CPU
    takes five times as long.
    """
    return block[:, :, None].expand(-1, -1, DEGREES[block.dtype]).cumprod(dim=2)


def power_sums(block: Tensor) -> Tensor:
    """Return each row's sums of the powers 1, 2, ..., `(B, degree)`."""
    power = block.square()
    higher = (power.mul_(block).sum(dim=1) for _ in range(2, DEGREES[block.dtype]))
    return torch.stack([block.sum(dim=1), power.sum(dim=1), *higher], dim=1)


def polynomial(block: Tensor, coefficients: Tensor) -> Tensor:
    """Return a polynomial of each entry, with the coefficients of its row, `(B, degree + 1)`, constants first."""
    *lower, highest = coefficients.split(1, dim=1)
    value = highest.expand_as(block).clone()
    for coefficient in reversed(lower):
        torch.addcmul(coefficient, value, block, out=value)
    return value
