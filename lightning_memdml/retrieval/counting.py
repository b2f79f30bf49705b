"""Counts the ranks of all queries, tile by tile: once for both directions in self-retrieval, else block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from lightning_memdml.retrieval.class_sorted import ClassSortedEmbeddings, largest_class, padded_width
from lightning_memdml.retrieval.device_counter import ASYNCHRONOUS_DEVICES, DeviceRankCounter
from lightning_memdml.retrieval.rank_counter import RankCounter, RankStatistics, concatenated
from lightning_memdml.retrieval.similarity_tiles import SimilarityTiles
from lightning_memdml.retrieval.tiles import full_precision_products, ramped_tiles, row_slices

Progress = Callable[[int, int], None]

_STATE_BUDGET = 2**23  # (query, positive) entries of one counter, 12 bytes each


def count_ranks(
    queries: ClassSortedEmbeddings,
    gallery: ClassSortedEmbeddings,
    *,
    depth: int,
    every_positive: bool = False,
    tile_size: int | None = None,
    progress: Progress | None = None,
) -> RankStatistics:
    """Count the ranks of all queries, in sorted order.

    Self-retrieval (one object given twice) computes each tile once and counts it in both directions. So it costs half
    a matrix product, and a quarter where tiles can be computed in bfloat16 (see `SimilarityTiles`). Between two sets,
    and where classes are so large that the state of all queries would exceed the memory bound, queries are handled
    block by block.
    """
    size = tile_size or _default_tile_size(queries.unit.device)
    width = padded_width(largest_class(queries, gallery))
    with full_precision_products(queries.unit.device):
        if queries is gallery and len(queries) * width <= _STATE_BUDGET:
            return _count_symmetric(queries, size, depth, every_positive, progress).statistics()
        block = max(1, min(size, _STATE_BUDGET // 4 // width))
        counters = _count_blocks(queries, gallery, block, size, depth, every_positive, progress)
        return concatenated([counter.statistics() for counter in counters])


def _default_tile_size(device: torch.device) -> int:
    """Return the side of a tile: 64 MB on a GPU, on a CPU 4 MB for one thread, which its cache holds, else 16 MB.

    The few hits of a small tile are too little work for two threads: with 1024 the work of the main thread is 0.95 of
    that with one thread, with 2048 it is 0.78.
    """
    if device.type == "cuda":
        return 4096
    return 1024 if torch.get_num_threads() == 1 else 2048


def _counter_for(queries: ClassSortedEmbeddings) -> type[RankCounter]:
    return DeviceRankCounter if queries.unit.device.type in ASYNCHRONOUS_DEVICES else RankCounter


def _count_symmetric(
    samples: ClassSortedEmbeddings, size: int, depth: int, every_positive: bool, progress: Progress | None
) -> RankCounter:
    every_row = slice(0, len(samples))
    counter = _counter_for(samples)(samples, samples, every_row, depth=depth, every_positive=every_positive)
    similarities = SimilarityTiles(samples, samples, min(size, len(samples)) ** 2)
    tiles = list(ramped_tiles(len(samples), size))
    sizes = [(rows.stop - rows.start) * (len(samples) - rows.start) for rows in tiles]
    for position, rows in enumerate(tiles):
        counter.count_strip(similarities, rows, tiles[position:], both_ways=True)
        if progress is not None:
            progress(sum(sizes[: position + 1]), sum(sizes))
    return counter


def _count_blocks(
    queries: ClassSortedEmbeddings,
    gallery: ClassSortedEmbeddings,
    block: int,
    size: int,
    depth: int,
    every_positive: bool,
    progress: Progress | None,
) -> Iterator[RankCounter]:
    similarities = SimilarityTiles(queries, gallery, min(block, len(queries)) * min(size, len(gallery)))
    tiles = list(ramped_tiles(len(gallery), size))
    for rows in row_slices(len(queries), block):
        counter = _counter_for(queries)(queries, gallery, rows, depth=depth, every_positive=every_positive)
        similarities.use_bfloat16 = False  # all positives of new queries still count, which makes many hits
        counter.count_strip(similarities, rows, tiles, both_ways=False)
        if progress is not None:
            progress(rows.stop * len(gallery), len(queries) * len(gallery))
        yield counter
