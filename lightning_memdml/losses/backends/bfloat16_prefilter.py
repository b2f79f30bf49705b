"""Skips references or pairs by a bfloat16 product before anything is computed in float32.

Where the processor has instructions for it, a product in bfloat16 takes a quarter of the time of one in float32. It
decides which pairs cannot be above their threshold. The others are computed in float32, so no number changes.

- Where nearly all references are below the threshold of every anchor, the others are computed for all anchors.
- Where most references are above the threshold of some anchor, but few pairs are, these pairs are computed one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memdml import bfloat16, compat
from lightning_memdml.bfloat16_copy import RoundedRows, round_rows
from lightning_memdml.losses.accumulators import LISTED_SHARE, NegativeAccumulator, fill
from lightning_memdml.losses.listed_pairs import flatnonzero, list_pairs
from lightning_memdml.losses.shared_references import LeftOut

Way = Callable[[list[NegativeAccumulator], Tensor, LeftOut, slice], bool]
SPARSE_SHARE = 0.25  # up to so many pairs above a threshold for each reference, references are skipped
DENSE_SHARE = 0.5  # above this share of references to be kept, gathering them costs more than it saves
MOST_LISTED_SHARE = 1.25 * LISTED_SHARE  # of the pairs: some are kept that are not above their threshold
LOWEST_INT16 = -(1 << 15)


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

    def choose(self, share: float) -> Way | None:
        """Return the way to add further blocks, or `None` for whole ones.

        Args:
            share: Of the pairs of a block, how many were above a threshold.
        """
        if share * len(self._anchors) <= SPARSE_SHARE:
            return self.add_references
        return self.add_pairs if share <= LISTED_SHARE / torch.get_num_threads() else None

    def add_references(
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
        may_be_above = self.may_be_above(self._round(references, columns), _thresholds(accumulators))
        kept = flatnonzero(may_be_above | left_out.is_shared[columns])
        if kept.shape[0] > DENSE_SHARE * block.shape[0]:
            return False
        rows = block.index_select(0, kept)
        similarity, excluded = accumulators[0].anchors @ rows.T, left_out.in_block(columns, kept)
        for accumulator in accumulators:
            accumulator.add(similarity.clone(), rows, kept + columns.start, excluded)
        return True

    def add_pairs(
        self, accumulators: list[NegativeAccumulator], references: Tensor, left_out: LeftOut, columns: slice
    ) -> bool:
        """Add the pairs of a block that may be above their threshold. Add nothing and return false if they are many.

        The arguments are those of `add_references`.
        """
        block = references[columns].contiguous()
        mask = self.pairs_that_may_be_above(self._round(references, columns), _thresholds(accumulators))
        mask = fill(mask, left_out.in_block(columns), False)
        if np.count_nonzero(mask.numpy()) > MOST_LISTED_SHARE * mask.numel() / torch.get_num_threads():
            return False
        pairs = list_pairs(mask)
        values = compat.products_of_pairs(pairs.starts, pairs.columns, accumulators[0].anchors, block)
        for accumulator in accumulators:
            accumulator.add(pairs.pad(values), block, columns, ~pairs.exists, pairs)
        return True

    def _round(self, references: Tensor, columns: slice) -> RoundedRows:
        if self._read_rounded is None:
            return round_rows(references[columns])
        if self._rounded is None:
            self._rounded = self._read_rounded()
            if self._rounded.rows.shape != references.shape:
                raise ValueError(
                    f"Expected `ref_rounded` to return the references in bfloat16, {tuple(references.shape)}, but got "
                    f"{tuple(self._rounded.rows.shape)}. Pass that of the same `memory.read()`, or leave it out."
                )
        return self._rounded._replace(rows=self._rounded.rows[columns])

    def error(self, block: RoundedRows) -> float:
        r"""Return the bound of the error of a similarity minus its threshold near 0, in bfloat16.

        $$
        1.02 \, (3 \cdot 2^{-8} + D \, 2^{-23}) \max_i \|x_i\| \max_j \|r_j\|
        $$

        One $2^{-8}$ each is for the rounding of x, of r and of the threshold. The difference is rounded last, which
        keeps its sign. Sums may truncate, which doubles their error. 2 % are for products of two errors. The bound is
        not finite if a row is not.
        """
        rows, longest = block
        return 1.02 * (3 * bfloat16.ROUNDOFF + rows.shape[1] * 2.0**-23) * self._longest * longest

    def may_be_above(self, block: RoundedRows, thresholds: list[Tensor | float]) -> Tensor:
        """Return which references may have a similarity above a threshold of its anchor.

        Args:
            block: References, `(n, D)`.
            thresholds: Of each part of the loss, one number or one per anchor `(B,)`.

        Returns:
            True for the references to keep, `(n,)`. All of them if a row is not finite.
        """
        rows, error = block.rows, self.error(block)
        if not math.isfinite(error):
            return torch.ones_like(rows[:, 0], dtype=torch.bool)
        above = F.linear(rows, self._anchors, (error - self._lowest(thresholds)).bfloat16())  # (n, B)
        # The bits of a bfloat16, read as an integer, have the same sign; the maxima of floats take 6 times as long.
        return above.view(torch.int16).amax(dim=1) > 0

    def pairs_that_may_be_above(self, block: RoundedRows, thresholds: list[Tensor | float]) -> Tensor:
        """Return which pairs may have a similarity above a threshold of their anchor.

        The threshold minus the error is rounded down to bfloat16. A product above it is not below it when it is rounded
        too.

        Args:
            block: References, `(n, D)`.
            thresholds: Of each part of the loss, one number or one per anchor `(B,)`.

        Returns:
            True for the pairs to keep, `(B, n)`. All of them if a row is not finite, and all pairs of an anchor whose
            threshold is near or below 0.
        """
        lowest = self._lowest(thresholds) - self.error(block)
        # The bits of a positive float, read as an integer, are in the order of the numbers, and those of a negative one
        # are below them. numpy compares integers in a tenth of the time in which torch compares floats.
        bits = torch.where(lowest > 0, lowest.view(torch.int32) >> 16, LOWEST_INT16).short()
        similarity = torch.mm(self._anchors, block.rows.T).view(torch.int16)
        return torch.from_numpy(similarity.numpy() >= bits[:, None].numpy())

    def _lowest(self, thresholds: list[Tensor | float]) -> Tensor:
        return torch.stack([self._zeros + threshold for threshold in thresholds]).amin(dim=0)


def _thresholds(accumulators: list[NegativeAccumulator]) -> list[Tensor | float]:
    return [accumulator.threshold for accumulator in accumulators]
