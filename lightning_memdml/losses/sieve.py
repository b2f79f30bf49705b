"""Tells in bfloat16 what has to be looked at in float32, at half the price of the product in float32."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memdml import bfloat16


class Sieve:
    """Similarities in bfloat16, with an allowance for how far they may be off.

    Args:
        anchors: ``(B, D)``, float32.
    """

    def __init__(self, anchors: Tensor) -> None:
        self._anchors = anchors.bfloat16()
        self._longest = _longest(anchors)
        self._zeros = anchors.new_zeros(anchors.shape[0])

    @classmethod
    def of(cls, anchors: Tensor, references: Tensor) -> Sieve | None:
        """Return a sieve where it can pay."""
        in_float32 = anchors.dtype == references.dtype == torch.float32
        return cls(anchors) if in_float32 and bfloat16.pays(anchors.device, anchors.shape[1]) else None

    def reached(self, block: Tensor, cuts: list[Tensor | float]) -> Tensor:
        r"""Return which references ``(n, D)`` may have a similarity above a cut of its anchor, ``(n,)``.

        Near 0, a similarity less its cut, which is a tensor ``(B,)`` or a number, is off by at most

        .. math:: 1.02 \, (3 \cdot 2^{-8} + D \, 2^{-23}) \max_i \|x_i\| \max_j \|r_j\|

        One :math:`2^{-8}` each for the rounding of x, of r and of the cut; the difference itself is rounded last, which
        leaves its sign. Sums may truncate, which doubles their error; 2 % are for products of two errors. There is no
        bound if a row is not finite: then all are returned.
        """
        error = 1.02 * (3 * bfloat16.ROUNDOFF + block.shape[1] * 2.0**-23) * self._longest * _longest(block)
        if not math.isfinite(error):
            return torch.ones_like(block[:, 0], dtype=torch.bool)
        lowest = torch.stack([self._zeros + cut for cut in cuts]).amin(dim=0)
        above = F.linear(block.bfloat16(), self._anchors, (error - lowest).bfloat16())  # (n, B)
        # Its bits, read as an integer, have the same sign; the maxima of floats take 6 times as long.
        return above.view(torch.int16).amax(dim=1) > 0


def _longest(rows: Tensor) -> float:
    return torch.linalg.vector_norm(rows, dim=1).max().item()
