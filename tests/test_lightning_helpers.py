"""Lightning's own helpers on a learner with a memory: finders, schedulers, fine-tuning, stopping and averaging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.tuner import Tuner
from support.learners import SGD, SIZE, Flat, Record, data, learner, loader, trainer
from torch import nn
from torch.optim import Optimizer

from lightning_memdml import ContrastiveLoss, GlyphDataModule, MemoryCallback, MetricLearner, SmallConvNet

QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
VALIDATION = "val/map_at_r"


def glyphs(cache: str, **options: Any) -> GlyphDataModule:
    sizes = {"batch_size": 16, "images_per_class": 4, "num_classes": 40, "num_workers": 0}
    return GlyphDataModule(cache_dir=cache, **{**sizes, **options})


def small() -> MetricLearner:
    torch.manual_seed(0)
    return MetricLearner(SmallConvNet(width=4), ContrastiveLoss(), embedding_dim=8, optimizer=SGD)


def test_the_learning_rate_finder_sets_lr_and_leaves_the_rest(tmp_path: Path, glyph_cache: str) -> None:
    model, memory = small(), MemoryCallback(size=64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = Trainer(max_steps=3, callbacks=[memory], default_root_dir=tmp_path, **QUIET)
    found = Tuner(run).lr_find(model, datamodule=glyphs(glyph_cache), num_training=40, early_stop_threshold=None)
    assert found is not None
    assert model.lr == found.suggestion()
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert list(tmp_path.glob(".lr_find*")) == []
    model.trainer = run
    assert model.configure_optimizers().param_groups[0]["lr"] == model.lr


def test_lr_is_the_rate_of_what_has_none_of_its_own() -> None:
    model = learner(backbone_lr=0.3)
    assert model.lr == 0.1
    model.lr = 0.02
    groups = {group["name"]: group["lr"] for group in model.configure_optimizers().param_groups}
    assert groups == {"head": 0.02, "backbone": 0.3}
    decayed = learner(backbone=Flat(), layer_decay=0.5)
    decayed.lr = 0.02
    assert decayed.configure_optimizers().param_groups[0]["lr"] == 0.02


def test_lr_is_saved(tmp_path: Path) -> None:
    model = small()
    model.lr = 0.02
    model.save(tmp_path / "a.ckpt")
    assert MetricLearner.load(tmp_path / "a.ckpt").lr == 0.02


@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_the_batch_size_finder_ends_on_a_batch_that_can_be_made(tmp_path: Path, glyph_cache: str, mode: str) -> None:
    model, images = small(), glyphs(glyph_cache)
    run = Trainer(max_steps=3, callbacks=[MemoryCallback(size=64)], default_root_dir=tmp_path, **QUIET)
    Tuner(run).scale_batch_size(model, datamodule=images, mode=mode, max_trials=7, steps_per_trial=1)
    classes = len(images.train_set.labels.unique())
    assert images.batch_size % 4 == 0
    assert 16 <= images.batch_size <= 4 * classes
    run.fit(model, datamodule=images)
    assert run.global_step == 3


def test_out_of_memory_halves_the_batch(tmp_path: Path, glyph_cache: str) -> None:
    class Small(MetricLearner):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if len(batch[0]) > 24:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(batch, batch_idx)

    model, images = Small(SmallConvNet(width=4), ContrastiveLoss(), embedding_dim=8), glyphs(glyph_cache)
    run = Trainer(max_steps=3, default_root_dir=tmp_path, **QUIET)
    Tuner(run).scale_batch_size(model, datamodule=images, mode="binsearch", max_trials=9, steps_per_trial=1)
    assert images.batch_size in (20, 24)


def test_a_plateau_of_a_metric_lowers_the_rate() -> None:
    model = learner(lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, VALIDATION, mode="min", patience=0))
    run = trainer(MemoryCallback(size=SIZE), max_epochs=4)
    run.fit(model, loader(), loader())
    assert run.optimizers[0].param_groups[0]["lr"] < 0.1


class Thaw(BaseFinetuning):
    """Trains the head alone in the first epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.model.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.backbone, optimizer, lr=0.05)


def test_a_frozen_backbone_is_thawed() -> None:
    weights: list[torch.Tensor] = []

    class Watch(Record):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            weights.append(pl_module.model.backbone.linear.weight.detach().clone())

    model = learner()
    weights.append(model.model.backbone.linear.weight.detach().clone())
    run = trainer(MemoryCallback(size=SIZE), Thaw(), Watch(), max_epochs=2)
    run.fit(model, loader())
    assert weights[1].equal(weights[0])
    assert not weights[2].equal(weights[1])
    assert [group["lr"] for group in run.optimizers[0].param_groups] == [0.1, 0.05]


def test_training_stops_early() -> None:
    stop = EarlyStopping(VALIDATION, mode="min", patience=0, strict=True)
    run = trainer(MemoryCallback(size=SIZE), stop, max_epochs=20)
    run.fit(learner(), loader(), loader())
    assert run.current_epoch < 20


def test_averaged_weights_replace_the_last_ones(tmp_path: Path) -> None:
    """The memory stores what the trained network gave; it is not averaged."""
    records = []
    for average in ([], [EMAWeightAveraging(decay=0.5)], [StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)]):
        seed_everything(0)
        model, record, memory = learner(), Record(), MemoryCallback(size=SIZE)
        run = trainer(memory, record, *average, max_epochs=3, default_root_dir=tmp_path)
        run.fit(model, loader())
        records.append((record.losses, model.model.head.weight.detach().clone(), len(memory.memory)))
    assert records[0][0] == pytest.approx(records[1][0])
    assert records[0][2] == records[1][2] == records[2][2] == SIZE
    assert not records[0][1].equal(records[1][1])
    assert not records[0][1].equal(records[2][1])
    assert all(bool(weight.isfinite().all()) for _, weight, _ in records)


def test_gradients_are_clipped_and_accumulated() -> None:
    norms: list[float] = []

    class Norm(Record):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
            gradients = [one.grad for one in pl_module.parameters() if one.grad is not None]
            norms.extend([float(nn.utils.get_total_norm(gradients))] if gradients else [])

    memory = MemoryCallback(size=SIZE)
    run = trainer(memory, Norm(), max_epochs=1, gradient_clip_val=1e-3, accumulate_grad_batches=2)
    run.fit(learner(), loader())
    assert run.global_step == 2  # of 4 batches
    assert len(memory.memory) == len(data())  # every batch is stored
    assert max(norms) <= 1e-3 * (1 + 1e-5)
