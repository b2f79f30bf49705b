"""Sizes that fit the data, the pass that fills the memory first, the switch from outside, and all of it from YAML."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_memdml.callbacks.memory import MemoryCallback
from lightning_memdml.lightning_cli import MemdmlCLI
from lightning_memdml.losses.contrastive import ContrastiveLoss
from lightning_memdml.memory.instance_memory import InstanceMemory
from lightning_memdml.schedules import LinearRamp

IMAGES, BATCH, DIM = 30, 5, 8


def images() -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    return TensorDataset(torch.randn(IMAGES, 6, generator=generator), torch.arange(IMAGES) % 5, torch.arange(IMAGES))


class Noisy(torch.utils.data.Dataset):
    """Images that are augmented with torch's global random numbers, and opened one by one."""

    def __init__(self) -> None:
        self.images = images()
        self.opened: list[int] = []

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        self.opened.append(position)
        image, label, index = self.images[position]
        return image + 0.01 * torch.randn(6), label, index


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        yield from (images()[position] for position in range(IMAGES))


class Learner(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, DIM))
        self.loss = ContrastiveLoss(margin=0.3)
        self.losses: list[float] = []
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return normalize(self.net(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        x, y, indices = batch
        z = self(x)
        self.rows.append(len(self.memory))
        loss = self.loss(z, y) + self.loss(z, y, *self.memory.read()[:2])
        self.losses.append(float(loss.detach()))
        return {"loss": loss, "embeddings": z, "labels": y, "indices": indices}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: LightningModule, *callbacks: Callback, train: Any = None, ckpt: Any = None, **flags: Any) -> Trainer:
    trainer = Trainer(
        **{
            "accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_progress_bar": False,
            "enable_model_summary": False, "callbacks": list(callbacks), **flags,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        }
    )  # fmt: skip
    source = DataLoader(images(), batch_size=BATCH) if train is None else train
    given = {"datamodule" if isinstance(source, LightningDataModule) else "train_dataloaders": source}
    trainer.fit(module, ckpt_path=ckpt, **given)
    return trainer


# ------------------------------------------------------------------ size as a share of the training set


class Module(LightningDataModule):
    """A data module with a `train_set`, as those of this package have."""

    def setup(self, stage: str) -> None:
        self.train_set = images()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=BATCH)


@pytest.mark.parametrize("source", [Module, lambda: DataLoader(images(), batch_size=BATCH)], ids=["module", "loader"])
@pytest.mark.parametrize(("size", "rows"), [(1.0, 30), (0.5, 15), (0.25, 8), (1e-6, 1), (1, 1), (7, 7)])
def test_size_is_a_number_of_rows_or_a_share_of_the_images(size: float, rows: int, source: Any) -> None:
    callback = MemoryCallback(size=size)
    fit(Learner(), callback, train=source())
    assert (callback.memory.size, len(callback.memory)) == (rows, rows)


