"""The bound of the rows that share a class or an image with a batch: sound, cheap, and the same for all ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gpu import Count, like_a_gpu
from torch import Tensor
from torch.nn.functional import normalize

import lightning_memdml as ml
from lightning_memdml.losses import streaming
from lightning_memdml.losses.definition import Pairs
from lightning_memdml.memory.shared_rows import SharedRowCounts

ids = st.tuples(st.integers(-3, 9), st.integers(-1, 20))


def worst(rows: list[tuple[int, int]], anchors: int) -> int:
    """The largest classes and the images with most rows, counted anew."""
    labels, images = Counter(label for label, _ in rows), Counter(image for _, image in rows if image >= 0)
    most = sum(n for _, n in labels.most_common(anchors)) + sum(n for _, n in images.most_common(anchors))
    return min(most, len(rows))


@given(batches=st.lists(st.lists(ids, max_size=20), max_size=8), size=st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_counts_kept_up_are_counts_made_anew(batches: list[list[tuple[int, int]]], size: int) -> None:
    counts, rows = SharedRowCounts(size), []
    for batch in batches:
        rows += batch
        gone, rows = rows[: max(0, len(rows) - size)], rows[-size:]
        counts.update(*(np.array(part, dtype=np.int64).reshape(-1, 2).T for part in (batch, gone)))
        bounds = counts.bounds()
        assert bounds == tuple(1 << max(0, worst(rows, 2**k) - 1).bit_length() for k in range(len(bounds)))
        assert bounds[-1] >= len(rows)


def batch(number: int, rows: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    embeddings = torch.randn(rows, 4, generator=generator)
    embeddings[0] *= float("nan") if number % 2 else 1.0
    indices = torch.randint(0, 60, (rows,), generator=generator)
    return embeddings, indices // 5, indices


MEMORIES = {"FIFO": lambda: ml.EmbeddingMemory(50), "instance": lambda: ml.InstanceMemory(60),
            "sharded": lambda: ml.ShardedMemory(50)}  # fmt: skip


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_gpu_is_waited_for_once_when_rows_are_stored_and_never_when_they_are_read(kind: str) -> None:
    with like_a_gpu() as copies:
        memory = MEMORIES[kind]()
        memory.enqueue(*batch(0))  # which allocates
        for number in range(1, 20):
            copies.clear()
            with Count() as count:
                memory.enqueue(*batch(number))
            assert (count.waits, copies) == (0, ["(3, 12)"]), "labels, indices, and which rows have a direction"
        copies.clear()
        table = getattr(memory, "share", memory)._table
        with Count() as count:
            rows = memory.read()
        assert rows.embeddings.untyped_storage().data_ptr() == table.embeddings.untyped_storage().data_ptr()
        assert (count.waits, count.launches, copies) == (0, 0, [])


@pytest.mark.parametrize("kind", ["FIFO", "instance"])
def test_a_memory_with_the_batch_in_it_is_read_without_a_copy(kind: str) -> None:
    """Only as many bytes move as the batch has; the largest batch that fits is a quarter of the FIFO."""
    with like_a_gpu() as copies:
        memory = MEMORIES[kind]()
        for number in range(20):
            z, y, i = batch(2 * number)
            if number > 8:
                copies.clear()
                with Count() as count:
                    rows = memory.read_with(normalize(z), y, i)
                table = memory._table.embeddings.untyped_storage()
                assert rows.embeddings.untyped_storage().data_ptr() == table.data_ptr()
                assert count.waits == 0
                assert len(copies) <= (kind == "instance")
                shared = torch.isin(rows.labels, y) | torch.isin(rows.indices, i)
                assert shared.sum() <= rows.max_shared(len(y))
                seen = [tensor.clone() for tensor in rows]
            memory.enqueue(z, y, i)
            if number > 8:
                for ours, theirs in zip(seen, memory.read(), strict=True):
                    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", MEMORIES)
def test_the_bound_holds_after_every_batch_and_after_a_checkpoint(kind: str) -> None:
    with like_a_gpu():
        memory = MEMORIES[kind]()
        for number in range(20):
            memory.enqueue(*batch(number))
            if number == 10:
                state, memory = memory.state_dict(), MEMORIES[kind]()
                memory.load_state_dict(state)
            rows = getattr(memory, "share", memory).read()
            given = list(zip(rows.labels.tolist(), rows.indices.tolist(), strict=True))
            for anchors in (1, 2, 5, 100):
                assert worst(given, anchors) <= rows.max_shared(anchors) <= 2 * worst(given, 2 * anchors)


def sop_like(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, rows // 8, rows)


def long_tailed(rows: int) -> np.ndarray:
    """8,142 classes, the largest of 1,000 times as many images as the smallest, as in iNaturalist 2018."""
    sizes = 1000.0 ** -np.linspace(0, 1, 8142)
    return np.random.default_rng(0).choice(8142, rows, p=sizes / sizes.sum())


@pytest.mark.parametrize(("classes", "rows", "passes"), [(sop_like, 1 << 20, 1), (long_tailed, 325_000, 2)])
def test_passes_and_arithmetic_do_not_grow_with_the_ranks(
    classes: Any, rows: int, passes: int, fake_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per rank, with 512 anchors each, whose rows all enter the same memory."""
    labels = classes(rows)
    entering = np.stack([labels, np.arange(rows)])
    done, add = [], streaming.add_negatives
    monkeypatch.setattr(streaming, "add_negatives", lambda *args: (called.append(1), add(*args)))
    for world in (1, 8, 64, 512):
        counts = SharedRowCounts(rows)
        for start in range(0, rows, 512 * world):
            counts.update(entering[:, start : start + 512 * world])
        called: list[int] = []
        with fake_gpu, Count() as count:
            x, r = (torch.empty(n, 128, device="cuda") for n in (512, rows))
            y, ry = (torch.empty(n, dtype=torch.int64, device="cuda") for n in (512, rows))
            streaming.evaluate(ml.ContrastiveLoss(), Pairs(x, y, r, ry, y, ry, max_shared=counts.bounds()))
        done.append((len(called), count.multiplications))
    assert [number for number, _ in done] == [passes] * 4
    assert all(products <= 1.1 * done[0][1] for _, products in done)
