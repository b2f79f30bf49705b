"""The commands print no warning that this package causes, no deprecation of others, and no advertisement."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from PIL import Image
from support.children import run_python

from lightning_memdml.commands import COMMANDS

ALL_COMMANDS = """
from lightning_memdml.cli import main

NET = "--model.backbone=SmallConvNet --model.backbone.width=4 --model.embedding_dim=8 --model.loss=ContrastiveLoss"
DATA = "--data=GlyphDataModule --data.num_classes=20 --data.batch_size=8 --data.images_per_class=2"
RUN = "--trainer.max_steps=2 --trainer.accelerator=cpu --trainer.enable_progress_bar=false"
MEMORY = "--trainer.callbacks+=MemoryCallback --trainer.callbacks.size=40 --trainer.log_every_n_steps=1"
LAST = "--ckpt_path runs/memdml/version_0/checkpoints/last.ckpt"
for command in (
    f"fit {NET} {DATA} --data.batches_per_epoch=3 {RUN} {MEMORY}",
    f"fit {LAST} --trainer.max_steps=3",
    f"validate {LAST}",
    f"test {LAST}",
    f"predict {LAST}",
    f"index {LAST}",
    f"search query.png {LAST}",
    "score --embeddings runs/memdml/version_4/embeddings.parquet",
    f"export {LAST}",
    "export-index runs/index index.parquet",
    f"weight-curves {LAST}",
    "study study.yaml",
    "configs",
    f"demo {DATA} --data.batches_per_epoch=2 {RUN} --trainer.val_check_interval=2",
    "freeze images features.npz --image_size=33 --views=2",
    "data check --data GlyphDataModule --data.num_classes 20",
):
    print("$ memdml", command, flush=True)
    main(command.split())
"""
STUDY = {"base": "base.yaml", "arms": {"a": {}, "b": {"model": {"embedding_dim": 4}}}, "seeds": [0, 1]}
BASE = {
    "trainer": {
        "accelerator": "cpu", "max_steps": 2, "max_epochs": -1,
        "check_val_every_n_epoch": None, "val_check_interval": 2,
    },
    "model": {
        "backbone": {"class_path": "SmallConvNet", "init_args": {"width": 4}},
        "loss": {"class_path": "ContrastiveLoss"},
        "embedding_dim": 8,
    },
    "data": {
        "class_path": "GlyphDataModule",
        "init_args": {"num_classes": 20, "batch_size": 8, "images_per_class": 2},
    },
}  # fmt: skip


def test_no_command_prints_a_warning_or_an_advertisement(tmp_path: Path, glyph_cache: str) -> None:
    """In a process of its own, with the filters that a user has, imports included."""
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    Image.new("L", (28, 28), 90).save(tmp_path / "query.png")
    for row in range(4):
        (tmp_path / f"images/{row}").mkdir(parents=True)
        for name in ("a.png", "b.png"):
            Image.new("RGB", (40, 40), (60 * row, 90, 30)).save(tmp_path / f"images/{row}/{name}")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    variables = {"LIGHTNING_MEMDML_CACHE": glyph_cache, "PYTHONWARNINGS": ""}
    done = run_python("-c", ALL_COMMANDS, cwd=tmp_path, env=variables)
    assert set(re.findall(r"^\$ memdml (\S+)", done.stdout, re.MULTILINE)) == set(COMMANDS), "each command is run"
    assert not re.findall(r".*(?:Warning:|[Dd]eprecated|Tip:).*", done.stderr)
