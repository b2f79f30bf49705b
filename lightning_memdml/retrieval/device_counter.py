"""Counts tiles on a GPU with shapes that are known beforehand, so that the host does not wait for the device.

Which pairs of a tile are hits is known to the device only. A list of them with as many entries as there are hits would
make the host wait at every tile. Here the list of a tile has a fixed length, and so has that of the hits that are
computed again in float64. Hits for which a list is too short are not counted, and the device notes the tile. After a
strip of tiles the host reads these notes, once, and counts those tiles as on a CPU. They are few, except for a
collapsed model. Where they are most of a strip, the next strip is counted as on a CPU from the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_memdml.retrieval.rank_counter import TIE, RankCounter
from lightning_memdml.retrieval.similarity_tiles import SimilarityTiles
from lightning_memdml.retrieval.tiles import row_slices

#: Devices that the host must not wait for.
ASYNCHRONOUS_DEVICES = {"cuda"}

_MOST_HITS = (
    2**17
)  # entries of a tile's list; the first tiles of 60,502 images have up to 78,000 hits, later ones 15,000
_TOGETHER = 4  # tiles whose hits are counted together; the lists take about 50 MB
_CLOSE_BUDGET = 2**21  # elements of a float64 temporary of the hits that are computed again


class _Hits(NamedTuple):
    """The hits of a tile, all `(L,)`, and whether there was room for all of them."""

    query: Tensor  # in the sorted order
    reference: Tensor
    similarity: Tensor
    is_used: Tensor  # whether an entry is a hit at all
    fits: Tensor


class DeviceRankCounter(RankCounter):
    """A `RankCounter` whose tiles are counted without waiting for the device. Arguments are those of `RankCounter`."""

    _crowded = False  # whether most tiles of the last strip had too many hits

    def count_strip(
        self, similarities: SimilarityTiles, rows: slice, strip: Sequence[slice], both_ways: bool
    ) -> list[int]:
        """Count the tiles of some queries with runs of references; see `RankCounter.count_strip`.

        Returns:
            How many hits each of the tiles had that were counted as on a CPU.
        """
        left = list(strip)
        if not self._crowded:
            similarities.use_bfloat16 = False  # its hits would have to be computed again twice
            groups = [strip[part] for part in row_slices(len(strip), _TOGETHER)]
            counted = torch.cat([self._count_group(similarities, rows, group, both_ways) for group in groups])
            left = [columns for columns, done in zip(strip, counted.tolist(), strict=True) if not done]
        hits = super().count_strip(similarities, rows, left, both_ways)
        refused = sum(found > _MOST_HITS for found in hits) if self._crowded else len(left)
        self._crowded = 2 * refused > len(strip)
        return hits

    def _count_group(
        self, similarities: SimilarityTiles, rows: slice, group: Sequence[slice], both_ways: bool
    ) -> Tensor:
        """Count neighbouring tiles, and return which of them were counted, `(T,)` booleans on the device."""
        found = [self._hits(similarities, rows, columns, both_ways) for columns in group]
        query, reference, similarity, is_used = (torch.cat(column) for column in list(zip(*found, strict=True))[:4])
        row = query - self.rows.start
        beaten_from, is_close = self._beaten(row, similarity, self._float32)
        is_close &= is_used
        close, is_close_used, close_fit = _first_places(is_close, max(64, _CLOSE_BUDGET // self.queries.unit.shape[1]))
        exact = self.queries.exact(query[close]).mul_(self.gallery.exact(reference[close])).sum(1)
        close_row = row[close]
        beaten_by_close = self._positives_above(close_row, exact + TIE)
        self._add(row, beaten_from, is_used & ~is_close & close_fit)
        self._add(close_row, beaten_by_close, is_close_used & close_fit)
        for run in (rows, slice(group[0].start, group[-1].stop)) if both_ways else (rows,):
            start = self.rows.start
            self._update_threshold(torch.arange(run.start - start, run.stop - start, device=row.device))
        return torch.stack([hits.fits for hits in found]) & close_fit

    def _hits(self, similarities: SimilarityTiles, rows: slice, columns: slice, both_ways: bool) -> _Hits:
        """Return the hits of a tile: none, if there are too many."""
        tile, _ = similarities.compute(rows, columns)
        sides = (rows, columns) if both_ways and columns.start != rows.start else (rows,)
        is_hit = torch.empty(len(sides), *tile.shape, dtype=torch.bool, device=tile.device)
        for side, queries, shape in zip(is_hit, sides, [(-1, 1), (1, -1)], strict=False):
            lowest = self.threshold[queries.start - self.rows.start : queries.stop - self.rows.start]
            torch.ge(tile, (lowest - self._float32.absolute).view(shape), out=side)
        place, is_used, fits = _first_places(is_hit.flatten(), min(is_hit.numel(), _MOST_HITS))
        inside = place % tile.numel()
        query, reference = inside // tile.shape[1] + rows.start, inside % tile.shape[1] + columns.start
        if len(sides) == 2:
            swapped = place >= tile.numel()
            query, reference = torch.where(swapped, reference, query), torch.where(swapped, query, reference)
        return _Hits(query, reference, tile.take(inside), is_used & fits, fits)

    def _add(self, row: Tensor, beaten_from: Tensor, is_counted: Tensor) -> None:
        cell = row * (self.width + 1) + beaten_from
        self.counts.view(-1).index_add_(0, cell, is_counted.to(self.counts.dtype))


def _first_places(chosen: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first places where `chosen` `(N,)` is true.

    Returns:
        Up to `length` places, 0 in entries that are not needed, `(length + 1,)`; which entries are used; whether
        there was room for all places.
    """
    place = torch.nonzero_static(chosen, size=length + 1, fill_value=-1).squeeze(1)
    is_used = place >= 0
    return place.clamp_min(0), is_used, ~is_used[-1]
