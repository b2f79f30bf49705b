"""Tiles of similarities in float32 or, where that is faster, in bfloat16, with a proven bound on their error.

Where the processor has bfloat16 instructions, such a product takes 0.45 of the time of a float32 one. But a pair whose
similarity lies within the error bound of a positive has to be computed again, which costs about 60 times its share of a
float32 product. So bfloat16 is faster where few pairs come near a query's positives, which is measured tile by tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_memdml import bfloat16
from lightning_memdml.retrieval.class_sorted import PAIR_BUDGET, ClassSortedEmbeddings
from lightning_memdml.retrieval.tiles import row_slices

_HIT_SHARE = 1 / 128  # hits per pair above which bfloat16 costs more than it saves; a fifth to a third are recomputed


class Rounding(NamedTuple):
    """The largest error of a computed similarity: `absolute + relative * |similarity|`."""

    absolute: float
    relative: float = 0.0

    def bound(self, similarity: Tensor) -> Tensor:
        """Return the largest error of each similarity, given as the computed or as the exact value."""
        return similarity.abs().mul_(self.relative).add_(self.absolute)


def float32_rounding(dim: int) -> Rounding:
    """Return the error of float32: 2u for rounded unit rows, `dim` u for a sum of `dim` terms, u for the threshold."""
    return Rounding((dim + 8) * 2.0**-24)


def bfloat16_rounding(queries: ClassSortedEmbeddings, gallery: ClassSortedEmbeddings) -> Rounding:
    """Return the error of bfloat16 rows, summed in float32, the sum rounded to bfloat16 (by at most 2^-8 of itself).

    Rounding moves a unit row by at most 2^-8, and most rows by 0.4 of that. The movement of these rows is measured.
    """
    moved = _largest_move(queries)
    moved += moved if queries is gallery else _largest_move(gallery)
    # Sums may truncate, which doubles their error; 2 % are for products of two errors and for the measurement.
    return Rounding(1.02 * (moved + 2 * float32_rounding(queries.unit.shape[1]).absolute), bfloat16.ROUNDOFF)


def _largest_move(samples: ClassSortedEmbeddings) -> float:
    parts = row_slices(len(samples), max(1, PAIR_BUDGET // samples.unit.shape[1]))
    return max((samples.unit[rows] - samples.unit[rows].bfloat16()).norm(dim=1).max().item() for rows in parts)


class SimilarityTiles:
    """Computes tiles of similarities of two sets into memory that the next tile overwrites.

    Args:
        queries: The query set.
        gallery: The gallery set; the same object in self-retrieval.
        size: Elements of the largest tile.

    Attributes:
        use_bfloat16: Whether the next tile is computed in bfloat16.
    """

    def __init__(self, queries: ClassSortedEmbeddings, gallery: ClassSortedEmbeddings, size: int) -> None:
        self._queries, self._gallery = queries, gallery
        # On the host, because asking a GPU for a label would wait for it at every tile.
        self._labels, self._other_labels = queries.labels.cpu().numpy(), gallery.labels.cpu().numpy()
        self._tile = torch.empty(size, device=queries.unit.device)
        self._float32 = float32_rounding(queries.unit.shape[1])
        self._bfloat16: Rounding | None = None
        self.use_bfloat16 = False
        wide = queries.unit.shape[1] >= bfloat16.SMALLEST_DIM
        if wide and bfloat16.has_fast_bf16_matmul(queries.unit.device):
            self._bfloat16 = bfloat16_rounding(queries, gallery)
            self._rounded_tile = torch.empty_like(self._tile, dtype=torch.bfloat16)

    def compute(self, rows: slice, columns: slice) -> tuple[Tensor, Rounding]:
        """Return a tile in float32, with pairs of one class at minus infinity, and the error bound of its values."""
        query, reference = self._queries.unit[rows], self._gallery.unit[columns]
        shape = len(query), len(reference)
        tile = self._tile[: shape[0] * shape[1]].view(shape)
        rounding = self._float32
        if self.use_bfloat16 and self._bfloat16 is not None:
            rounding = self._bfloat16
            rounded = self._rounded_tile[: tile.numel()].view(shape)
            torch.mm(query.bfloat16(), reference.bfloat16().T, out=rounded)
            tile.copy_(rounded)  # maxima of bfloat16 rows take 7 times those of float32
        else:
            torch.mm(query, reference.T, out=tile)
        label, other = self._labels[rows], self._other_labels[columns]
        if label[0] <= other[-1] and other[0] <= label[-1]:
            same = self._queries.labels[rows, None] == self._gallery.labels[columns]
            tile.masked_fill_(same, -torch.inf)
        return tile, rounding

    def choose(self, hits: int, pairs: int) -> None:
        """Use bfloat16 for the next tile if the last one, of either precision, had few hits per pair."""
        self.use_bfloat16 = hits <= _HIT_SHARE * pairs
