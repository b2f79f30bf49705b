"""A study of two arms on drawn characters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

BASE = {
    "trainer": {
        "accelerator": "cpu", "max_steps": 6, "max_epochs": -1,
        "check_val_every_n_epoch": None, "val_check_interval": 3,
    },
    "model": {
        "backbone": {"class_path": "SmallConvNet", "init_args": {"width": 4}},
        "loss": {"class_path": "ContrastiveLoss", "init_args": {"margin": 0.5}},
        "embedding_dim": 8,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
    },
    "data": {
        "class_path": "GlyphDataModule",
        "init_args": {"num_classes": 30, "batch_size": 8, "images_per_class": 2, "val_fraction": 0.2},
    },
}  # fmt: skip
MEMORY = {
    "trainer": {
        "callbacks": [
            {"class_path": "MemoryCallback", "init_args": {"size": 32}},
            {"class_path": "MemoryReport", "init_args": {"every_n_steps": 3, "sample": 8}},
        ]
    },
    "model": {"memory_loss": {"class_path": "MultiSimilarityLoss"}},
}
ARMS: dict[str, Any] = {"batch": {}, "memory": MEMORY}
CLAIMS = {
    "helps": {"says": "A memory helps.", "compare": "memory", "with": "batch", "expects": "more", "by": 90},
    "harmless": {"compare": ["memory"], "with": ["batch"], "expects": "same", "by": 95, "score": "recall_at_1"},
}
STUDY: dict[str, Any] = {"base": "base.yaml", "arms": ARMS, "seeds": [0, 1], "claims": CLAIMS}

Write = Callable[..., Path]


def write_study(folder: Path, said: dict[str, Any], base: dict[str, Any]) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    (folder / "study.yaml").write_text(yaml.safe_dump(said, sort_keys=False))
    return folder / "study.yaml"


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    return {file.name: json.loads(file.read_text()) for file in sorted((folder / "runs").glob("*.json"))}
