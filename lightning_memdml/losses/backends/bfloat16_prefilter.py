"""Skips references by a bfloat16 product before anything is computed in float32.

Where the processor has instructions for it, a product in bfloat16 takes half the time of one in float32. It decides
which references cannot be above a threshold for any anchor. The others are computed in float32, so no number changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memdml import bfloat16
from lightning_memdml.bfloat16_copy import RoundedRows, round_rows
from lightning_memdml.losses.accumulators import DENSE_SHARE, NegativeAccumulator
from lightning_memdml.losses.row_ops import flatnonzero
from lightning_memdml.losses.shared_references import LeftOut


class BFloat16Prefilter:
    """Similarities in bfloat16, with a bound on their error.

    Args:
        anchors: `(B, D)`, float32.
        read_rounded: Returns all references in bfloat16, as a memory keeps them. It is called at the first block. None:
            they are rounded block by block.
    """

    def __init__(self, anchors: Tensor, read_rounded: Callable[[], RoundedRows] | None = None) -> None:
        self._anchors, self._longest = round_rows(anchors)
        self._zeros = anchors.new_zeros(anchors.shape[0])
        self._read_rounded = read_rounded
        self._rounded: RoundedRows | None = None

    def add_block(
        self, accumulators: list[NegativeAccumulator], references: Tensor, left_out: LeftOut, columns: slice
    ) -> bool:
        """Add the references of a block that may be above a threshold. Add nothing and return false if they are many.

        Args:
            accumulators: Of the parts of one loss, with these anchors.
            references: All references, `(M, D)`, float32.
            left_out: The references or pairs to leave out.
            columns: The references of the block.
        """
        block = references[columns]
        rounded = round_rows(block) if self._read_rounded is None else self._from_memory(references, columns)
        may_be_above = self.may_be_above(rounded, [accumulator.threshold for accumulator in accumulators])
        kept = flatnonzero(may_be_above | left_out.is_shared[columns])
        if kept.shape[0] > DENSE_SHARE * block.shape[0]:
            return False
        rows = block.index_select(0, kept)
        similarity, excluded = accumulators[0].anchors @ rows.T, left_out.in_block(columns, kept)
        for accumulator in accumulators:
            accumulator.add(similarity.clone(), rows, kept + columns.start, excluded)
        return True

    def _from_memory(self, references: Tensor, columns: slice) -> RoundedRows:
        if self._rounded is None:
            assert self._read_rounded is not None
            self._rounded = self._read_rounded()
            if self._rounded.rows.shape != references.shape:
                raise ValueError(
                    f"Expected `ref_rounded` to return the references in bfloat16, {tuple(references.shape)}, but got "
                    f"{tuple(self._rounded.rows.shape)}. Pass that of the same `memory.read()`, or leave it out."
                )
        return self._rounded._replace(rows=self._rounded.rows[columns])

    def may_be_above(self, block: RoundedRows, thresholds: list[Tensor | float]) -> Tensor:
        r"""Return which references may have a similarity above a threshold of its anchor.

        Near 0, a similarity minus its threshold has an error of at most

        $$
        1.02 \, (3 \cdot 2^{-8} + D \, 2^{-23}) \max_i \|x_i\| \max_j \|r_j\|
        $$

        One $2^{-8}$ each is for the rounding of x, of r and of the threshold. The difference is rounded last, which
        keeps its sign. Sums may truncate, which doubles their error. 2 % are for products of two errors. There is no
        bound if a row is not finite; then all references are returned.

        Args:
            block: References, `(n, D)`.
            thresholds: Of each part of the loss, one number or one per anchor `(B,)`.

        Returns:
            True for the references to keep, `(n,)`.
        """
        rows, longest = block
        error = 1.02 * (3 * bfloat16.ROUNDOFF + rows.shape[1] * 2.0**-23) * self._longest * longest
        if not math.isfinite(error):
            return torch.ones_like(rows[:, 0], dtype=torch.bool)
        lowest = torch.stack([self._zeros + threshold for threshold in thresholds]).amin(dim=0)
        above = F.linear(rows, self._anchors, (error - lowest).bfloat16())  # (n, B)
        # The bits of a bfloat16, read as an integer, have the same sign; the maxima of floats take 6 times as long.
        return above.view(torch.int16).amax(dim=1) > 0
