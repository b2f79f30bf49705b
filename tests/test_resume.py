"""Killed and resumed, a run equals the uninterrupted one bit for bit."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from support.children import run_ranks
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_memdml.callbacks.memory import MemoryCallback
from lightning_memdml.data.glyphs import GlyphDataModule
from lightning_memdml.losses.contrastive import ContrastiveLoss
from lightning_memdml.memory.instance_memory import InstanceMemory

BATCHES, EPOCHS, SAVE_EVERY = 6, 3, 3
"""18 steps; a checkpoint may fall on the last batch of an epoch (steps 6 and 12) or into its middle."""


MEMORIES: dict[int, Any] = {
    1: {"memory": InstanceMemory(momentum=0.3), "prefill": True},
    2: {"size": 50, "encoder_momentum": 0.9, "encoder_batch_norm": "running"},
}
"""By the number of ranks: a row per image, filled first; a queue written by a momentum encoder."""


class Learner(LightningModule):
    """A small network with batch statistics, and its losses written down."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9 * 9, 16)
        )
        self.loss = ContrastiveLoss()
        self.losses: dict[int, float] = {}

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        images, labels, indices = batch
        embeddings = normalize(self.net(images))
        loss = self.loss(embeddings, labels) + self.loss(embeddings, labels, *self.memory.read()[:2])
        self.losses[self.global_step] = loss.item()
        return {"loss": loss, "embeddings": embeddings, "labels": labels, "indices": indices}

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, BATCHES * EPOCHS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Kill(Callback):
    """SIGKILL of this process in the middle of step `step`, on one rank."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.global_step, trainer.global_rank) == (self.step, self.rank):
            os.kill(os.getpid(), signal.SIGKILL)


def fit(folder: Path, *callbacks: Callback, checkpoint: Path | None = None) -> dict[str, Any]:
    ranks = int(os.environ["WORLD_SIZE"])
    learner, memory = Learner(), MemoryCallback(start_step=2, encoder="net", **MEMORIES[ranks])
    glyphs = GlyphDataModule(
        num_classes=20, image_size=20, cache_dir=str(folder.parent / "glyphs"), num_workers=2,
        batch_size=16 // ranks, images_per_class=2, batches_per_epoch=BATCHES, val_fraction=0,
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp", max_epochs=EPOCHS, logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[memory, *callbacks],
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )  # fmt: skip
    trainer.fit(learner, glyphs, ckpt_path=checkpoint)
    return {"losses": learner.losses, "weights": learner.state_dict(), "memory": memory.state_dict()}


def train_until_killed(folder: Path, step: int, rank: int) -> None:
    saver = ModelCheckpoint(folder, "{step:02d}", every_n_train_steps=SAVE_EVERY, save_top_k=-1)
    fit(folder, saver, Kill(step, rank))


def train_whole_and_resumed(folder: Path) -> dict[str, Any]:
    last = max(folder.glob("*.ckpt"))
    return {"whole": fit(folder), "resumed": fit(folder, checkpoint=last)}


def different(a: Any, b: Any, name: str = "") -> list[str]:
    """Names of what is not equal to the bit."""
    if isinstance(a, dict):
        return [found for key in {**a, **b} for found in different(a.get(key), b.get(key), f"{name} {key}")]
    return [] if (torch.equal(a, b) if isinstance(a, Tensor) else a == b) else [name]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_at_a_random_step_and_resumed_equals_the_uninterrupted_one(
    ranks: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Losses, weights, memory and momentum encoder, with workers, augmentation and a schedule.

    SIGKILL hits one rank, between backward and optimiser step. The run resumes from the last checkpoint, up
    to two steps before; what was lost is computed again.
    """
    folder = tmp_path_factory.mktemp("killed")
    step, rank = random.SystemRandom().randrange(SAVE_EVERY, BATCHES * EPOCHS), ranks - 1
    run_ranks(ranks, train_until_killed, folder, step, rank, killed=rank)
    saved = len(list(folder.glob("*.ckpt")))
    assert saved == step // SAVE_EVERY
    for results in run_ranks(ranks, train_whole_and_resumed, folder):
        whole, resumed = results["whole"], results["resumed"]
        assert list(resumed["losses"]) == list(range(saved * SAVE_EVERY, BATCHES * EPOCHS)), f"killed at {step}"
        assert resumed["losses"].items() <= whole["losses"].items(), f"killed at step {step}"
        for part in ("weights", "memory"):
            assert not different(whole[part], resumed[part]), f"killed at step {step}"