def test_a_share_is_resolved_before_a_checkpoint_is_restored(tmp_path: Path) -> None:
    whole, parts = Learner(), Learner()
    first, second = MemoryCallback(size=0.4), MemoryCallback(size=0.4)
    torch.manual_seed(5)
    fit(whole, first, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=1)
    fit(parts, second, ckpt=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert parts.rows[0] == 12
    assert second.memory.batches == 12


def test_a_training_set_without_a_length_is_named_with_the_way_out() -> None:
    for options in ({"size": 0.5}, {"memory": InstanceMemory()}):
        with pytest.raises(ValueError, match=r"of the training images, but their number is not known.*`size=`"):
            fit(Learner(), MemoryCallback(**options), train=DataLoader(Stream(), batch_size=BATCH))


def test_a_whole_number_of_rows_may_come_as_a_float() -> None:
    """As jsonargparse can read it on Python 3.10."""
    assert MemoryCallback(size=40.0).memory.size == 40


@pytest.mark.parametrize("size", [0.0, 1.5, -0.5])
def test_a_share_out_of_range_is_refused(size: float) -> None:
    with pytest.raises(ValueError, match=r"share of the training images in \(0, 1\]"):
        MemoryCallback(size=size)


# ------------------------------------------------------------------ filled before it is used


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_the_memory_is_filled_with_random_training_images_before_the_first_row_is_stored(momentum: Any) -> None:
    """At `start_step`, by the network of that step, without dropout and without a trace in it."""
    data, found = Noisy(), {}

    class Look(Callback):
        """Stands behind the memory callback, and recomputes by the images' batches of the pass: here one."""

        def on_train_batch_start(self, trainer: Trainer, pl_module: Learner, *_: Any) -> None:
            if trainer.global_step == 3 and not found:
                found["indices"] = pl_module.memory.read()[2].tolist()
                found["rows"], found["opened"] = pl_module.memory.read()[0].clone(), data.opened[-20:]
                found["steps"] = pl_module.memory.steps.tolist()

    callback, module = MemoryCallback(size=20, start_step=3, prefill=True, encoder_momentum=momentum), Learner()
    fit(module, callback, Look(), train=DataLoader(data, batch_size=BATCH))
    assert module.rows[:5] == [0, 0, 0, 20, 20]
    assert len(set(found["indices"])) == 20
    assert found["indices"] != sorted(found["indices"]), "chosen at random"
    assert found["steps"] == [3] * 20
    assert found["opened"] == found["indices"]
    assert len(data.opened) == 2 * IMAGES + 20, "once, and only as many as there are rows"
    torch.testing.assert_close(found["rows"].norm(dim=1), torch.ones(20))


def test_rows_of_the_pass_are_what_the_network_makes_of_the_images() -> None:
    found: dict[str, Any] = {}

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Learner, *_: Any) -> None:
            if not found:
                rows, _, indices = pl_module.memory.read()
                with torch.no_grad():
                    pl_module.eval()
                    expected = pl_module(images()[indices][0])
                    pl_module.train()
                found["pair"] = (rows.clone(), expected)

    options = {"prefill": True, "encoder_batch_norm": "running"}
    fit(Learner(), MemoryCallback(size=1.0, **options), Look())
    torch.testing.assert_close(*found["pair"])


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_the_pass_leaves_network_and_random_numbers_as_they_were(momentum: Any) -> None:
    """A memory that is not read makes no difference to the training, filled first or not."""

    class IgnoresMemory(Learner):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            z = self(batch[0])
            self.memory.read()
            return {"loss": self.loss(z, batch[1]), "embeddings": z, "labels": batch[1], "indices": batch[2]}

    ends = []
    for prefill in (False, True):
        module = IgnoresMemory()
        torch.manual_seed(3)
        callback = MemoryCallback(size=20, start_step=2, prefill=prefill, encoder_momentum=momentum)
        fit(module, callback, train=DataLoader(Noisy(), batch_size=BATCH))
        ends.append((module.state_dict(), torch.get_rng_state()))
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())
    assert torch.equal(ends[0][1], ends[1][1])


class Counted(MemoryCallback):
    """Counts its passes."""

    passes = 0
    state_key = "MemoryCallback"

    def _fill(self, *args: Any) -> None:
        self.passes += 1
        super()._fill(*args)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_the_pass_is_never_repeated_on_resume(tmp_path: Path) -> None:
    """From before it: once, with the same images. From after it: not again."""
    options: dict[str, Any] = {"size": 20, "start_step": 3, "prefill": True}
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    callback = Counted(**options)
    fit(Learner(), callback, saver, max_epochs=1)
    assert callback.passes == 1
    for step, passes in ((2, 1), (4, 0)):
        again = Counted(**options)
        fit(Learner(), again, ckpt=tmp_path / f"step={step}.ckpt", max_epochs=1)
        assert again.passes == passes
        assert again.memory.batches == callback.memory.batches


def test_instance_memory_is_filled_with_every_image() -> None:
    module, callback = Learner(), MemoryCallback(memory=InstanceMemory(), prefill=True)
    fit(module, callback)
    assert module.rows == [IMAGES] * 12


def test_a_stream_cannot_fill_the_memory() -> None:
    with pytest.raises(ValueError, match=r"whose images `prefill` embeds, but there is no data module"):
        fit(Learner(), MemoryCallback(size=5, prefill=True), train=DataLoader(Stream(), batch_size=BATCH))


# ------------------------------------------------------------------ from outside


class At(Callback):
    """Does something at the start of a batch."""

    def __init__(self, **actions: Any) -> None:
        self.actions = {int(step[1:]): action for step, action in actions.items()}

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.actions.get(trainer.global_step, lambda: None)()


