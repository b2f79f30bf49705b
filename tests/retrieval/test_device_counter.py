"""Counting as on a GPU, with shapes known beforehand: ranks as on a CPU, and no waits within a strip of tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gpu import Count
from support.retrieval import KINDS, assert_equal, draw_sets, embeddings_of, oracle_ranks
from torch import Tensor

from lightning_memdml.retrieval import QueryRanks, counting, device_counter, rank_queries
from lightning_memdml.retrieval.class_sorted import ClassSortedEmbeddings
from lightning_memdml.retrieval.device_counter import DeviceRankCounter
from lightning_memdml.retrieval.similarity_tiles import SimilarityTiles
from lightning_memdml.retrieval.tiles import row_slices


def ranks(on_device: bool, *args: Tensor, most_hits: int = 2**18, **kwargs: Any) -> QueryRanks:
    with pytest.MonkeyPatch.context() as patch:
        if on_device:
            patch.setattr(counting, "RankCounter", None)  # only its subclass is to be made
            patch.setattr(counting, "ASYNCHRONOUS_DEVICES", {"cpu"})
            patch.setattr(device_counter, "_MOST_HITS", most_hits)
        return rank_queries(*args, mean_average_precision=True, **kwargs)


@pytest.mark.parametrize("most_hits", [2**18, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_equal_float64(kind: str, most_hits: int) -> None:
    embeddings, labels = embeddings_of(kind, 90, 24), torch.arange(90) // 3
    found = ranks(True, embeddings, labels, depth=50, tile_size=32, most_hits=most_hits)
    best, precision = oracle_ranks(embeddings, labels, depth=50)
    assert torch.equal(found.best_rank, best)
    torch.testing.assert_close(found.average_precision_at_r, precision, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ranks_equal_those_of_the_host(data: st.DataObject) -> None:
    arguments, options = draw_sets(data)
    most_hits = data.draw(st.sampled_from([1, 7, 2**18]))
    assert_equal(ranks(True, *arguments, most_hits=most_hits, **options), ranks(False, *arguments, **options))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_counts_the_ranks_of_the_cpu(kind: str) -> None:
    embeddings, labels = embeddings_of(kind, 2000, 64), torch.arange(2000) // 5
    on_gpu = rank_queries(embeddings.cuda(), labels.cuda(), mean_average_precision=True, tile_size=256)
    on_host = ranks(False, embeddings, labels)
    for name in ("relevant", "best_rank", "r_precision", "average_precision_at_r", "average_precision"):
        torch.testing.assert_close(getattr(on_gpu, name).cpu(), getattr(on_host, name), rtol=0, atol=1e-12)


def counter_and_tiles(kind: str, count: int) -> tuple[DeviceRankCounter, SimilarityTiles]:
    samples = ClassSortedEmbeddings(embeddings_of(kind, count, 16), torch.arange(count) // 12)
    return DeviceRankCounter(samples, samples, slice(0, count), depth=5), SimilarityTiles(samples, samples, count**2)


@pytest.mark.parametrize("size", [120, 10])
def test_the_host_waits_for_a_strip_but_not_for_a_tile(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counter, similarities = counter_and_tiles("spread", 240)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: read.append(len(tensor)) or [True] * len(tensor))
    read: list[int] = []
    strip = list(row_slices(240, size))
    with Count() as counted:
        counter.count_strip(similarities, strip[0], strip, both_ways=True)
    assert read == [len(strip)]
    assert counted.waits == 0
    groups = -(-len(strip) // 4)
    assert counted.launches <= 24 * len(strip) + 150 * groups + 1  # about 60 for each of many tiles


@pytest.mark.parametrize("kind", ["collapsed", "copies"])
def test_tiles_with_too_many_hits_are_counted_as_on_a_cpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counter, similarities = counter_and_tiles(kind, 240)
    strip = list(row_slices(240, 60))
    monkeypatch.setattr(device_counter, "_MOST_HITS", 100)
    tried = []
    count_group = DeviceRankCounter._count_group
    monkeypatch.setattr(
        DeviceRankCounter, "_count_group", lambda *args: tried.append(args[2].start) or count_group(*args)
    )
    for rows in strip:
        assert all(hits > 100 for hits in counter.count_strip(similarities, rows, strip, both_ways=False))
    assert tried == [0]  # after a strip without success the next ones are not tried
