"""What is promised of memories and momentum encoders on two ranks: real DDP over gloo, through the Trainer.

A fixture runs every case on two ranks, once. The tests compare what the ranks returned, and one rank with them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
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
from torch.utils.data import Dataset

from lightning_memdml.callbacks.memory import MemoryCallback
from lightning_memdml.callbacks.memory_report import MemoryReport
from lightning_memdml.losses.contrastive import ContrastiveLoss
from lightning_memdml.memory.instance_memory import InstanceMemory

EVEN, SIZE, IMAGES = [(4, 4)] * 8, 20, 100
UNEVEN = [(4, 4), (4, 3), (2, 5), (4, 4), (3, 2)]
"""Rows of rank 0 and rank 1, batch by batch."""


def image(index: Tensor) -> Tensor:
    return torch.stack([torch.sin(index * k * 0.7) for k in range(1, 7)], dim=-1)


class Images(Dataset):
    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, position: int) -> tuple[Tensor, int, int]:
        return image(torch.tensor(position)), position * 7 % 5, position


class Batches:
    """Images 0, 1, 2, ... and from 0 again, `steps[b][r]` of them for rank r in batch b."""

    def __init__(self, steps: list[tuple[int, int]], sick: bool = False) -> None:
        self.steps, self.sick, self.data_set = steps, sick, Images()

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        start = 0
        for step, rows in enumerate(self.steps):
            whole = torch.arange(start, start + sum(rows)) % 23
            start += sum(rows)
            indices = whole.split(rows)[dist.get_rank()] if dist.is_initialized() else whole
            images = image(indices)
            if self.sick and step in (1, 2) and dist.get_rank() == 1:
                images[0, 0] = torch.nan
            yield images, indices * 7 % 5, indices


class Learner(LightningModule):
    """Against the memory only, which two ranks do as one with the batch of both."""

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(16) if batch_norm else nn.Identity()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 8)
        self.loss = ContrastiveLoss(margin=0.2)
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return normalize(self.last(torch.tanh(self.norm(self.first(x)))))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, y, indices = batch
        z = self(x.nan_to_num())  # the sick image hurts the memory's rows alone
        loss = self.loss(z, y, *self.memory.read()[:2])
        self.losses.append(loss.item())
        return {"loss": loss, "embeddings": z, "labels": y, "indices": indices}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def digest(value: Any) -> str:
    if isinstance(value, dict):
        return sha256("".join(f"{key}{digest(item)}" for key, item in value.items()).encode()).hexdigest()
    return sha256(value.numpy().tobytes() if isinstance(value, Tensor) else str(value).encode()).hexdigest()


class Diary(Callback):
    """The memory and the momentum encoder after each step, and what was read in the first."""

    def __init__(self, callback: MemoryCallback) -> None:
        self.callback, self.hashes, self.first = callback, [], None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Learner, *_: Any) -> None:
        if self.first is None:
            self.first = pl_module.memory.read()[2].tolist()

    def on_train_batch_end(self, *_: Any) -> None:
        self.hashes.append(digest(self.callback.state_dict()))


def train(
    module: Learner,
    callback: MemoryCallback,
    batches: Batches,
    *others: Callback,
    epochs: int = 1,
    ckpt: Any = None,
    **flags: Any,
) -> dict[str, Any]:
    diary = Diary(callback)
    trainer = Trainer(
        accelerator="cpu",
        **({"strategy": "ddp", "devices": 2} if dist.is_torchelastic_launched() else {"devices": 1}),
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(other, ModelCheckpoint) for other in others),
        callbacks=[callback, diary, *others],
        **flags,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*NaN, infinite or zero.*")
        trainer.fit(module, batches, ckpt_path=ckpt)
    return {
        "losses": module.losses, "weights": module.state_dict(), "state": callback.state_dict(),
        "hashes": diary.hashes, "first": diary.first,
    }  # fmt: skip


def momentum(batch_norm: Any = "batch", **options: Any) -> MemoryCallback:
    return MemoryCallback(**{"size": SIZE, "encoder_momentum": 0.8, "encoder_batch_norm": batch_norm, **options})


def instances() -> MemoryCallback:
    return MemoryCallback(memory=InstanceMemory(IMAGES, 0.4))


def reported(folder: Path) -> dict[str, Any]:
    report = MemoryReport(4, dirpath=str(folder / "reports"))
    return {**train(Learner(), instances(), Batches(EVEN), report, epochs=2), "reports": report.reports}


def whole_and_resumed(folder: Path, name: str, make: Any, batch_norm: bool) -> dict[str, Any]:
    """Three epochs; the last two again, from the checkpoint of the first."""
    saver = ModelCheckpoint(folder / name, "{epoch}", save_top_k=-1, every_n_epochs=1)
    whole = train(Learner(batch_norm), make(), Batches(EVEN), saver, epochs=3, accumulate_grad_batches=2)
    ckpt = folder / name / "epoch=0.ckpt"
    resumed = train(Learner(batch_norm), make(), Batches(EVEN), epochs=3, ckpt=ckpt, accumulate_grad_batches=2)
    return {"whole": whole, "resumed": resumed}


def handed_over(folder: Path, name: str, other: str) -> dict[str, Any]:
    """Save under `name`; go on from what the other number of ranks saved."""
    found = {}
    for kind, make in (("momentum", momentum), ("instances", instances)):
        train(Learner(), make(), Batches(UNEVEN), ModelCheckpoint(folder / name / kind, "last"))
        ckpt = folder / other / kind / "last.ckpt"
        found[kind] = train(Learner(), make(), Batches(UNEVEN), ckpt=ckpt, epochs=2)
    return found


def all_cases(folder: Path) -> dict[str, Any]:
    one, two = ("two", "one") if dist.is_torchelastic_launched() else ("one", "two")
    cases = {
        "momentum": train(Learner(), momentum(), Batches(UNEVEN), epochs=2),
        "momentum, accumulated": train(Learner(), momentum(), Batches(EVEN), epochs=2, accumulate_grad_batches=2),
        "instances": train(Learner(), instances(), Batches(EVEN), epochs=2),
        "filled first": train(Learner(), momentum(size=37, prefill=True, start_step=1), Batches(EVEN)),
        "one row filled first": train(Learner(), momentum(size=1, prefill=True), Batches(EVEN)),
        "handed over": handed_over(folder, one, two),
    }
    if dist.is_torchelastic_launched():
        cases |= {
            "statistics of the batch": whole_and_resumed(folder, "batch", momentum, True),
            "running statistics": whole_and_resumed(folder, "running", lambda: momentum("running"), True),
            "instances resumed": whole_and_resumed(folder, "instances", instances, True),
            "reported": reported(folder),
            "sick": train(Learner(), momentum(), Batches(UNEVEN, sick=True)),
        }
    return cases


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """What each of two ranks saw, and one rank alone; each resumes from the checkpoints of the other."""
    folder = tmp_path_factory.mktemp("faults")
    for kind, make in (("momentum", momentum), ("instances", instances)):
        train(Learner(), make(), Batches(UNEVEN), ModelCheckpoint(folder / "one" / kind, "last"))
    first, second = run_ranks(2, all_cases, folder)
    return {0: first, 1: second, "one": all_cases(folder)}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


SINGLE = ["momentum", "momentum, accumulated", "instances", "filled first", "one row filled first", "sick"]
DOUBLE = ["statistics of the batch", "running statistics", "instances resumed"]


@pytest.mark.parametrize("case", SINGLE + DOUBLE)
def test_memory_and_momentum_encoder_are_the_same_on_both_ranks_after_every_step(runs: Any, case: str) -> None:
    """Bit for bit, running statistics of the encoder included, with even and uneven batches and NaN on one rank."""
    ours, theirs = ((runs[rank][case] if case in SINGLE else runs[rank][case]["whole"]) for rank in range(2))
    assert ours["hashes"] == theirs["hashes"]
    assert len(set(ours["hashes"])) == len(ours["hashes"]) >= len(UNEVEN)


@pytest.mark.parametrize("case", ["momentum", "momentum, accumulated", "instances", "filled first"])
def test_two_ranks_train_as_one_with_the_same_global_batch(runs: Any, case: str) -> None:
    """To rounding, as sums are made in another order; which rows, exactly. Uneven batches are weighted otherwise by
    DDP, which takes the mean of the ranks' means: there only rows and updates are compared."""
    one, two = runs["one"][case], runs[0][case]
    names = ("labels", "indices", "steps")
    if case != "filled first":  # images are spread over the ranks in another order
        assert equal(*({name: run["state"]["memory"][name] for name in names} for run in (one, two)))
    if case in ("momentum, accumulated", "instances"):
        torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-3, atol=1e-5)
        moved = max(float((one["weights"][name] - value).abs().max()) for name, value in Learner().state_dict().items())
        assert moved > 1e-3, "steps that train nothing compare nothing"
    if "keys" in one["state"]:
        assert one["state"]["keys"]["updates"] == two["state"]["keys"]["updates"] > 0


