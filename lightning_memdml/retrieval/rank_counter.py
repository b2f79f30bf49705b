"""Ranks by counting the negatives above each positive, without sorting and without neighbour lists.

Both sets are ordered by class, so the positives of a query are one run of the gallery. Their similarities are computed
first, in float64. Then the similarities to the whole gallery are computed in float32, tile by tile. A tile is searched
only where its maximum reaches the *threshold* of a query: the similarity of its lowest positive whose rank can still
change a score. A positive that can no longer enter the top R is dropped, and the best positive is dropped once `depth`
negatives rank above it. What remains are a few hits per query, each counted against the positives below it.

A hit within the rounding error of a positive is computed again: of a bfloat16 tile in float32, and if that does not
decide, in float64. So ranks are those of float64, whatever the precision of a tile and the order of the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_memdml.retrieval.class_sorted import (
    FLOAT64_BUDGET,
    ClassSortedEmbeddings,
    pair_similarities,
    positive_similarities,
)
from lightning_memdml.retrieval.similarity_tiles import Rounding, SimilarityTiles, float32_rounding
from lightning_memdml.retrieval.tiles import row_slices

TIE = 1e-12
"""Float64 similarities that differ by less are tied. It is above the rounding of dot products of up to 8,000 terms."""

_SEGMENT = 128  # columns that share one maximum when a tile is searched
_BATCH = 2**16  # hits counted together
_HIT_BUDGET = 2**20  # elements of a tile searched at a time; bounds the index tensors to about 60 MB
_NO_THRESHOLD = 2.0  # above any cosine and its rounding: nothing can change the scores of this query


class RankStatistics(NamedTuple):
    """Per query, all `(Q,)`: the number of matches, the rank of the best one, and the scores, NaN without a match."""

    relevant: Tensor
    best_rank: Tensor  # at most depth + 1
    r_precision: Tensor
    average_precision_at_r: Tensor
    average_precision: Tensor  # defined only with `every_positive`


class RankCounter:
    """Counts, for a run of class-sorted queries, the negatives at or above each of their positives.

    Args:
        queries: The query set.
        gallery: The gallery set; the same object in self-retrieval.
        rows: The run of queries this counter is responsible for.
        depth: Largest exact rank of the best positive; at least the largest K of a recall.
        every_positive: Compute the exact rank of all positives (full average precision) instead of dropping those that
            cannot enter the top R.
    """

    def __init__(
        self,
        queries: ClassSortedEmbeddings,
        gallery: ClassSortedEmbeddings,
        rows: slice,
        *,
        depth: int,
        every_positive: bool = False,
    ) -> None:
        self.queries, self.gallery, self.rows = queries, gallery, rows
        self.depth, self.every_positive = depth, every_positive
        self._rounding = self._float32 = float32_rounding(queries.unit.shape[1])
        self.positives, self.relevant = positive_similarities(queries, gallery, rows)
        self.width = self.positives.shape[1]
        self.counts = torch.zeros(len(self.positives), self.width + 1, dtype=torch.int32, device=queries.unit.device)
        self._places = torch.arange(1, self.width + 1, device=queries.unit.device)
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self._waiting = 0  # number of pending hits; summing them at every tile took a tenth of the whole time
        self.threshold = torch.empty(len(self.positives), device=queries.unit.device)
        for part in row_slices(len(self.positives), max(1, FLOAT64_BUDGET // self.width)):
            self._update_threshold(torch.arange(part.start, part.stop, device=queries.unit.device))

    def count_strip(
        self, similarities: SimilarityTiles, rows: slice, strip: Sequence[slice], both_ways: bool
    ) -> list[int]:
        """Count the tiles of some queries with runs of references.

        Args:
            similarities: Computes the tiles.
            rows: The queries.
            strip: Runs of references.
            both_ways: Count each tile a second time with the references as queries (self-retrieval), except the one
                that begins on the diagonal.

        Returns:
            How many hits each tile had.
        """
        found = []
        for columns in strip:
            tile, rounding = similarities.compute(rows, columns)
            hits, pairs = self.observe(tile, rounding, rows.start, columns.start), tile.numel()
            if both_ways and columns.start != rows.start:
                hits += self.observe(tile.T, rounding, columns.start, rows.start)
                pairs *= 2
            similarities.choose(hits, pairs)
            found.append(hits)
        return found

    def observe(self, tile: Tensor, rounding: Rounding, first_query: int, first_reference: int) -> int:
        """Count a tile of similarities `(queries, references)`, -inf where a reference is no negative.

        Returns:
            How many of them were hits, which are counted one by one.
        """
        if rounding != self._rounding:
            self._count_pending()
            self._rounding = rounding
        start = first_query - self.rows.start
        lowest = self.threshold[start : start + tile.shape[0]]
        threshold = lowest - rounding.bound(lowest)
        hits = 0
        segment = _SEGMENT if tile.shape[1] % _SEGMENT == 0 else tile.shape[1]
        segments = tile.unflatten(1, (-1, segment))
        reached = (_segment_maxima(tile, segment) >= threshold[:, None]).nonzero()
        for part in reached.split(max(1, _HIT_BUDGET // segment)):
            row, place = part.unbind(1)
            searched = segments[row, place]
            hit, column = (searched >= threshold[row, None]).nonzero().unbind(1)
            reference = place[hit].mul_(segment).add_(column).add_(first_reference)
            self._collect(row[hit].add_(start), reference, searched[hit, column])
            hits += len(hit)
        return hits

    def _collect(self, row: Tensor, reference: Tensor, similarity: Tensor) -> None:
        """Count hits at once if they are many; collect them first if they are few."""
        if len(row) >= _BATCH:
            self._count(row, reference, similarity)
            return
        self._pending.append((row, reference, similarity))
        self._waiting += row.numel()
        if self._waiting >= _BATCH:
            self._count_pending()

    def _count_pending(self) -> None:
        if self._pending:
            row, reference, similarity = (torch.cat(column) for column in zip(*self._pending, strict=True))
            self._pending.clear()
            self._waiting = 0
            self._count(row, reference, similarity)

    def _count(self, row: Tensor, reference: Tensor, similarity: Tensor) -> None:
        beaten_from, is_close = self._beaten(row, similarity, self._rounding)
        close = is_close.nonzero().squeeze(1)
        if len(close) and self._rounding != self._float32:
            similarity = self._recomputed(row[close], reference[close], exact=False)
            beaten_from[close], still_close = self._beaten(row[close], similarity, self._float32)
            close = close[still_close.nonzero().squeeze(1)]
        if len(close):
            similarity = self._recomputed(row[close], reference[close], exact=True)
            beaten_from[close] = self._positives_above(row[close], similarity + TIE)
        cell = row * (self.width + 1) + beaten_from
        self.counts.view(-1).index_add_(0, cell, self.counts.new_ones(()).expand(len(cell)))
        self._update_threshold(row.unique())

    def _beaten(self, row: Tensor, similarity: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
        """Return the number of positives above each hit, and which hits are too close to a positive to decide."""
        similarity = similarity.double()
        error = rounding.bound(similarity)
        beaten_from = self._positives_above(row, similarity - error)
        nearest = self.positives.take(row * self.width + (beaten_from - 1).clamp_min(0))
        return beaten_from, (beaten_from > 0) & (nearest <= similarity + error)

    def _recomputed(self, row: Tensor, reference: Tensor, *, exact: bool) -> Tensor:
        return pair_similarities(self.queries, row + self.rows.start, self.gallery, reference, exact=exact)

    def _positives_above(self, row: Tensor, value: Tensor) -> Tensor:
        """Return the number of a row's positives above the value, by binary search over 2^m - 1 entries."""
        found = torch.zeros_like(row)
        base = row * self.width - 1
        step = (self.width + 1) // 2
        while step:
            higher = self.positives.take(base + found + step) > value
            found += higher * step
            step //= 2
        return found

    def _ranks(self, row: Tensor | slice) -> Tensor:
        """Return the 1-based rank of each positive: its place among the positives plus the negatives at or above it."""
        return self.counts[row, : self.width].cumsum(1) + self._places

    def _update_threshold(self, row: Tensor) -> None:
        relevant = self.relevant[row, None]
        if self.every_positive:
            alive = self._places <= relevant
        else:
            rank = self._ranks(row)
            alive = rank <= relevant
            alive[:, 0] |= (rank[:, 0] <= self.depth) & (relevant[:, 0] > 0)
        last = alive.sum(1)  # those that count are a prefix: rank grows with place
        lowest = self.positives.take(row * self.width + (last - 1).clamp_min(0))
        self.threshold[row] = torch.where(last > 0, lowest, _NO_THRESHOLD).float()

    def statistics(self) -> RankStatistics:
        """Return the ranks and scores of each query of `rows`."""
        self._count_pending()
        parts = row_slices(len(self.positives), max(1, FLOAT64_BUDGET // self.width))
        return concatenated([self._statistics(part) for part in parts])

    def _statistics(self, rows: slice) -> RankStatistics:
        rank = self._ranks(rows)
        relevant = self.relevant[rows]
        precision = self._places / rank.double()
        within = rank <= relevant[:, None]
        valid = self._places <= relevant[:, None]
        return RankStatistics(
            relevant,
            rank[:, 0].clamp_max(self.depth + 1),
            within.sum(1) / relevant.double(),
            (precision * within).sum(1) / relevant,
            (precision * valid).sum(1) / relevant,
        )


def concatenated(parts: Sequence[RankStatistics]) -> RankStatistics:
    """Return the statistics of runs of queries, end to end."""
    return RankStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _segment_maxima(tile: Tensor, segment: int) -> Tensor:
    """Return maxima of runs of columns, `(queries, runs)`. A transposed tile is reduced as it lies, 6 times faster."""
    if tile.stride(1) == 1:
        return tile.unflatten(1, (-1, segment)).amax(2)
    return tile.T.unflatten(0, (-1, segment)).amax(1).T
