"""Strategies after which a memory would be lost are refused by name."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from support.command_line import TINY, Command

from lightning_memdml import ContrastiveLoss, MemoryCallback, MetricLearner, SmallConvNet
from lightning_memdml.callbacks.memory_setup import check_strategy
from lightning_memdml.data.glyphs import GlyphDataModule

LOST = r"Expected a strategy whose ranks keep the memory, such as ddp, but got one with the start method (spawn|fork)"
OPTIONS = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook", "ddp_spawn_find_unused_parameters_true"])
def test_spawn_fork_and_notebook_are_refused(strategy: str) -> None:
    with pytest.raises(ValueError, match=LOST):
        check_strategy(Trainer(strategy=strategy, devices=2, **OPTIONS))


@pytest.mark.parametrize("strategy", ["auto", "ddp", "ddp_find_unused_parameters_true"])
def test_other_strategies_are_not(strategy: str) -> None:
    check_strategy(Trainer(strategy=strategy, devices=1, **OPTIONS))


@pytest.mark.skipif(sys.platform != "linux", reason="starts ranks by fork")
def test_the_refusal_comes_from_a_fit_in_a_program(
    glyph_cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # torch leaves the file of the rank's error
    learner = MetricLearner(SmallConvNet(width=4), ContrastiveLoss(), embedding_dim=8)
    glyphs = GlyphDataModule(num_classes=20, batch_size=8, images_per_class=2, cache_dir=glyph_cache)
    trainer = Trainer(strategy="ddp_fork", devices=1, max_steps=1, callbacks=[MemoryCallback(size=8)], **OPTIONS)
    with pytest.raises(Exception, match=LOST):
        trainer.fit(learner, glyphs)


def test_the_command_line_refuses_before_anything_is_trained(memdml: Command) -> None:
    with pytest.raises(SystemExit, match=LOST):
        memdml(f"{TINY} --trainer.strategy=ddp_spawn --trainer.devices=2")
