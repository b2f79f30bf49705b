"""The bfloat16 copy of a memory is equal to its rows whatever happens to them, and rounds only what has changed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lightning_memdml as ml
from lightning_memdml import bfloat16, bfloat16_copy
from lightning_memdml.bfloat16_copy import LEAST_BOUND, BFloat16Copy
from lightning_memdml.losses import streaming
from lightning_memdml.losses.backends.bfloat16_prefilter import BFloat16Prefilter
from lightning_memdml.memory import InstanceMemory, MomentMatchedMemory, RingMemory, ShardedMemory
from lightning_memdml.memory.protocol import Memory
from lightning_memdml.memory.rows import MemoryRows
from lightning_memdml.memory_term import loss_term

KINDS: dict[str, Callable[[], Memory]] = {
    "queue": lambda: ml.EmbeddingMemory(50),
    "ring": lambda: RingMemory(50),
    "instance": lambda: InstanceMemory(60, momentum=0.5),
    "moments": lambda: MomentMatchedMemory(50),
    "sharded": lambda: ShardedMemory(50),
}
DIM = 64


def batch(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = F.normalize(torch.randn(rows, DIM, generator=generator), dim=1)
    return embeddings, torch.arange(rows) % 5, torch.randperm(60, generator=generator)[:rows]


def check(rows: MemoryRows) -> None:
    assert rows.rounded is not None
    rounded = rows.rounded()
    assert rounded.rows.equal(rows.embeddings.bfloat16())
    assert rounded.longest >= rows.embeddings.norm(dim=1).max()


@pytest.fixture
def rounded_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were rounded, call by call."""
    found, reached = [], bfloat16_copy.round_rows

    def recorded(rows: Tensor) -> bfloat16_copy.RoundedRows:
        found.append(len(rows))
        return reached(rows)

    monkeypatch.setattr(bfloat16_copy, "round_rows", recorded)
    return found


@pytest.mark.filterwarnings("ignore:Expected batches of at least 64 rows")
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_equal_to_the_rows_of_every_memory(kind: str) -> None:
    memory = KINDS[kind]()
    for step in range(40):
        memory.enqueue(*batch(1 + step % 9, seed=step))
        check(memory.read())
        if kind in ("queue", "instance"):
            rows = batch(7, seed=100 + step)
            check(memory.read_with(*rows))
            check(memory.read())
    rows = memory.read()
    rows.embeddings[3].mul_(5.0)
    check(rows)
    memory.enqueue(*batch(4, seed=50))
    check(memory.read())
    other = KINDS[kind]()
    other.enqueue(*batch(30, seed=60))
    before = other.read()
    check(before)
    other.load_state_dict(memory.state_dict())
    check(other.read())
    check(before)  # of the table before
    other.reset()
    other.enqueue(*batch(5, seed=70))
    check(other.read())


@pytest.mark.parametrize("kind", ["queue", "ring", "instance", "sharded"])
def test_only_new_rows_are_rounded(kind: str, rounded_rows: list[int]) -> None:
    memory = KINDS[kind]()
    memory.enqueue(*batch(40, seed=0))
    assert not rounded_rows
    check(memory.read())
    whole = rounded_rows.pop()
    assert whole >= 40
    assert not rounded_rows
    for step in range(1, 8):
        memory.enqueue(*batch(6, seed=step))
        check(memory.read())
    assert max(rounded_rows) < 40  # also when the rows of a queue return to its front
    assert whole not in rounded_rows


def test_it_costs_nothing_until_it_is_read(rounded_rows: list[int]) -> None:
    memory = ml.EmbeddingMemory(50)
    memory.enqueue(*batch(40, seed=0))
    before, table = memory.nbytes, 62 * DIM * 4
    memory.read().rounded()
    assert memory.nbytes == before + table // 2
    memory.reset()
    assert memory.nbytes == 0


