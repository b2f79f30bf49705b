"""Tells in bfloat16 what has to be looked at in float32, at half the price of the product in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_memdml import bfloat16


class Sieve:
    """Similarities in bfloat16, and how far they may be off.

    Args:
        anchors: ``(B, D)``, float32.
    """

    def __init__(self, anchors: Tensor) -> None:
        self._anchors = anchors.bfloat16()
        self._longest = _longest(anchors)

    @classmethod
    def of(cls, anchors: Tensor, references: Tensor) -> Sieve | None:
        """Return a sieve where it can pay."""
        in_float32 = anchors.dtype == references.dtype == torch.float32
        return cls(anchors) if in_float32 and bfloat16.pays(anchors.device, anchors.shape[1]) else None

    def product(self, block: Tensor, out: Tensor) -> float | None:
        r"""Write the similarities ``(B, n)`` of a block ``(n, D)``, and return a bound of their error.

        .. math:: 1.02 \, (3 \cdot 2^{-8} + D \, 2^{-23}) \max_i \|x_i\| \max_j \|r_j\|

        One :math:`2^{-8}` each for the rounding of x, of r and of the result; sums may truncate, which doubles their
        error; 2 % are for products of two errors. ``None`` if there is no bound, as a row is not finite; nothing is
        written then.
        """
        error = 1.02 * (3 * bfloat16.ROUNDOFF + block.shape[1] * 2.0**-23) * self._longest * _longest(block)
        if not math.isfinite(error):
            return None
        out.copy_(self._anchors @ block.bfloat16().T)  # maxima of bfloat16 columns take 7 times those of float32
        return error


def _longest(rows: Tensor) -> float:
    return torch.linalg.vector_norm(rows, dim=1).max().item()
