"""A run that ended is resumed with more steps: which of its checkpoints lead to the same result as one longer run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_memdml.backbones import SmallConvNet
from lightning_memdml.callbacks.memory import MemoryCallback
from lightning_memdml.data.glyphs import GlyphDataModule
from lightning_memdml.learner import MetricLearner
from lightning_memdml.losses.contrastive import ContrastiveLoss

BATCHES = 6
"""Batches of an epoch."""

VALIDATE_EVERY_2_STEPS: dict[str, Any] = {"check_val_every_n_epoch": None, "val_check_interval": 2}


class Images(Callback):
    """Indices of the images of each step."""

    def __init__(self) -> None:
        self.of_step: dict[int, list[int]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.of_step[trainer.global_step] = batch[2].tolist()


class Run(NamedTuple):
    trainer: Trainer
    images: dict[int, list[int]]
    weights: dict[str, Tensor]


def fit(cache: str, *callbacks: Callback, checkpoint: Path | str | None = None, **options: Any) -> Run:
    torch.manual_seed(0)
    images = Images()
    learner = MetricLearner(SmallConvNet(width=4), ContrastiveLoss(), embedding_dim=8)
    glyphs = GlyphDataModule(
        num_classes=12, image_size=20, cache_dir=cache, num_workers=0, batch_size=8, images_per_class=2,
        batches_per_epoch=BATCHES, val_fraction=0.3,
    )  # fmt: skip
    trainer = Trainer(
        **options, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[MemoryCallback(size=32), images, *callbacks],
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )  # fmt: skip
    trainer.fit(learner, glyphs, ckpt_path=checkpoint)
    return Run(trainer, images.of_step, learner.state_dict())


def saver(folder: Path, every_n_train_steps: int | None = None) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=every_n_train_steps)


def equal_weights(first: Run, second: Run) -> bool:
    return all(torch.equal(tensor, second.weights[name]) for name, tensor in first.weights.items())


@pytest.mark.parametrize("stop", [4, BATCHES])
@pytest.mark.parametrize("saved_at", ["step", "validation"])
def test_a_checkpoint_of_a_step_or_validation_goes_on_as_one_longer_run(
    stop: int, saved_at: str, glyph_cache: str, tmp_path: Path
) -> None:
    """Even at the step at which the shorter run ended, in the middle of an epoch or at its last batch."""
    options: dict[str, Any] = VALIDATE_EVERY_2_STEPS if saved_at == "validation" else {}
    longer = fit(glyph_cache, max_steps=14, **options)
    fit(glyph_cache, saver(tmp_path, stop if saved_at == "step" else None), max_steps=stop, **options)
    resumed = fit(glyph_cache, checkpoint=tmp_path / f"step={stop}.ckpt", max_steps=14, **options)
    assert resumed.images == {step: longer.images[step] for step in range(stop, 14)}
    assert equal_weights(longer, resumed)


@pytest.mark.parametrize("saved_at", ["step", "validation", "end of epoch", "end of fit"])
def test_with_max_epochs_every_checkpoint_goes_on_as_one_longer_run(
    saved_at: str, glyph_cache: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = VALIDATE_EVERY_2_STEPS if saved_at == "validation" else {}
    longer = fit(glyph_cache, max_epochs=3, **options)
    checkpoint = tmp_path / f"step={BATCHES}.ckpt"
    if saved_at == "end of fit":
        fit(glyph_cache, max_epochs=1).trainer.save_checkpoint(checkpoint)
    else:
        fit(glyph_cache, saver(tmp_path, BATCHES if saved_at == "step" else None), max_epochs=1, **options)
    resumed = fit(glyph_cache, checkpoint=checkpoint, max_epochs=3, **options)
    assert resumed.images == {step: longer.images[step] for step in range(BATCHES, 3 * BATCHES)}
    assert equal_weights(longer, resumed)


@pytest.mark.parametrize(("saved_at", "stop"), [("end of epoch", BATCHES), ("end of fit", BATCHES), ("end of fit", 4)])
def test_with_max_steps_the_end_of_an_epoch_and_of_the_fit_go_on_with_other_batches(
    saved_at: str, stop: int, glyph_cache: str, tmp_path: Path
) -> None:
    """Lightning counts the epoch as over and its batches as not over. Once it no longer does, correct the documents.

    The documents are the section "Resume a run" of docs/lightning_module.md and the docstring of `ClassBalancedLoader`.
    """
    longer = fit(glyph_cache, max_steps=14)
    checkpoint = tmp_path / f"step={stop}.ckpt"
    if saved_at == "end of epoch":
        fit(glyph_cache, saver(tmp_path), max_steps=stop)
    else:
        fit(glyph_cache, max_steps=stop).trainer.save_checkpoint(checkpoint)
    resumed = fit(glyph_cache, checkpoint=checkpoint, max_steps=14)
    assert list(resumed.images) == list(range(stop, 14))
    assert resumed.images != {step: longer.images[step] for step in range(stop, 14)}