@pytest.mark.parametrize("case", DOUBLE)
def test_a_resumed_run_equals_the_uninterrupted_one_on_both_ranks(runs: Any, case: str) -> None:
    """Losses, weights, rows and momentum encoder, bit for bit, though the checkpoint is that of rank 0 alone. Batch
    norms under DDP have other running statistics on each rank until the next forward."""
    for rank in range(2):
        whole, resumed = runs[rank][case]["whole"], runs[rank][case]["resumed"]
        assert resumed["losses"] == whole["losses"][len(EVEN) :]
        assert resumed["hashes"] == whole["hashes"][len(EVEN) :]
        assert equal(dict(whole["weights"]), dict(resumed["weights"]))
        assert equal(whole["state"], resumed["state"])


def test_each_image_is_filled_in_once_over_the_ranks(runs: Any) -> None:
    one, two = (runs[key]["filled first"] for key in ("one", 0))
    rows = two["state"]["memory"]["indices"][-37:]
    assert set(rows.tolist()) == set(one["state"]["memory"]["indices"][-37:].tolist())
    for rank in range(2):
        assert len(runs[rank]["one row filled first"]["first"]) == 1


def test_images_of_one_rank_that_are_nan_enter_on_no_rank_and_leave_the_momentum_encoder_finite(runs: Any) -> None:
    """The momentum encoder makes NaN of them, whatever the step made."""
    for rank in range(2):
        state = runs[rank]["sick"]["state"]
        assert state["memory"]["dropped"] == 2
        assert state["memory"]["embeddings"].isfinite().all()
        assert all(value.isfinite().all() for value in state["keys"]["weights"].values())


