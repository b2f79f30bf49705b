"""RingMemory against EmbeddingMemory: the same rows, in slots that never move."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gpu import Count, like_a_gpu
from torch.nn.functional import normalize

import lightning_memdml as ml
from lightning_memdml.losses import streaming
from lightning_memdml.losses.definition import Pairs

BATCHES = st.lists(st.integers(0, 9), max_size=12)


def batch(rows: int, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(0, 4, (rows,), generator=generator)
    return torch.randn(rows, 5, generator=generator), labels, 100 * number + torch.arange(rows)


def assert_same_rows(ring: ml.RingMemory, memory: ml.EmbeddingMemory) -> None:
    assert len(ring) == len(memory)
    order = ring.read().indices.argsort()
    for ours, theirs in zip((*ring.read(), ring.steps), (*memory.read(), memory.steps), strict=True):
        assert torch.equal(ours[order], theirs)


@given(size=st.integers(1, 20), sizes=BATCHES, others=st.lists(st.integers(0, 9), max_size=3))
@settings(max_examples=40, deadline=None)
def test_it_holds_the_rows_of_an_embedding_memory(size: int, sizes: list[int], others: list[int]) -> None:
    ring, memory = ml.RingMemory(size), ml.EmbeddingMemory(size)
    for number, rows in enumerate(sizes):
        ring.enqueue(*batch(rows, number))
        memory.enqueue(*batch(rows, number))
        assert_same_rows(ring, memory)
    restored = ml.RingMemory(size)
    restored.load_state_dict(ring.state_dict())
    for ours, theirs in zip(restored.read(), ring.read(), strict=True):
        assert torch.equal(ours, theirs), "in the same slots"
    from_other, other = ml.RingMemory(size), ml.EmbeddingMemory(size)
    from_other.load_state_dict(memory.state_dict())
    other.load_state_dict(ring.state_dict())
    for number, rows in enumerate(others, start=50):
        for each in (ring, memory, restored, from_other, other):
            each.enqueue(*batch(rows, number))
    for each in (ring, restored, from_other):
        assert_same_rows(each, memory)
    assert_same_rows(ring, other)


@given(size=st.integers(1, 20), sizes=BATCHES, rows=st.integers(1, 30), with_indices=st.booleans())
@settings(max_examples=40, deadline=None)
def test_it_is_read_with_the_batch_in_it(size: int, sizes: list[int], rows: int, with_indices: bool) -> None:
    ring, memory = ml.RingMemory(size), ml.EmbeddingMemory(size)
    for number, before in enumerate(sizes):
        ring.enqueue(*batch(before, number))
        memory.enqueue(*batch(before, number))
    z, y, i = batch(rows, 99)
    pair = (each.read_with(normalize(z, dim=1), y, i if with_indices else None) for each in (ring, memory))
    for ours, theirs in zip(*pair, strict=True):
        assert torch.equal(ours, theirs)
    assert_same_rows(ring, memory)


@pytest.mark.parametrize("kind", [ml.RingMemory, ml.InstanceMemory])
def test_a_full_memory_has_one_address_and_one_shape_and_the_step_waits_for_nothing(kind: type) -> None:
    """So a CUDA graph of the step can be replayed."""
    with like_a_gpu() as copies:
        memory, seen = kind(20), []
        for number in range(12):
            z, y, _ = batch(6, number)
            i = (7 * number + torch.arange(6)) % 20
            memory.enqueue(z, y, i)
            if len(memory) < 20:
                continue
            copies.clear()
            with Count() as count:
                rows = memory.read()
                pairs = Pairs(normalize(z, dim=1), y, rows.embeddings, rows.labels, i, rows.indices, [20])
                streaming.evaluate(ml.MultiSimilarityLoss(), pairs)
            assert (count.waits, copies) == (0, [])
            seen.append([(tensor.data_ptr(), tensor.shape) for tensor in rows])
        assert len(seen) > 4
        assert all(places == seen[0] for places in seen)


def test_the_bound_holds_as_rows_are_overwritten() -> None:
    with like_a_gpu():
        memory = ml.RingMemory(13)
        for number in range(9):
            memory.enqueue(*batch(5, number))
            rows = memory.read()
            assert rows.max_shared(1) >= torch.bincount(rows.labels).max()
        other = ml.EmbeddingMemory(13)
        other.load_state_dict(memory.state_dict())
        assert rows.bounds == other.read().bounds


def test_its_loss_is_that_of_an_embedding_memory() -> None:
    ring, memory = ml.RingMemory(13), ml.EmbeddingMemory(13)
    for number in range(9):
        for each in (ring, memory):
            each.enqueue(*batch(5, number))
    z, y, _ = batch(5, 50)
    found = [ml.ContrastiveLoss()(normalize(z, dim=1), y, *each.read()[:2]) for each in (ring, memory)]
    torch.testing.assert_close(*found)
