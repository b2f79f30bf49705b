"""The memory over two ranks: real DDP over gloo on the CPU, through the Trainer.

A fixture runs every case on two ranks, once. The tests compare what the ranks returned, and one rank with them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from support.children import run_ranks
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_memdml.callbacks.memory import MemoryCallback
from lightning_memdml.memory.gather import RowGather

STEPS, PER_RANK, SIZE = 20, 4, 40
UNEVEN = [(4, 4), (4, 3), (1, 4), (2, 5), (4, 4), (3, 1)]
"""Rows of rank 0 and rank 1, step by step; the fourth step has more rows than any rank had before."""


def pair_loss(z: Tensor, y: Tensor, ref_z: Tensor | None = None, ref_y: Tensor | None = None) -> Tensor:
    if ref_z is not None and len(ref_z) == 0:
        return z[:0].sum()
    similarity = z @ (z if ref_z is None else ref_z).T
    same = y[:, None] == (y if ref_y is None else ref_y)
    cost = torch.where(same, 1 - similarity, similarity.clamp_min(0))
    if ref_z is None:
        cost = cost * ~torch.eye(len(y), dtype=torch.bool)
    return cost.sum(1).mean()


class Batches:
    """Rows 0, 1, 2, ... of an endless data set, `steps[b][r]` of them for rank r in batch b."""

    def __init__(self, steps: list[tuple[int, int]]) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        start = 0
        for rows in self.steps:
            whole = torch.arange(start, start + sum(rows))
            start += sum(rows)
            indices = whole.split(rows)[dist.get_rank()] if dist.is_initialized() else whole
            images = torch.stack([torch.sin(indices * k * 0.7) for k in range(1, 7)], dim=1)
            yield images, indices * 7 % 5, indices


class Learner(LightningModule):
    def __init__(self, in_batch: bool, sick: bool = False, forgetful: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8))
        self.in_batch, self.sick, self.forgetful = in_batch, sick, forgetful

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, y, indices = batch
        z = normalize(self.net(x))
        loss = pair_loss(z, y, *self.memory.read()[:2])
        if self.in_batch:
            # Each rank sees its own rows only; one rank does as much with the parts that two would have.
            parts = 1 if dist.is_initialized() else 2
            pairs = zip(z.chunk(parts), y.chunk(parts), strict=True)
            loss = loss + sum(pair_loss(*pair) for pair in pairs) / parts
        stored = z.detach()
        if self.sick and batch_idx in (1, 2) and self.global_rank == 1:
            stored = stored.index_fill(0, torch.tensor([0]), torch.nan)
        outputs = {"loss": loss, "embeddings": stored, "labels": y}
        if self.forgetful and self.global_rank == 1:
            return outputs
        return {**outputs, "indices": indices}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


@contextmanager
def counted(calls: list[str]) -> Iterator[None]:
    """Count the collectives of torch.distributed, and let none of them be deprecated."""
    names = [n for n in dir(dist) if n.startswith(("all_", "broadcast", "gather", "reduce", "scatter", "barrier"))]
    originals = {name: getattr(dist, name) for name in names if callable(getattr(dist, name))}

    def watch(name: str) -> Any:
        return lambda *args, **kwargs: (calls.append(name), originals[name](*args, **kwargs))[1]

    for name in originals:
        setattr(dist, name, watch(name))
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("error", category)
            yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


class Watched(MemoryCallback):
    """The callback, with a diary: collectives per step, and the memory after each step."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.collectives: list[list[str]] = []
        self.hashes: list[str] = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        calls: list[str] = []
        with counted(calls):
            super().on_train_batch_end(*args, **kwargs)
        self.collectives.append(calls)
        state = self.memory.state_dict()
        digest = sha256()
        for value in state.values():
            digest.update(value.numpy().tobytes() if isinstance(value, Tensor) else str(value).encode())
        self.hashes.append(digest.hexdigest())

    @property
    def state_key(self) -> str:
        return "MemoryCallback"


class FirstRead(Callback):
    """The indices in the memory when training starts."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.indices = pl_module.memory.read()[2].tolist()


def fit(module: Learner, steps: list[tuple[int, int]], *callbacks: Callback, ckpt: Any = None, epochs: int = 1) -> None:
    trainer = Trainer(
        accelerator="cpu",
        **({"strategy": "ddp", "devices": 2} if dist.is_torchelastic_launched() else {"devices": 1}),
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        callbacks=list(callbacks),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*NaN, infinite or zero.*")
        trainer.fit(module, Batches(steps), ckpt_path=ckpt)


def train(
    in_batch: bool, steps: list[tuple[int, int]], sick: bool = False, forgetful: bool = False, size: int = SIZE
) -> dict[str, Any]:
    module, callback = Learner(in_batch, sick, forgetful), Watched(size)
    fit(module, steps, callback)
    return {
        "weights": module.state_dict(),
        "memory": callback.memory.state_dict(),
        "hashes": callback.hashes,
        "collectives": callback.collectives,
    }


def save_and_resume(folder: Path, name: str, other: str) -> dict[str, Any]:
    """Save a checkpoint under `name`; go on from the one that the other number of ranks saved."""
    saved, resumed, first = MemoryCallback(SIZE), MemoryCallback(SIZE), FirstRead()
    fit(Learner(False), UNEVEN, saved, ModelCheckpoint(folder / name, "last"))
    fit(Learner(False), UNEVEN, resumed, first, ckpt=folder / other / "last.ckpt", epochs=2)
    return {"saved": saved.memory.state_dict(), "first": first.indices, "end": resumed.memory.state_dict()}


def gather_disagreeing() -> str:
    gather = RowGather()
    dim = 3 + dist.get_rank()
    try:
        gather(torch.ones(2, dim), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    except ValueError as error:
        return str(error)
    return ""


def even(steps: int) -> list[tuple[int, int]]:
    return [(PER_RANK, PER_RANK)] * steps


def all_cases(folder: Path) -> dict[str, Any]:
    return {
        "memory term": train(False, even(STEPS)),
        "both terms": train(True, even(STEPS)),
        "uneven": train(False, UNEVEN),
        "sick": train(False, UNEVEN, sick=True, size=11),
        "forgetful": train(False, UNEVEN, forgetful=True),
        "resume": save_and_resume(folder, "two", "one"),
    }


def run_as_rank(folder: Path) -> dict[str, Any]:
    return {**all_cases(folder), "disagreeing": gather_disagreeing()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`runs["one"][case]`, `runs[0][case]`, `runs[1][case]`: what one rank, and each of two ranks, saw."""
    folder = tmp_path_factory.mktemp("ranks")
    fit(Learner(False), UNEVEN, MemoryCallback(SIZE), ModelCheckpoint(folder / "one", "last"))
    first, second = run_ranks(2, run_as_rank, folder)
    one = {**all_cases(folder), "resume": save_and_resume(folder, "again", "two")}
    return {"one": one, 0: first, 1: second}


