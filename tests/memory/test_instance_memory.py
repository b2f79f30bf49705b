"""InstanceMemory against a dictionary of rows, at its edges, and across a state dict."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from lightning_memdml.memory.embedding_memory import EmbeddingMemory
from lightning_memdml.memory.instance_memory import InstanceMemory

SIZE, DIM = 9, 5
LARGEST = 2**63 - 1

# Batches of image indices: any order, repeated within a batch too, or empty.
visits = st.lists(st.lists(st.integers(0, SIZE - 1), max_size=12), max_size=8)
momenta = st.sampled_from([0.0, 0.3, 0.5, 0.9])


def make_batch(indices: list[int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-3, 4, (len(indices),), generator=generator)
    return torch.randn(len(indices), DIM, generator=generator), labels, torch.tensor(indices, dtype=torch.int64)


def filled(batches: list[list[int]], momentum: float = 0.5, size: int = SIZE) -> InstanceMemory:
    memory = InstanceMemory(size, momentum)
    for seed, indices in enumerate(batches):
        memory.enqueue(*make_batch(indices, seed))
    return memory


def assert_same(memory: InstanceMemory, other: InstanceMemory) -> None:
    for ours, theirs in zip(memory.read(), other.read(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(memory.steps, other.steps)


@given(batches=visits, momentum=momenta)
@settings(max_examples=60, deadline=None)
def test_memory_holds_one_row_per_image_averaged_visit_by_visit(batches: list[list[int]], momentum: float) -> None:
    memory = InstanceMemory(SIZE, momentum)
    rows: dict[int, tuple[Tensor, int, int]] = {}  # a dictionary keeps the order in which keys came
    for step, indices in enumerate(batches):
        embeddings, labels, known = make_batch(indices, step)
        memory.enqueue(embeddings, labels, known)
        for embedding, label, index in zip(embeddings.double(), labels.tolist(), indices, strict=True):
            new = embedding / embedding.norm()
            mixed = momentum * rows[index][0] + (1 - momentum) * new if index in rows else new
            rows[index] = (mixed / mixed.norm(), label, step)
        read_embeddings, read_labels, read_indices = memory.read()
        assert len(memory) == len(rows) <= SIZE
        assert read_indices.tolist() == list(rows)
        assert read_labels.tolist() == [label for _, label, _ in rows.values()]
        assert memory.steps.tolist() == [step for _, _, step in rows.values()]
        if rows:
            expected = torch.stack([row for row, _, _ in rows.values()])
            torch.testing.assert_close(read_embeddings.double(), expected, rtol=1e-4, atol=1e-5)


@given(before=visits, after=visits, momentum=momenta)
@settings(max_examples=40, deadline=None)
def test_a_restored_memory_goes_on_as_if_never_stopped(
    before: list[list[int]], after: list[list[int]], momentum: float
) -> None:
    memory = filled(before, momentum)
    restored = InstanceMemory(SIZE, momentum)
    restored.load_state_dict(memory.state_dict())
    for step, indices in enumerate(after, start=len(before)):
        memory.enqueue(*make_batch(indices, step))
        restored.enqueue(*make_batch(indices, step))
    assert_same(memory, restored)
    assert restored.batches == memory.batches == len(before) + len(after)


@given(batches=visits, batch=st.lists(st.integers(0, SIZE - 1), max_size=6))
@settings(max_examples=25, deadline=None)
def test_reading_with_a_batch_is_reading_after_it_and_changes_nothing(
    batches: list[list[int]], batch: list[int]
) -> None:
    memory = filled(batches)
    before = copy.deepcopy(memory.state_dict())
    embeddings, labels, indices = make_batch(batch, 99)
    seen = memory.read_with(normalize(embeddings), labels, indices)
    assert all(
        torch.equal(value, before[name]) if isinstance(value, Tensor) else value == before[name]
        for name, value in memory.state_dict().items()
    )
    memory.enqueue(normalize(embeddings), labels, indices)
    for ours, theirs in zip(seen, memory.read(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_reading_a_fifo_with_a_batch_is_reading_after_it() -> None:
    memory = EmbeddingMemory(6)
    for seed in range(3):
        batch = make_batch([seed, seed + 1, seed + 2], seed)
        seen = memory.read_with(normalize(batch[0]), *batch[1:]) if seed else batch
        memory.enqueue(*batch)
        if seed:
            for ours, theirs in zip(seen, memory.read(), strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_an_opposite_embedding_leaves_a_row_of_unit_length(momentum: float) -> None:
    """At momentum 0.5 nothing is left of the two; the newer one stays."""
    memory, row = InstanceMemory(3, momentum), normalize(torch.randn(1, DIM))
    for embedding in (row, -row):
        memory.enqueue(embedding, torch.tensor([0]), torch.tensor([1]))
    torch.testing.assert_close(memory.read()[0], -row)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_without_a_direction_update_nothing_and_are_counted(bad: float) -> None:
    memory = filled([[0, 1, 2]])
    before = memory.read()[0].clone()
    embeddings, labels, indices = make_batch([1, 3, 2], 5)
    embeddings[0, 2] = bad
    embeddings[1] = 0
    assert memory.enqueue(embeddings, labels, indices) == 2
    assert memory.read()[2].tolist() == [0, 1, 2]
    assert torch.equal(memory.read()[0][:2], before[:2])
    assert not torch.equal(memory.read()[0][2], before[2])
    assert memory.dropped == memory.state_dict()["dropped"] == 2


def test_read_is_a_contiguous_view_without_copy() -> None:
    memory, buffers = InstanceMemory(20), set()
    for step in range(12):
        memory.enqueue(*make_batch([step, (3 * step) % 20], step))
        first, second = memory.read(), memory.read()
        assert all(tensor.is_contiguous() for tensor in first)
        assert [a.data_ptr() for a in first] == [b.data_ptr() for b in second]
        buffers.add(tuple(tensor.untyped_storage().data_ptr() for tensor in first))
    assert len(buffers) == 1
    assert memory.nbytes == 20 * (4 * DIM + 32)


def test_float16_rows_are_averaged_in_float32() -> None:
    memory = InstanceMemory(3, 0.9, torch.float16)
    wide = InstanceMemory(3, 0.9)
    for step in range(5):
        batch = make_batch([0, 1], step)
        memory.enqueue(*batch)
        wide.enqueue(*batch)
    assert memory.read()[0].dtype is torch.float16
    torch.testing.assert_close(memory.read()[0].float(), wide.read()[0], rtol=0, atol=2e-3)


def test_before_the_first_rows_and_after_a_reset_read_gives_zero_rows() -> None:
    memory = filled([[0, 1]])
    memory.reset()
    embeddings, labels, indices = memory.read()
    assert (embeddings.shape, labels.shape, indices.shape, len(memory)) == ((0, 0), (0,), (0,), 0)
    memory.enqueue(torch.ones(1, DIM + 1), torch.tensor([LARGEST]), torch.tensor([SIZE - 1]))
    assert memory.read()[1].tolist() == [LARGEST]


@pytest.mark.parametrize("size", [2, 5, 40])
def test_a_state_of_another_size_leaves_the_images_that_there_still_are(size: int) -> None:
    full = filled([[4, 0, 8], [0, 3, 8, 1]])
    memory = InstanceMemory(size)
    memory.load_state_dict(full.state_dict())
    assert memory.read()[2].tolist() == [index for index in (4, 0, 8, 3, 1) if index < size]
    for index, row in zip(memory.read()[2].tolist(), memory.read()[0], strict=True):
        assert torch.equal(row, full.read()[0][full.read()[2] == index].flatten())


def test_the_state_of_another_kind_of_memory_is_refused_both_ways() -> None:
    fifo = EmbeddingMemory(4)
    fifo.enqueue(*make_batch([1, 1], 0))
    with pytest.raises(ValueError, match="state of an InstanceMemory, with one row per image"):
        InstanceMemory(4).load_state_dict(fifo.state_dict())
    with pytest.raises(
        ValueError, match=r"state of an EmbeddingMemory in the checkpoint to have .* but offset is missing"
    ):
        fifo.load_state_dict(filled([[1]]).state_dict())


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (None, r'which image each row is of.*but got none.*"indices": indices'),
        (torch.tensor([0, SIZE]), rf"`indices` in \[0, {SIZE}\), .* got 0 to {SIZE}\. Pass `size="),
        (torch.tensor([-1, 2]), r"got -1 to 2"),
        (torch.tensor([0.0, 1.0]), "integer dtype"),
    ],
)
def test_wrong_indices_are_refused_and_change_nothing(indices: Tensor | None, message: str) -> None:
    memory = filled([[0, 1]])
    with pytest.raises((ValueError, TypeError), match=message):
        memory.enqueue(torch.randn(2, DIM), torch.tensor([0, 1]), indices)
    assert_same(memory, filled([[0, 1]]))
    with pytest.raises(ValueError, match=r"holds embeddings of D=5, but the batch has D=6"):
        memory.enqueue(torch.randn(1, 6), torch.tensor([0]), torch.tensor([0]))


def test_a_memory_without_a_size_refuses_rows() -> None:
    with pytest.raises(
        ValueError, match=r"to have a `size` but got None.*Pass `size=`, the length of the training set"
    ):
        InstanceMemory().enqueue(*make_batch([0], 0))


@pytest.mark.parametrize(
    "arguments", [{"size": 0}, {"size": 2.5}, {"size": 3, "momentum": 1.0}, {"size": 3, "momentum": -1}]
)
def test_impossible_arguments_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises((ValueError, TypeError), match="Expected"):
        InstanceMemory(**arguments)


def test_a_deep_copy_shares_the_memory_and_writing_before_backward_is_an_error() -> None:
    memory = filled([[0, 1, 2]])
    assert copy.deepcopy(memory) is memory
    anchors = torch.randn(2, DIM, requires_grad=True)
    similarity = (anchors @ memory.read()[0].T).sum()
    memory.enqueue(*make_batch([1], 7))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        similarity.backward()
