"""Skips references by a bfloat16 product before anything is computed in float32.

Where the processor has instructions for it, a product in bfloat16 takes half the time of one in float32. It decides
which references cannot be above a threshold for any anchor. The others are computed in float32, so no number changes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memdml import bfloat16
from lightning_memdml.losses.accumulators import DENSE_SHARE, NegativeAccumulator


class BFloat16Prefilter:
    """Similarities in bfloat16, with a bound on their error.

    Args:
        anchors: `(B, D)`, float32.
    """

    def __init__(self, anchors: Tensor) -> None:
        self._anchors = anchors.bfloat16()
        self._longest = _longest(anchors)
        self._zeros = anchors.new_zeros(anchors.shape[0])

    def add_block(
        self, accumulators: list[NegativeAccumulator], references: Tensor, is_shared: Tensor, columns: slice
    ) -> bool:
        """Add the references of a block that may be above a threshold. Add nothing and return false if they are many.

        Args:
            accumulators: Of the parts of one loss, with these anchors.
            references: All references, `(M, D)`, float32.
            is_shared: True for the references to leave out, `(M,)`.
            columns: The references of the block.
        """
        block = references[columns]
        may_be_above = self.may_be_above(block, [accumulator.threshold for accumulator in accumulators])
        kept = (may_be_above & ~is_shared[columns]).nonzero().squeeze(1)
        if kept.shape[0] > DENSE_SHARE * block.shape[0]:
            return False
        rows = block.index_select(0, kept)
        similarity = accumulators[0].anchors @ rows.T
        for accumulator in accumulators:
            accumulator.add(similarity.clone(), rows, kept + columns.start)
        return True

    def may_be_above(self, block: Tensor, thresholds: list[Tensor | float]) -> Tensor:
        r"""Return which references may have a similarity above a threshold of its anchor.

        Near 0, a similarity minus its threshold has an error of at most

        $$
        1.02 \, (3 \cdot 2^{-8} + D \, 2^{-23}) \max_i \|x_i\| \max_j \|r_j\|
        $$

        One $2^{-8}$ each is for the rounding of x, of r and of the threshold. The difference is rounded last, which
        keeps its sign. Sums may truncate, which doubles their error. 2 % are for products of two errors. There is no
        bound if a row is not finite; then all references are returned.

        Args:
            block: References, `(n, D)`, float32.
            thresholds: Of each part of the loss, one number or one per anchor `(B,)`.

        Returns:
            True for the references to keep, `(n,)`.
        """
        error = 1.02 * (3 * bfloat16.ROUNDOFF + block.shape[1] * 2.0**-23) * self._longest * _longest(block)
        if not math.isfinite(error):
            return torch.ones_like(block[:, 0], dtype=torch.bool)
        lowest = torch.stack([self._zeros + threshold for threshold in thresholds]).amin(dim=0)
        above = F.linear(block.bfloat16(), self._anchors, (error - lowest).bfloat16())  # (n, B)
        # The bits of a bfloat16, read as an integer, have the same sign; the maxima of floats take 6 times as long.
        return above.view(torch.int16).amax(dim=1) > 0


def _longest(rows: Tensor) -> float:
    return torch.linalg.vector_norm(rows, dim=1).max().item()