def test_a_row_that_is_not_finite_is_seen_as_long_as_it_is_there() -> None:
    table = F.normalize(torch.randn(8, DIM), dim=1)
    copy = BFloat16Copy(table)
    copy.read(slice(0, 8))
    table[2, 0] = torch.nan
    copy.update(slice(2, 3))
    assert torch.tensor(copy.read(slice(0, 8)).longest).isnan()
    table[5] = table[6]
    assert torch.tensor(copy.read(slice(0, 8)).longest).isnan()
    table[2] = table[6]
    assert copy.read(slice(0, 8)).longest == LEAST_BOUND


def test_the_bound_does_not_depend_on_what_was_there_before() -> None:
    memory, resumed = ml.EmbeddingMemory(20), ml.EmbeddingMemory(20)
    for step in range(30):
        memory.enqueue(*batch(7, seed=step))
        longest = memory.read().rounded().longest
    resumed.load_state_dict(memory.state_dict())
    assert resumed.read().rounded().longest == longest == LEAST_BOUND


def test_what_was_read_in_inference_mode_is_kept_up_in_training() -> None:
    memory = ml.EmbeddingMemory(50)
    memory.enqueue(*batch(40, seed=0))
    with torch.inference_mode():
        check(memory.read())
        memory.enqueue(*batch(6, seed=1))
    memory.enqueue(*batch(6, seed=2))
    check(memory.read())


@pytest.mark.parametrize("name", ["contrastive", "InfoNCE", "compiled"])
def test_a_loss_reads_the_copy_where_it_has_a_threshold(
    name: str, rounded_rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bfloat16, "has_fast_bf16_matmul", lambda device: True)
    monkeypatch.setattr(streaming, "BLOCK_ELEMENTS", 1)
    memory = ml.EmbeddingMemory(1500)
    memory.enqueue(F.normalize(torch.randn(1500, DIM), dim=1), torch.arange(1500) % 300)
    x, y, _ = batch(8, seed=3)
    x.requires_grad_()
    loss = ml.InfoNCELoss() if name == "InfoNCE" else ml.ContrastiveLoss(margin=0.3)
    term = torch.compile(loss_term, backend="eager") if name == "compiled" else loss_term
    for _ in range(2):
        value = term(loss, x, y, memory.read())
        (gradient,) = torch.autograd.grad(value, x)
    assert rounded_rows == ([1875] if name == "contrastive" else [])  # all slots, once
    plain = loss(x, y, *memory.read()[:2])
    torch.testing.assert_close((value, gradient), (plain, *torch.autograd.grad(plain, x)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("with_copy", "width"), [(True, 16_384), (False, 512)])
def test_blocks_of_a_copy_do_not_shrink_with_the_dimension(
    with_copy: bool, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bfloat16, "has_fast_bf16_matmul", lambda device: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(streaming, "BLOCK_ELEMENTS", 1 << 15)
    widths = []
    monkeypatch.setattr(
        BFloat16Prefilter,
        "add_references",
        lambda *arguments: (widths.append(arguments[4].stop - arguments[4].start), True),
    )
    (x, r), y = torch.eye(512).split([8, 504]), torch.arange(512)
    copy = BFloat16Copy(r)
    ref_rounded = functools.partial(copy.read, slice(0, 504)) if with_copy else None
    ml.ContrastiveLoss()(x, y[:8], r, y[8:], ref_rounded=ref_rounded)
    assert widths == [width]


def test_rows_of_another_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "has_fast_bf16_matmul", lambda device: True)
    r = F.normalize(torch.randn(1500, DIM), dim=1)
    copy = BFloat16Copy(r)
    x, y, _ = batch(8, seed=3)
    message = (
        r"Expected `ref_rounded` to return the references in bfloat16, \(1500, 64\), but got \(1400, 64\)\. Pass that "
        r"of the same `memory\.read\(\)`, or leave it out\."
    )
    with pytest.raises(ValueError, match=message):
        ml.ContrastiveLoss()(x, y, r, torch.arange(1500), ref_rounded=lambda: copy.read(slice(0, 1400)))