def test_reset_and_switched_off_from_outside_it_is_empty_at_once() -> None:
    module, callback = Learner(), MemoryCallback(size=100)

    def switch(on: bool) -> Any:
        return lambda: setattr(callback, "enabled", on)

    fit(module, callback, At(_2=callback.memory.reset, _5=switch(False), _8=switch(True)))
    assert module.rows == [0, 5, 0, 5, 10, 0, 0, 0, 0, 5, 10, 15]


def test_the_switch_survives_a_resume_and_a_new_fit_is_on_again(tmp_path: Path) -> None:
    callback = MemoryCallback(size=100)
    off = At(_3=lambda: setattr(callback, "enabled", False))
    fit(Learner(), callback, off, ModelCheckpoint(tmp_path, "last"), max_epochs=1)
    module, resumed = Learner(), MemoryCallback(size=100)
    fit(module, resumed, ckpt=tmp_path / "last.ckpt")
    assert module.rows == [0] * 6
    assert not resumed.enabled
    again = Learner()
    fit(again, resumed, max_epochs=1)
    assert again.rows == [0, 5, 10, 15, 20, 25]


# ------------------------------------------------------------------ from YAML


def test_every_option_can_be_set_in_yaml(tmp_path: Path, glyph_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["memdml"])
    monkeypatch.chdir(tmp_path)
    instance = {"class_path": "InstanceMemory", "init_args": {"momentum": 0.25}}
    ramp = {"class_path": "LinearRamp", "init_args": {"start_step": 1, "stop_step": 3}}
    memory = {"memory": instance, "prefill": True, "encoder_momentum": 0.9, "encoder_ramp": 1}
    config = {
        "trainer": {
            "accelerator": "cpu", "max_steps": 4, "logger": False, "enable_progress_bar": False,
            "enable_checkpointing": False, "enable_model_summary": False,
            "callbacks": [
                {"class_path": "MemoryCallback", "init_args": memory},
                {"class_path": "MemoryReport", "init_args": {"every_n_steps": 2, "dirpath": "reports"}},
            ],
        },
        "model": {
            "backbone": {"class_path": "SmallConvNet", "init_args": {"width": 4}}, "loss": "ContrastiveLoss",
            "embedding_dim": 8, "memory_weight": ramp,
        },
        "data": {
            "class_path": "GlyphDataModule",
            "init_args": {"num_classes": 20, "batch_size": 8, "images_per_class": 2, "cache_dir": glyph_cache,
                          "num_workers": 0},
        },
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cli = MemdmlCLI(run=False, args=["--config", str(tmp_path / "config.yaml")])
    (callback,) = [found for found in cli.trainer.callbacks if isinstance(found, MemoryCallback)]
    assert isinstance(callback.memory, InstanceMemory)
    assert callback.memory.momentum == 0.25
    assert isinstance(cli.model.memory_weight, LinearRamp)
    cli.trainer.fit(cli.model, cli.datamodule)
    assert len(callback.memory) == callback.memory.size == len(cli.datamodule.train_set)
    assert callback.state_dict()["keys"]["updates"] == 4
    assert (tmp_path / "reports" / "report.png").is_file()


@pytest.mark.parametrize(("said", "size"), [("0.5", 0.5), ("12", 12), ("1.0", 1.0)])
def test_a_size_of_one_image_differs_from_a_size_of_all_images(
    said: str, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["memdml"])
    arguments = ["--model.backbone=resnet18", "--model.loss=ContrastiveLoss", "--trainer.callbacks+=MemoryCallback"]
    cli = MemdmlCLI(run=False, args=[*arguments, f"--trainer.callbacks.size={said}", "--trainer.logger=false"])
    (callback,) = [found for found in cli.trainer.callbacks if isinstance(found, MemoryCallback)]
    assert (callback._share if isinstance(size, float) else callback.memory.size) == size


def test_a_misspelt_memory_gets_the_nearest_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["memdml"])
    arguments = ["--model.backbone=resnet18", "--model.loss=ContrastiveLoss", "--trainer.callbacks+=MemoryCallback"]
    with pytest.raises(SystemExit):
        MemdmlCLI(run=False, args=[*arguments, "--trainer.callbacks.memory=InstanceMemry"])
    assert "Did you mean 'InstanceMemory'?" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float64", torch.float16])
def test_a_dtype_is_one_of_four_names(dtype: Any) -> None:
    expected = (
        f'Expected `dtype` to be "float32", "float16", "bfloat16" or "auto" but got {dtype!r}. Pass one of these.'
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        MemoryCallback(size=8, dtype=dtype)
