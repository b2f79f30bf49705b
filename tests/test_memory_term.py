"""`loss_term` calls every kind of loss against the rows of a memory by its own convention."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import normalize

from lightning_memdml import (
    ContrastiveLoss,
    EmbeddingMemory,
    MultiSimilarityLoss,
    PairLoss,
    SupConLoss,
    TripletLoss,
)
from lightning_memdml.memory import MemoryRows
from lightning_memdml.memory_term import against_memory, loss_term


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


# ------------------------------------------------------------------ odd and wrong arguments

Z, LABELS, INDICES = batch(6)
ROWS = MemoryRows(*batch(9, seed=1))


class Holder(LightningModule):
    """A module in a fit with a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["memory"] = memory_of(9)


def called(loss: Any, z: Any, labels: Any, indices: Any = None) -> Tensor:
    return against_memory(Holder(), loss, z, labels, indices)


WRONG = {
    "embeddings of numpy": ((Z.numpy(), LABELS), "`embeddings` to be a tensor of shape (B, D) but got ndarray. Pass "
                            "`torch.as_tensor(embeddings)`."),
    "labels as a list": ((Z, LABELS.tolist()), "`labels` to be an integer tensor of shape (6,) but got list. Pass "
                         "`torch.as_tensor(labels)`."),
    "labels as a column": ((Z, LABELS[:, None]), "`labels` of shape (6,) but got (6, 1). Pass `labels.squeeze(1)`."),
    "labels of floats": ((Z, LABELS.float()), "`labels` of an integer dtype but got torch.float32. Pass "
                         "`labels.long()`."),
    "labels of bools": ((Z, LABELS > 0), "`labels` of an integer dtype but got torch.bool. Pass `labels.long()`."),
    "too few indices": ((Z, LABELS, INDICES[:2]), "`indices` of shape (6,) but got (2,). Pass one integer for each "
                        "row of the embeddings."),
}  # fmt: skip


@pytest.mark.parametrize("loss", [ContrastiveLoss(), Called(), MetricLearningLoss()])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_argument_against_a_memory_is_named_whatever_the_loss(wrong: str, loss: Any) -> None:
    arguments, message = WRONG[wrong]
    with pytest.raises((TypeError, ValueError), match=f"^Expected {re.escape(message)}$"):
        called(loss, *arguments)
    z, labels, *indices = arguments
    with pytest.raises((TypeError, ValueError), match=f"^Expected {re.escape(message)}$"):
        loss_term(loss, z, labels, ROWS, *indices)


@pytest.mark.parametrize(
    ("loss", "rows", "message"),
    [
        (3, ROWS, "Expected `loss` to be a loss but got 3. Pass ContrastiveLoss(), for example."),
        (3, None, "Expected `loss` to be a loss but got 3. Pass ContrastiveLoss(), for example."),
        (
            Called(),
            ROWS[:2],
            "Expected `rows` to be embeddings, labels and indices but got 2 items. Pass `memory.read()`, or "
            "(embeddings, labels, torch.full_like(labels, -1)).",
        ),
        (
            ContrastiveLoss(),
            memory_of(3),
            "Expected `rows` to be embeddings, labels and indices but got EmbeddingMemory. Pass `memory.read()`, or "
            "(embeddings, labels, torch.full_like(labels, -1)).",
        ),
        (
            Called(),
            MemoryRows(torch.eye(4), torch.arange(4), torch.arange(4)),
            "Expected embeddings of shape (B, 4), as wide as the rows of the memory, but got (6, 5). Pass those of the "
            "same embedding layer, or empty the memory: `memory.reset()`.",
        ),
    ],
)
def test_a_wrong_loss_and_wrong_rows_are_named(loss: Any, rows: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}$"):
        loss_term(loss, Z, LABELS, rows)


def test_the_batch_term_of_a_function_takes_labels_of_any_kind() -> None:
    shares = torch.rand(6, 3)
    assert loss_term(lambda z, y: (z.sum(1) * y.sum(1)).sum(), Z, shares) == (Z.sum(1) * shares.sum(1)).sum()
    with pytest.raises(TypeError, match=r"^Expected `embeddings` to be a tensor of shape "):
        loss_term(lambda z, y: 0, [1.0], LABELS)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_batch_of_no_and_of_one_row_has_a_gradient(rows: int) -> None:
    z = Z[:rows].clone().requires_grad_()
    term = called(ContrastiveLoss(margin=0.0), z, LABELS[:rows])
    term.backward()
    s = Z[:rows] @ memory_of(9).read().embeddings.T
    same = LABELS[:rows, None] == memory_of(9).read().labels
    expected = torch.where(same, 1 - s, s.clamp_min(0)).sum()
    torch.testing.assert_close(term.detach(), expected)
    assert z.grad is not None
    assert z.grad.shape == (rows, 5)
    assert z.grad.any() == bool(rows)


@pytest.mark.parametrize("offset", [2**31, 2**53, 2**62, -(2**31) - 9])
@pytest.mark.parametrize("loss", [ContrastiveLoss(), MultiSimilarityLoss(), TripletLoss(), SupConLoss()])
def test_classes_of_large_numbers_stay_apart(loss: PairLoss, offset: int) -> None:
    """Neighbouring numbers above 2^53 are equal as float64, and those above 2^31 are not as int32."""
    ref_z, ref_y, _ = batch(9, seed=1)
    assert loss(Z, LABELS + offset) == loss(Z, LABELS)
    assert loss(Z, LABELS + offset, ref_z, ref_y + offset) == loss(Z, LABELS, ref_z, ref_y)


def test_references_that_require_a_gradient_get_theirs() -> None:
    """The derivative of the value by autograd of the plain formula."""
    ref_z, ref_y, _ = batch(9, seed=1)
    references = ref_z.clone().requires_grad_()
    ContrastiveLoss(margin=0.2)(Z, LABELS, references, ref_y).backward()
    plain = ref_z.clone().requires_grad_()
    s, same = Z @ plain.T, LABELS[:, None] == ref_y
    (torch.where(same, 1 - s, torch.where(s > 0.2, s, 0 * s)).sum() / len(Z)).backward()
    torch.testing.assert_close(references.grad, plain.grad)


def test_a_row_without_a_number_makes_the_term_nan_and_stays_out_of_the_memory() -> None:
    z = Z.clone()
    z[2] = torch.nan
    module = Holder()
    assert against_memory(module, ContrastiveLoss(), z, LABELS).isnan()
    assert module.memory.enqueue(**module.memory.given) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_embeddings_in_half_precision_give_the_value_of_the_rounded_ones(dtype: torch.dtype, autocast: bool) -> None:
    """No product is rounded once more, under autocast as well."""
    z = Z.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        term = called(ContrastiveLoss(), z, LABELS)
    assert term.dtype == torch.float32
    torch.testing.assert_close(term.detach(), called(ContrastiveLoss(), Z.to(dtype).float(), LABELS))
    term.backward()
    assert z.grad is not None
    assert z.grad.dtype == dtype
