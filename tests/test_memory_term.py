"""`loss_term` calls every kind of loss against the rows of a memory by its own convention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import normalize

from lightning_memdml import ContrastiveLoss, EmbeddingMemory, PairLoss
from lightning_memdml.memory import MemoryRows
from lightning_memdml.memory_term import loss_term


def batch(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(rows, 5, generator=generator)), torch.arange(rows) % 3, torch.arange(rows)


def memory_of(rows: int, dtype: torch.dtype = torch.float32) -> EmbeddingMemory:
    memory = EmbeddingMemory(20, dtype)
    memory.enqueue(*batch(rows, seed=1))
    return memory


class Called:
    """A function that keeps what it is called with."""

    def __call__(self, z: Tensor, y: Tensor, ref_z: Tensor, ref_y: Tensor) -> Tensor:
        self.arguments = (z, y, ref_z, ref_y)
        return (z @ ref_z.T).sum()


class CalledWithIndices:
    def __call__(
        self, z: Tensor, y: Tensor, ref_z: Tensor, ref_y: Tensor, indices: Any = None, ref_indices: Any = None
    ) -> Tensor:
        self.arguments = (z, y, ref_z, ref_y, indices, ref_indices)
        return (z @ ref_z.T).sum()


class MetricLearningLoss(nn.Module):
    """Has the signature of pytorch-metric-learning."""

    def forward(
        self,
        embeddings: Tensor,
        labels: Any = None,
        indices_tuple: Any = None,
        ref_emb: Any = None,
        ref_labels: Any = None,
    ) -> Tensor:
        assert indices_tuple is None
        if not torch.compiler.is_compiling():
            self.arguments = (embeddings, labels, ref_emb, ref_labels)
        return (embeddings @ ref_emb.T).sum()


def plain(z: Tensor, y: Tensor, ref_z: Tensor, ref_y: Tensor) -> Tensor:
    return (z @ ref_z.T).sum()


class Recorded(ContrastiveLoss):
    """A loss with a `forward` of its own, which keeps what it is called with."""

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        self.options = options
        return super().forward(*arguments, **options)


def test_a_pair_loss_is_given_all_that_the_rows_carry() -> None:
    loss, rows, (z, y, indices) = Recorded(), memory_of(8).read(), batch(4)
    expected = ContrastiveLoss()(z, y, rows.embeddings, rows.labels, indices=indices, ref_indices=rows.indices)
    assert torch.equal(loss_term(loss, z, y, rows, indices), expected)
    assert set(loss.options) == {"indices", "ref_indices"}
    rows.bounds = (4, 16)
    assert torch.equal(loss_term(loss, z, y, rows), ContrastiveLoss()(z, y, rows.embeddings, rows.labels))
    assert loss.options == {"max_shared": (4, 16)}


def test_the_rounded_rows_are_given_to_losses_of_the_package_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `forward` that a user wrote before this option, and `pair_weights`, do not take it."""
    found: list[dict[str, Any]] = []
    reached = PairLoss.forward

    def recorded(self: PairLoss, *arguments: Any, **options: Any) -> Tensor:
        found.append(options)
        return reached(self, *arguments, **options)

    monkeypatch.setattr(PairLoss, "forward", recorded)
    rows, (z, y, _) = memory_of(8).read(), batch(4)
    for given in (rows, MemoryRows(*rows)):  # the second ones are of a memory that has nothing beside them
        loss_term(ContrastiveLoss(), z, y, given)
        loss_term(Recorded(), z, y, given)
    assert found == [{"ref_rounded": rows.rounded}, {}, {}, {}]


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", [Called, CalledWithIndices, MetricLearningLoss])
def test_any_other_loss_is_called_by_its_parameters_in_full_precision(
    kind: Any, given: torch.dtype, stored: torch.dtype
) -> None:
    loss, rows, (z, y, indices) = kind(), memory_of(8, stored).read(), batch(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss_term(loss, z.to(given), y, rows, indices)
    full = torch.float64 if given is torch.float64 else torch.float32
    assert value.dtype is full
    assert [tensor.dtype for tensor in loss.arguments[:4]] == [full, torch.int64, full, torch.int64]
    torch.testing.assert_close(loss.arguments[2], rows.embeddings.to(full))
    if kind is CalledWithIndices:
        assert torch.equal(loss.arguments[4], indices)
        assert torch.equal(loss.arguments[5], rows.indices)


@pytest.mark.parametrize("loss", [ContrastiveLoss(), Called(), MetricLearningLoss()])
def test_an_empty_memory_gives_a_differentiable_zero(loss: Any) -> None:
    z, y, _ = batch(4)
    z.requires_grad_()
    term = loss_term(loss, z, y, EmbeddingMemory(4).read())
    term.backward()
    assert term == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("loss", [Called(), MetricLearningLoss()])
def test_a_share_of_a_memory_needs_a_pair_loss(loss: Any) -> None:
    rows = MemoryRows(*memory_of(8).read())
    rows.ranks = range(16)
    with pytest.raises(ValueError, match="Expected a PairLoss against a ShardedMemory"):
        loss_term(loss, *batch(4)[:2], rows)


def test_the_batch_term_of_a_function_is_in_full_precision() -> None:
    z, y, indices = batch(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss_term(lambda z, y: z @ z.T, z.bfloat16(), y, indices=indices).dtype is torch.float32
    assert torch.equal(loss_term(ContrastiveLoss(), z, y, indices=indices), ContrastiveLoss()(z, y, indices=indices))


@pytest.mark.parametrize("loss", [ContrastiveLoss(), plain, MetricLearningLoss()])
def test_a_compiled_term_is_one_graph_that_is_compiled_for_an_empty_and_for_a_filling_memory(loss: Any) -> None:
    torch._dynamo.reset()
    counter, memory = CompileCounterWithBackend("aot_eager"), EmbeddingMemory(20)

    def step(z: Tensor, y: Tensor, indices: Tensor) -> Tensor:
        return loss_term(loss, z, y, memory.read(), indices)

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for seed in range(8):
        z, y, indices = batch(4, seed)
        ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
        compiled(ours, y, indices).backward()
        step(theirs, y, indices).backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
        memory.enqueue(z, y, indices)
    assert counter.frame_count == 2