@pytest.mark.parametrize("case", ["memory term", "both terms", "uneven", "sick", "forgetful"])
def test_the_memory_is_the_same_on_both_ranks_after_every_step(runs: dict[str, Any], case: str) -> None:
    hashes = runs[0][case]["hashes"]
    assert hashes == runs[1][case]["hashes"]
    assert len(set(hashes)) == len(hashes) == (STEPS if "term" in case else len(UNEVEN))


@pytest.mark.parametrize("case", ["memory term", "both terms"])
def test_two_ranks_train_as_one_with_the_same_global_batch(runs: dict[str, Any], case: str) -> None:
    """Weights and rows to float tolerance, since sums are made in another order; which rows, exactly.

    The in-batch term of a rank sees the rank's own rows only. The one rank it is compared with takes the mean
    of the in-batch losses of the two halves of its batch.
    """
    one, two = runs["one"][case], runs[0][case]
    for name in one["weights"]:
        torch.testing.assert_close(two["weights"][name], one["weights"][name], rtol=1e-4, atol=1e-6)
        moved = one["weights"][name] - Learner(True).state_dict()[name]
        assert moved.abs().max() > 1e-3, "20 steps that train nothing compare nothing"
    for name in ("labels", "indices", "steps"):
        assert torch.equal(two["memory"][name], one["memory"][name])
    torch.testing.assert_close(two["memory"]["embeddings"], one["memory"]["embeddings"], rtol=1e-4, atol=1e-6)


def test_rows_are_in_rank_order_also_with_uneven_batches(runs: dict[str, Any]) -> None:
    rows = sum(map(sum, UNEVEN))
    assert runs[0]["uneven"]["memory"]["indices"].tolist() == list(range(rows))
    assert runs[0]["uneven"]["memory"]["labels"].tolist() == [index * 7 % 5 for index in range(rows)]


def test_nan_rows_of_one_rank_enter_on_no_rank(runs: dict[str, Any]) -> None:
    """In steps 1 and 2 the first row of rank 1 is NaN: rows 12 and 16. The memory holds 11 of the others."""
    rows = [index for index in range(sum(map(sum, UNEVEN))) if index not in (12, 16)]
    for rank in range(2):
        memory = runs[rank]["sick"]["memory"]
        assert memory["indices"].tolist() == rows[-11:]
        assert memory["embeddings"].isfinite().all()
        assert memory["dropped"] == 2


def test_indices_given_on_one_rank_only_are_unknown_for_the_rows_of_the_other(runs: dict[str, Any]) -> None:
    expected, start = [], 0
    for first, second in UNEVEN:
        expected += [*range(start, start + first), *[-1] * second]
        start += first + second
    for rank in range(2):
        assert runs[rank]["forgetful"]["memory"]["indices"].tolist() == expected


def test_a_step_costs_one_collective_and_a_second_one_only_when_a_batch_outgrows_all_before(
    runs: dict[str, Any],
) -> None:
    for rank in range(2):
        assert [len(calls) for calls in runs[rank]["memory term"]["collectives"]] == [2] + [1] * (STEPS - 1)
        assert [len(calls) for calls in runs[rank]["uneven"]["collectives"]] == [2, 1, 1, 2, 1, 1]
    assert not any(runs["one"]["memory term"]["collectives"])


def test_another_dimension_on_one_rank_is_an_error_on_every_rank(runs: dict[str, Any]) -> None:
    assert "D=[3, 4]" in runs[0]["disagreeing"]
    assert runs[0]["disagreeing"] == runs[1]["disagreeing"]


def test_a_checkpoint_of_two_ranks_resumes_on_one_and_the_other_way(runs: dict[str, Any]) -> None:
    rows = list(range(sum(map(sum, UNEVEN))))
    assert runs["one"]["resume"]["first"] == runs[0]["resume"]["first"] == runs[1]["resume"]["first"] == rows
    for end in (runs["one"]["resume"]["end"], runs[0]["resume"]["end"]):
        assert end["indices"].tolist() == (rows + rows)[-SIZE:]
        assert end["batches"] == 2 * len(UNEVEN)
