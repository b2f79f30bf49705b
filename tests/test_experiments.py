"""Every configuration in experiments/ says what it is, and trains."""

from __future__ import annotations

import importlib.util
import io
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lightning_memdml import data
from lightning_memdml.cli import main

_spec = importlib.util.spec_from_file_location("trees", Path(__file__).parent / "data/trees.py")
trees = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trees)

FOLDER = Path(__file__).parents[1] / "experiments"
CONFIGS = [file for file in sorted(FOLDER.glob("*.yaml")) if "arms" not in yaml.safe_load(file.read_text())]
SMALL = "--data.batch_size=8 --data.images_per_class=2 --data.num_workers=0 --data.val_fraction=0.2"
SHORT = "--trainer.accelerator=cpu --trainer.max_steps=2 --trainer.val_check_interval=2 --trainer.log_every_n_steps=1"


def header(config: Path) -> str:
    """The comment at the top, in one line."""
    lines = config.read_text().splitlines()
    top = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(line.lstrip("# ") for line in top)


def image_archive(path: Path, classes: int = 14, images: int = 3) -> None:
    """A table of tiny JPEG files, as `TableDataModule` reads it."""
    files = []
    for index in range(classes * images):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 36), (17 * (index // images), 80, 5 * index)).save(buffer, "JPEG")
        files.append(np.frombuffer(buffer.getvalue(), dtype=np.uint8))
    offset = np.cumsum([0, *(len(file) for file in files)])
    np.savez(path, jpeg=np.concatenate(files), offset=offset, label=np.repeat(np.arange(classes), images))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda file: file.stem)
def test_header_tells_command_hardware_cost_and_expected_result(config: Path) -> None:
    said = header(config)
    fields = dict(
        re.findall(r"(Command|Hardware|Cost|Expected):\s*(.+?)(?=\s(?:Command|Hardware|Cost|Expected):|$)", said)
    )
    assert set(fields) == {"Command", "Hardware", "Cost", "Expected"}
    command = shlex.split(fields["Command"])
    assert command[:4] == ["memdml", "fit", "--config", f"experiments/{config.name}"]
    for result in re.findall(r"experiments/results/\S+\.\w+", fields["Expected"]):
        assert (FOLDER.parent / result).is_file()


@pytest.mark.filterwarnings("ignore:.*Scores are not comparable")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda file: file.stem)
def test_configuration_trains(config: Path, tmp_path: Path, glyph_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps on tiny data of its own kind, in place of ResNet-50 with a small network; all else is as it stands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["memdml"])
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # which a run sets
        monkeypatch.setenv(name, "0")
    name = yaml.safe_load(config.read_text())["data"]["class_path"]
    if name == "GlyphDataModule":
        own = f"--data.num_classes=20 --data.cache_dir={glyph_cache}"
    elif name == "TableDataModule":
        image_archive(tmp_path / "tiny.npz")
        own = f"--data.path={tmp_path / 'tiny.npz'} --data.image_size=33"
    else:
        own = f"--data.root={trees.TREES[name](tmp_path / 'tree')}"
        if name != "Omniglot":  # a small network, and no weights, which would have to be downloaded
            own += " --data.image_size=33 --model.weights=null --model.backbone=mobilenet_v3_small"
    main(["fit", f"--config={config}", *f"{SMALL} {SHORT} {own}".split(), "--trainer.enable_progress_bar=false"])
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["global_step"] == 2
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_every_benchmark_has_a_configuration_with_its_recall_levels() -> None:
    """The levels that papers report, in the configuration as in the data module."""
    found = set()
    for config in CONFIGS:
        said = yaml.safe_load(config.read_text())
        name = said["data"]["class_path"]
        if name in trees.TREES:
            found.add(name)
            assert tuple(said["model"]["k"]) == getattr(data, name).recall_levels, config.name
    assert found == set(trees.TREES)
