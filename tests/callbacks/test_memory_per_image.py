"""InstanceMemory and RingMemory through the real Trainer in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from support.momentum_training import BATCH, IMAGES, Learner, fit, same
from torch import Tensor

from lightning_memdml.callbacks.memory import MemoryCallback
from lightning_memdml.memory.instance_memory import InstanceMemory
from lightning_memdml.memory.ring_memory import RingMemory


def test_instance_memory_holds_every_image_once_and_resumes_exactly(tmp_path: Path) -> None:
    """Its size is the number of training images, found by the callback."""
    whole, parts = Learner(), Learner()
    through, resumed = (MemoryCallback(memory=InstanceMemory(momentum=0.6)) for _ in range(2))
    fit(whole, through, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=3)
    assert through.memory.size == IMAGES
    assert through.memory.read()[2].tolist() == list(range(IMAGES))
    assert through.memory.steps.tolist() == [12 + index // BATCH for index in range(IMAGES)]
    fit(parts, resumed, ckpt=tmp_path / "epoch=0.ckpt", max_epochs=3)
    assert parts.losses == whole.losses[6:]
    assert same(through.state_dict(), resumed.state_dict())


def test_a_ring_memory_resumes_exactly_and_trains_as_a_queue(tmp_path: Path) -> None:
    whole, parts, queue = Learner(), Learner(), Learner()
    through, resumed = (MemoryCallback(memory=RingMemory(20)) for _ in range(2))
    fit(whole, through, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=3)
    fit(parts, resumed, ckpt=tmp_path / "epoch=0.ckpt", max_epochs=3)
    assert parts.losses == whole.losses[6:]
    assert same(through.state_dict(), resumed.state_dict())
    fit(queue, MemoryCallback(size=20), max_epochs=3)
    assert queue.losses == pytest.approx(whole.losses, rel=1e-4)


def test_instance_memory_needs_indices_and_the_error_shows_the_line() -> None:
    class Nameless(Learner):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            outputs = super().training_step(batch, batch_idx)
            return {name: outputs[name] for name in ("loss", "embeddings", "labels")}

    with pytest.raises(ValueError, match=r'which image each row is of.*"indices": indices'):
        fit(Nameless(), MemoryCallback(memory=InstanceMemory(size=IMAGES)))


def test_a_memory_has_its_own_size_and_dtype() -> None:
    for options in ({"size": 5}, {"dtype": "float16"}):
        with pytest.raises(
            ValueError, match="Expected `size` and `dtype`, or a `memory`, which has its own, but got both"
        ):
            MemoryCallback(memory=InstanceMemory(5), **options)