def test_a_report_changes_nothing_and_ranks_agree_on_the_drift(runs: Any) -> None:
    """No rank waits for another in it. Pairs and share of the loss are those of the rank's own batch."""
    ours, theirs = (runs[rank]["reported"] for rank in range(2))
    assert ours["hashes"] == runs[0]["instances"]["hashes"]
    assert ours["losses"] == runs[0]["instances"]["losses"]
    for name in ("step", "rows", "age_mean", "classes", "drift", "drift_old"):
        assert [report[name] for report in ours["reports"]] == [report[name] for report in theirs["reports"]]
    assert len(ours["reports"]) == 4


@pytest.mark.parametrize("kind", ["momentum", "instances"])
def test_a_checkpoint_of_two_ranks_goes_on_on_one_and_the_other_way(runs: Any, kind: str) -> None:
    """The first step reads the rows that were saved, in their order; the second epoch follows."""
    for key in ("one", 0, 1):
        found = runs[key]["handed over"][kind]
        seen = list(dict.fromkeys(index % 23 for index in range(sum(map(sum, UNEVEN)))))
        fifo = [index % 23 for index in range(sum(map(sum, UNEVEN)))][-SIZE:]
        assert found["first"] == (seen if kind == "instances" else fifo)
        assert found["state"]["memory"]["batches"] == 2 * len(UNEVEN)
        if kind == "momentum":
            assert found["state"]["keys"]["updates"] == 2 * len(UNEVEN)
