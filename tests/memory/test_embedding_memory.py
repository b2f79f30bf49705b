"""EmbeddingMemory against a deque of rows, at its edges, and across a state dict."""

from __future__ import annotations

import copy
import io
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import normalize

from lightning_memdml.memory.embedding_memory import EmbeddingMemory
from lightning_memdml.memory.shared_rows import SharedRowCounts

DIM = 5
LARGEST = 2**63 - 1

sizes = st.integers(1, 23)
batches = st.lists(st.integers(0, 30), max_size=14)


def make_batch(rows: int, seed: int, dim: int = DIM) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-3, 4, (rows,), generator=generator)
    return torch.randn(rows, dim, generator=generator), labels, seed * 1000 + torch.arange(rows)


def filled(size: int, batch_sizes: list[int], dtype: torch.dtype = torch.float32) -> EmbeddingMemory:
    memory = EmbeddingMemory(size, dtype)
    for seed, rows in enumerate(batch_sizes):
        memory.enqueue(*make_batch(rows, seed))
    return memory


def assert_same_rows(memory: EmbeddingMemory, other: EmbeddingMemory) -> None:
    for ours, theirs in zip(memory.read(), other.read(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(memory.steps, other.steps)


@given(size=sizes, batch_sizes=batches)
@settings(max_examples=60, deadline=None)
def test_memory_holds_the_newest_rows_oldest_first(size: int, batch_sizes: list[int]) -> None:
    memory, rows = EmbeddingMemory(size), deque(maxlen=size)
    for step, count in enumerate(batch_sizes):
        embeddings, labels, indices = make_batch(count, step)
        memory.enqueue(embeddings, labels, indices)
        rows.extend((z / z.double().norm(), y, i, step) for z, y, i in zip(embeddings, labels, indices, strict=True))
        read_embeddings, read_labels, read_indices = memory.read()
        assert len(memory) == len(rows) == len(read_embeddings)
        assert read_labels.tolist() == [int(row[1]) for row in rows]
        assert read_indices.tolist() == [int(row[2]) for row in rows]
        assert memory.steps.tolist() == [row[3] for row in rows]
        if rows:
            torch.testing.assert_close(read_embeddings.double(), torch.stack([row[0] for row in rows]).double())


@given(size=sizes, before=batches, after=batches)
@settings(max_examples=40, deadline=None)
def test_a_restored_memory_goes_on_as_if_never_stopped(size: int, before: list[int], after: list[int]) -> None:
    memory = filled(size, before)
    restored = EmbeddingMemory(size)
    restored.load_state_dict(memory.state_dict())
    assert_same_rows(memory, restored)
    for step, count in enumerate(after, start=len(before)):
        memory.enqueue(*make_batch(count, step))
        restored.enqueue(*make_batch(count, step))
        assert_same_rows(memory, restored)
        # The same place in the buffer: alignment decides the last bit of a matrix product.
        assert memory.read()[0].storage_offset() == restored.read()[0].storage_offset()
    assert restored.batches == memory.batches == len(before) + len(after)


def test_rows_are_stored_bit_equal_to_normalize_and_without_gradient() -> None:
    memory = EmbeddingMemory(8)
    embeddings = torch.randn(4, DIM, requires_grad=True)
    memory.enqueue(3 * embeddings, torch.arange(4))
    stored = memory.read()[0]
    assert torch.equal(stored, normalize(3 * embeddings.detach()))
    assert not stored.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision_is_normalised_and_stored_in_float32(dtype: torch.dtype) -> None:
    memory = EmbeddingMemory(8)
    embeddings = torch.randn(4, 64).to(dtype)
    memory.enqueue(embeddings, torch.arange(4))
    stored = memory.read()[0]
    assert stored.dtype is torch.float32
    assert torch.equal(stored, normalize(embeddings.float()))


def test_float16_storage_is_the_rounded_float32_row() -> None:
    embeddings = torch.randn(4, 64)
    memory = EmbeddingMemory(4, dtype=torch.float16)
    memory.enqueue(embeddings, torch.arange(4))
    assert torch.equal(memory.read()[0], normalize(embeddings).half())
    assert memory.nbytes == (4 + 1) * (64 * 2 + 24)


def test_before_the_first_rows_read_gives_zero_rows() -> None:
    memory = EmbeddingMemory(4)
    embeddings, labels, indices = memory.read()
    assert (embeddings.shape, labels.shape, indices.shape) == ((0, 0), (0,), (0,))
    assert (labels.dtype, indices.dtype, len(memory)) == (torch.int64, torch.int64, 0)


def test_reset_forgets_rows_counters_and_dimension() -> None:
    memory = filled(4, [3, 3])
    memory.enqueue(torch.full((1, DIM), torch.nan), torch.tensor([0]))
    memory.reset()
    assert (len(memory), memory.batches, memory.dropped, memory.dim) == (0, 0, 0, 0)
    memory.enqueue(torch.ones(1, DIM + 1), torch.tensor([0]))
    assert memory.read()[0].shape == (1, DIM + 1)


def test_read_is_a_contiguous_view_without_copy_also_after_the_wrap() -> None:
    memory = EmbeddingMemory(8)
    buffers = set()
    for step in range(20):
        memory.enqueue(*make_batch(3, step))
        first, second = memory.read(), memory.read()
        assert all(tensor.is_contiguous() for tensor in first)
        assert [a.data_ptr() for a in first] == [b.data_ptr() for b in second]
        buffers.add(tuple(tensor.untyped_storage().data_ptr() for tensor in first))
    assert len(buffers) == 1


@pytest.mark.parametrize("labels", [[0, 0, 0], [LARGEST, LARGEST - 1, -LARGEST - 1], [0, -1, 1]])
def test_every_int64_is_a_label(labels: list[int]) -> None:
    memory = EmbeddingMemory(3)
    memory.enqueue(torch.randn(3, DIM), torch.tensor(labels))
    restored = EmbeddingMemory(3)
    restored.load_state_dict(memory.state_dict())
    assert memory.read()[1].tolist() == restored.read()[1].tolist() == labels


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_narrow_labels_do_not_narrow_the_memory(dtype: torch.dtype) -> None:
    memory = EmbeddingMemory(4)
    memory.enqueue(torch.randn(2, DIM), torch.tensor([LARGEST, 7]))
    memory.enqueue(torch.randn(1, DIM), torch.tensor([200 if dtype is torch.uint8 else -5], dtype=dtype))
    assert memory.read()[1].tolist() == [LARGEST, 7, 200 if dtype is torch.uint8 else -5]


def test_unknown_indices_are_stored_as_minus_one() -> None:
    memory = EmbeddingMemory(4)
    memory.enqueue(torch.randn(2, DIM), torch.tensor([0, 1]), torch.tensor([7, 8]))
    memory.enqueue(torch.randn(1, DIM), torch.tensor([0]))
    assert memory.read()[2].tolist() == [7, 8, -1]


def test_a_given_step_is_noted() -> None:
    memory = EmbeddingMemory(3)
    for step in (10, 10, 12):
        memory.enqueue(*make_batch(2, step), step=step)
    assert memory.steps.tolist() == [10, 12, 12]


@pytest.mark.parametrize("length", [1e-45, 1e-38, 1e-30, 1e-13, 1e-12, 1e18, 1e20, 1e30, 1e38])
def test_rows_of_any_length_have_the_right_similarities(length: float) -> None:
    """The square of most of these is outside of float32: F.normalize would make short rows or zeros of them."""
    directions = torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0], [0.0, -1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0, -1.0]])
    memory = EmbeddingMemory(8)
    assert memory.enqueue(directions * length, torch.arange(3)) == 0
    torch.testing.assert_close(
        memory.read()[0].double(), normalize(directions.double()), rtol=1e-6, atol=1e-6, check_dtype=False
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_without_a_direction_are_dropped_and_counted(bad: float) -> None:
    memory = EmbeddingMemory(8)
    embeddings, labels, indices = make_batch(4, seed=0)
    embeddings[1, 2] = bad
    embeddings[3] = 0
    assert memory.enqueue(embeddings, labels, indices) == 2
    assert memory.read()[2].tolist() == [0, 2]
    assert torch.equal(memory.read()[0], normalize(embeddings[[0, 2]]))
    assert memory.enqueue(torch.full((3, DIM), torch.nan), torch.zeros(3, dtype=torch.int64)) == 3
    assert (len(memory), memory.dropped) == (2, 5)
    assert memory.state_dict()["dropped"] == 5


@pytest.mark.parametrize(
    ("embeddings", "labels", "indices", "error", "message"),
    [
        (
            torch.ones(4, 2),
            torch.ones(4, 1).long(),
            None,
            ValueError,
            r"\(4,\) but got \(4, 1\)\. Pass `labels.squeeze",
        ),
        (
            torch.ones(4, 2),
            torch.ones(3).long(),
            None,
            ValueError,
            r"`labels` of shape \(4,\) but got \(3,\)",
        ),
        (
            torch.ones(4, 2),
            torch.ones(4),
            None,
            TypeError,
            r"integer dtype but got torch.float32\. Pass `labels.long",
        ),
        (torch.ones(4, 2), torch.ones(4).bool(), None, TypeError, "integer dtype but got torch.bool"),
        (torch.ones(4, 2), [1, 2, 3, 4], None, TypeError, "Pass `torch.as_tensor"),
        (torch.ones(4, 2), torch.ones(4).long(), torch.ones(4), TypeError, "`indices` of an integer dtype"),
        (torch.ones(4, 2), torch.ones(4).long(), torch.ones(2).long(), ValueError, "`indices` of shape"),
        (torch.ones(4), torch.ones(4).long(), None, ValueError, r"`embeddings` of shape \(B, D\)"),
        (torch.ones(4, 2, 2), torch.ones(4).long(), None, ValueError, "flatten"),
        (torch.ones(4, 0), torch.ones(4).long(), None, ValueError, "with D of at least 1 but got"),
        (
            torch.ones(4, 2).long(),
            torch.ones(4).long(),
            None,
            TypeError,
            "floating-point dtype but got torch.int64",
        ),
        ([[1.0]], torch.ones(1).long(), None, TypeError, "`embeddings` to be a tensor"),
    ],
)
def test_a_wrong_batch_is_refused_and_changes_nothing(embeddings, labels, indices, error, message) -> None:
    memory = filled(4, [2])
    before = memory.state_dict()
    with pytest.raises(error, match=message):
        memory.enqueue(embeddings, labels, indices)
    assert all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(before.values(), memory.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("size", "dtype", "error"),
    [
        (0, torch.float32, ValueError),
        (1.5, torch.float32, TypeError),
        (True, torch.float32, TypeError),
        (4, torch.int8, TypeError),
        (4, "float32", TypeError),
    ],
)
def test_a_memory_of_nothing_is_refused(size: int, dtype: torch.dtype, error: type[Exception]) -> None:
    with pytest.raises(error, match="Expected"):
        EmbeddingMemory(size, dtype)


def test_another_dimension_is_refused_with_the_way_out() -> None:
    memory = EmbeddingMemory(4)
    memory.load_state_dict(filled(4, [3]).state_dict())
    with pytest.raises(ValueError, match=r"holds embeddings of D=5, but the batch has D=6.*checkpoint"):
        memory.enqueue(torch.ones(1, 6), torch.tensor([0]))


@pytest.mark.parametrize("size", [1, 4, 9, 40])
def test_a_state_of_another_size_leaves_its_newest_rows(size: int) -> None:
    full = filled(9, [4, 4, 4])
    memory = EmbeddingMemory(size)
    memory.load_state_dict(full.state_dict())
    for ours, theirs in zip(memory.read(), full.read(), strict=True):
        assert torch.equal(ours, theirs[-size:])
    memory.enqueue(*make_batch(2, 9))
    assert len(memory) == min(size, 11)


def test_loading_an_empty_state_empties_a_filled_memory() -> None:
    memory = filled(4, [3])
    memory.load_state_dict(EmbeddingMemory(4).state_dict())
    assert (len(memory), memory.batches) == (0, 0)


def test_a_state_is_small_safe_to_load_and_a_copy() -> None:
    memory = filled(1000, [3])
    state = memory.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    assert file.tell() < 8_000
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    memory.enqueue(torch.ones(1000, DIM), torch.zeros(1000, dtype=torch.int64))
    assert torch.equal(state["embeddings"], loaded["embeddings"])
    assert loaded["embeddings"].shape == (3, DIM)
    assert EmbeddingMemory(3).state_dict(), "a falsy state is not saved by Lightning"


def test_a_damaged_state_is_refused_and_changes_nothing() -> None:
    memory = filled(4, [3])
    state = memory.state_dict()
    with pytest.raises(ValueError, match="labels is missing"):
        memory.load_state_dict({name: value for name, value in state.items() if name != "labels"})
    damaged: dict[str, Any] = {
        "labels": state["labels"][:2],
        "embeddings": state["embeddings"].index_fill(0, torch.tensor([1]), torch.nan),
        "indices": state["indices"].float(),
        "steps": [0, 0, 0],
        "offset": -1,
        "batches": 1.5,
        "dropped": torch.tensor(3),
    }
    for name, value in damaged.items():
        with pytest.raises(ValueError, match=r"^Expected .*state of an EmbeddingMemory.*The checkpoint is damaged"):
            memory.load_state_dict({**state, name: value})
    assert_same_rows(memory, filled(4, [3]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_do_not_enter_from_a_checkpoint(value: float) -> None:
    state = filled(4, [3]).state_dict()
    state["embeddings"][1, 2] = value
    with pytest.raises(
        ValueError,
        match="Expected finite embeddings in the state of an EmbeddingMemory in the checkpoint but 1 of 3 rows",
    ):
        EmbeddingMemory(4).load_state_dict(state)


def test_a_deep_copy_shares_the_memory() -> None:
    holder = torch.nn.Linear(2, 2)
    holder.memory = filled(4, [3])
    assert copy.deepcopy(holder).memory is holder.memory


def test_writing_between_forward_and_backward_is_an_error_not_a_wrong_gradient() -> None:
    memory = filled(8, [3, 3])
    anchors = torch.randn(2, DIM, requires_grad=True)
    similarity = (anchors @ memory.read()[0].T).sum()
    memory.enqueue(*make_batch(3, 7))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        similarity.backward()


def test_rows_enqueued_in_inference_mode_can_be_trained_against() -> None:
    memory = EmbeddingMemory(4)
    with torch.inference_mode():
        memory.enqueue(*make_batch(3, 0))
    anchors = torch.randn(2, DIM, requires_grad=True)
    (anchors @ memory.read()[0].T).sum().backward()
    torch.testing.assert_close(anchors.grad[0], memory.read()[0].sum(0))


@pytest.mark.parametrize("dynamic", [None, False])
def test_a_compiled_step_compiles_once_for_an_empty_and_once_for_a_filling_memory(
    dynamic: bool | None,
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    memory = EmbeddingMemory(20)

    def loss(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ref_z, ref_y, _ = memory.read()
        if len(ref_y) == 0:
            return z[:0].sum()
        similarity = z @ ref_z.T
        return torch.where(y[:, None] == ref_y, 1 - similarity, similarity.clamp_min(0)).sum(1).mean()

    compiled = torch.compile(loss, backend=counter, dynamic=dynamic)
    for step in range(15):
        embeddings, labels, _ = make_batch(4, step)
        ours = embeddings.clone().requires_grad_()
        theirs = embeddings.clone().requires_grad_()
        compiled(ours, labels).backward()
        loss(theirs, labels).backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
        memory.enqueue(embeddings, labels)
    assert len(memory) == 20
    assert counter.frame_count <= 2


@given(labels=st.lists(st.integers(0, 9), min_size=1, max_size=40), anchors=st.integers(1, 8), data=st.data())
def test_the_bound_of_shared_rows_holds_for_any_batch(labels, anchors, data):
    """What a loss on a GPU takes instead of counting: never below the rows that share a class or an image with it."""
    memory = EmbeddingMemory(30)
    rows = torch.tensor(labels)
    memory.enqueue(torch.ones(len(rows), 2), rows, torch.arange(len(rows)) % 7 - 1)
    assert memory.read().max_shared(1) is None  # on a CPU nothing waits
    counts = SharedRowCounts(30)
    counts.update(np.stack([column.numpy() for column in memory.read()[1:]]))
    read = memory.read()
    read.bounds = counts.bounds()
    batch = torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=anchors, max_size=anchors)))
    images = torch.tensor(data.draw(st.lists(st.integers(-1, 6), min_size=anchors, max_size=anchors)))
    _, stored, indices = read
    shared = torch.isin(stored, batch) | (torch.isin(indices, images) & (indices >= 0))
    assert shared.sum() <= read.max_shared(anchors)
    assert read.bounds == tuple(sorted(read.bounds))
