"""Tiles in bfloat16: their error bound, and ranks equal to those of float32 tiles and of a float64 oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.retrieval import KINDS, assert_equal, draw_sets, embeddings_of, oracle_ranks
from torch import Tensor

from lightning_memdml import bfloat16, compat
from lightning_memdml.retrieval import QueryRanks, rank_queries, similarity_tiles
from lightning_memdml.retrieval.class_sorted import ClassSortedEmbeddings
from lightning_memdml.retrieval.similarity_tiles import SimilarityTiles, bfloat16_rounding


def use_bfloat16(patch: pytest.MonkeyPatch, use: bool) -> None:
    """Compute every tile but the first in bfloat16, on any processor and however little it pays; or none."""
    patch.setattr(bfloat16, "has_fast_bf16_matmul", lambda device: use)
    patch.setattr(bfloat16, "SMALLEST_DIM", 1)
    patch.setattr(similarity_tiles, "_HIT_SHARE", 1.0)


def ranks(use: bool, *args: Tensor, depth: int = 20, tile_size: int = 8, **kwargs: Tensor) -> QueryRanks:
    with pytest.MonkeyPatch.context() as patch:
        use_bfloat16(patch, use)
        return rank_queries(*args, depth=depth, mean_average_precision=True, tile_size=tile_size, **kwargs)


@pytest.mark.parametrize("dim", [1, 3, 64, 1500])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_from_bfloat16_tiles_equal_float64(kind: str, dim: int) -> None:
    embeddings, labels = embeddings_of(kind, 90, dim), torch.arange(90) // 3
    found = ranks(True, embeddings, labels, depth=50, tile_size=32)
    best, precision = oracle_ranks(embeddings, labels, depth=50)
    assert torch.equal(found.best_rank, best)
    torch.testing.assert_close(found.average_precision_at_r, precision, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bfloat16_tiles_change_no_rank(data: st.DataObject) -> None:
    arguments, options = draw_sets(data)
    assert_equal(ranks(True, *arguments, **options), ranks(False, *arguments, **options))


@pytest.mark.parametrize("dim", [1, 64, 700, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_tiles_keep_to_their_bound(kind: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_bfloat16(monkeypatch, True)
    samples = ClassSortedEmbeddings(embeddings_of(kind, 120, dim), torch.arange(120))
    exact = samples.exact(slice(0, 120)) @ samples.exact(slice(0, 120)).T
    tiles = SimilarityTiles(samples, samples, 120 * 120)
    tiles.choose(hits=0, pairs=1)
    for rows in (slice(0, 120), slice(5, 6), slice(0, 2)):
        tile, rounding = tiles.compute(rows, slice(0, 120))
        assert rounding == bfloat16_rounding(samples, samples)
        distinct = torch.isfinite(tile)
        error = (tile - exact[rows]).abs()
        assert (error <= rounding.bound(tile.double()))[distinct].all()
        assert (error <= rounding.bound(exact[rows]))[distinct].all()
    assert rounding.absolute < 2.1 * 2.0**-8 + 4 * dim * 2.0**-24


def test_bfloat16_is_taken_only_while_hits_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "has_fast_bf16_matmul", lambda device: True)
    precisions = []
    compute = SimilarityTiles.compute

    def recorded(self: SimilarityTiles, rows: slice, columns: slice) -> tuple:
        tile, rounding = compute(self, rows, columns)
        precisions.append(rounding.relative > 0)
        return tile, rounding

    monkeypatch.setattr(SimilarityTiles, "compute", recorded)
    labels = torch.arange(600) // 3
    rank_queries(torch.eye(200, 256)[labels] + 0.01 * embeddings_of("spread", 600, 256), labels, tile_size=64)
    assert not precisions[0]
    assert all(precisions[1:])
    precisions.clear()
    rank_queries(embeddings_of("collapsed", 600, 256), labels, tile_size=64)
    assert not any(precisions)


@pytest.mark.parametrize(("fast", "dim"), [(False, 256), (True, 63)])
def test_slow_processors_and_short_rows_compute_every_tile_in_float32(fast, dim, monkeypatch) -> None:
    monkeypatch.setattr(compat, "has_avx512_bf16", lambda: fast)
    samples = ClassSortedEmbeddings(embeddings_of("spread", 20, dim), torch.arange(20))
    tiles = SimilarityTiles(samples, samples, 400)
    tiles.choose(hits=0, pairs=1)
    assert tiles.compute(slice(0, 20), slice(0, 20))[1].relative == 0
