"""A study of two arms on drawn characters, and results of made-up scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lightning_memdml.study.results import Results
from lightning_memdml.study.study_file import read_study

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


# ---------------------------------------------------------------- made-up scores
SEEDS = 5
CLAIM = {"compare": "a", "with": "b", "expects": "more", "by": 1}


def results(
    folder: Path, means: dict[str, dict[str, float]], references: tuple[dict[str, Any], ...] = (), **changes: Any
) -> Results:
    """A study with these mean scores (data set -> arm -> points), and a spread of about half a point over seeds."""
    (folder / "base.yaml").write_text("data: GlyphDataModule\n")
    arms = {arm: {} for arm in next(iter(means.values()))}
    content = {
        "base": "base.yaml", "arms": arms, "data": {name: {} for name in means}, "seeds": [*range(SEEDS)],
        "claims": {"claim": CLAIM}, **changes,
    }  # fmt: skip
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    draws = np.random.default_rng(0)
    records = [
        {
            "stage": "test", "arm": arm, "data": data, "seed": seed, "choice": {}, "ms_per_step": 1.0,
            "diverged": False, "steps": 1, "images_per_step": 1, "seconds": 1.0, "finished": "", "key": "",
            "made_by": {"commit": None, "versions": {"torch": "2"}, "hardware": "x", "threads": 1},
            "scores": {
                "map_at_r": (mean + draws.normal(0, 0.5)) / 100, "recall_at_1": (mean + 20) / 100, "r_precision": 0.0
            },
        }
        for data, scores in means.items()
        for arm, mean in scores.items()
        for seed in range(SEEDS)
    ]  # fmt: skip
    return Results(read_study(folder / "study.yaml"), records, referenced=references)


def frozen(data: str, map_at_r: float, recall_at_1: float) -> dict[str, Any]:
    """The finished run that scored the features before the training."""
    scores = {"map_at_r": map_at_r / 100, "recall_at_1": recall_at_1 / 100}
    return {"data": data, "references": {"untrained network": {"map_at_r": 0.01}, "frozen features": scores}}
