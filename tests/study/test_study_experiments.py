"""Every study in experiments/study says what it costs, plans as many runs as it says, and its arms train."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.pictures import draw_archive

from lightning_memdml.lightning_cli import MemdmlCLI
from lightning_memdml.study.plan import Plan
from lightning_memdml.study.study_command import read_study_beside
from lightning_memdml.study.training import train

FOLDER = Path(__file__).parents[2] / "experiments/study"
STUDIES = [file for file in sorted(FOLDER.glob("*.yaml")) if "arms" in yaml.safe_load(file.read_text())]
FIELDS = ("Command", "Hardware", "Cost", "Expected")
TINY = ("--data.batch_size=8", "--data.images_per_class=2", "--data.val_fraction=0", "--trainer.max_steps=4")
# The options of each kind of study that make its runs small. The characters of `cjk` need fonts and take long to draw.
OWN = {"glyphs": ("--data.num_classes=30", "--model.backbone.width=4"), "images": ()}


def header(config: Path) -> dict[str, str]:
    """The fields of the comment at the top."""
    lines = config.read_text().splitlines()
    top = " ".join(line.lstrip("# ") for line in lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")])
    names = "|".join(FIELDS)
    return dict(re.findall(rf"({names}):\s*(.+?)(?=\s(?:{names}):|$)", top))


def searched(plan: Plan) -> list[dict[str, Any]]:
    """Equal scores for all runs of the search, and for those by which it is extended."""
    found: list[dict[str, Any]] = []
    while len(found) < len(runs := plan.search_runs(found)):
        found = [{"key": run.key, "scores": {"map_at_r": 0.0}} for run in runs]
    return found


def test_every_claim_of_the_paper_has_its_study() -> None:
    names = {file.stem for file in STUDIES}
    assert {name[:8] for name in names if name.startswith("glyphs_")} == {f"glyphs_{letter}" for letter in "abcdef"}


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("missing", [[], ["grocery.npz"], ["birds.npz", "grocery.npz", "mobilenet_v1_025.pth"]])
def test_make_runs_every_study_whose_data_is_there(missing: list[str], tmp_path: Path) -> None:
    shutil.copy(FOLDER.parents[1] / "Makefile", tmp_path)
    shutil.copytree(FOLDER, tmp_path / "experiments/study")
    (tmp_path / "data").mkdir()
    for name in {"birds.npz", "grocery.npz", "mobilenet_v1_025.pth"} - {*missing}:
        (tmp_path / "data" / name).touch()
    command = ["make", "--dry-run", "--old-file=install", "study"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60).stdout
    *notices, studying = [line for line in printed.splitlines() if "experiments/study/" in line]
    kept = {file.name for file in STUDIES if not (missing and file.name.startswith("images_"))}
    assert {Path(word).name for word in studying.split() if word.endswith(".yaml")} == kept
    assert all("Missing: " + " ".join(f"data/{name}" for name in missing) in notice for notice in notices)
    assert len(notices) == bool(missing)


@pytest.mark.parametrize("config", STUDIES, ids=lambda file: file.stem)
def test_header_tells_command_hardware_cost_and_expected_result(config: Path) -> None:
    said = header(config)
    assert set(said) == set(FIELDS)
    assert shlex.split(said["Command"])[:3] == ["memdml", "study", f"experiments/study/{config.name}"]


@pytest.mark.parametrize("config", STUDIES, ids=lambda file: file.stem)
def test_study_plans_the_runs_it_says(config: Path) -> None:
    """All arms are parsed to the last option, their budgets compared, and the runs of the header counted."""
    study = read_study_beside(config)
    plan = Plan(study, MemdmlCLI)
    searching = plan.search_runs()
    stand_in = searched(plan)
    cost = header(config)["Cost"]
    assert int(re.findall(r"(\d+) runs", cost)[0]) == len(plan.test_runs(stand_in))
    assert [int(number) for number in re.findall(r"(\d+) of the search", cost)] == [len(searching)] * bool(searching)
    assert len(study.seeds) >= (5 if re.match("glyphs_[a-d]", config.stem) else 3)
    assert study.claims, "a study answers a question"


@pytest.mark.parametrize("config", [f for f in STUDIES if f.stem.split("_")[0] in OWN], ids=lambda file: file.stem)
def test_arms_train(config: Path, tmp_path: Path, glyph_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps of two arms, with a memory from the second on, and a score."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_MEMDML_CACHE", glyph_cache)
    monkeypatch.setattr(sys, "argv", ["memdml"])
    Path("data").mkdir()
    for name in ("birds", "grocery"):
        draw_archive(Path(f"data/{name}.npz"))
    study = read_study_beside(config)
    if config.stem.startswith("images"):
        network = import_module("mobilenet_v1").MobileNetV1()
        torch.save(network.state_dict(), "data/mobilenet_v1_025.pth")
    plan = Plan(study, MemdmlCLI, (*TINY, *OWN[config.stem.split("_")[0]]))
    runs = plan.test_runs(searched(plan))
    for run in (runs[1], runs[len(study.arms) - 1]):
        for callback in run.config["trainer"]["callbacks"] or []:
            if callback["class_path"].endswith("MemoryCallback"):
                callback["init_args"]["start_step"] = 1
        record = train(run, MemdmlCLI, tmp_path)
        assert record["steps"] == 4
        assert 0 <= record["scores"]["map_at_r"] <= 1
        assert set(record["weights"]) == {"batch", "memory"} if run.config["model"]["memory_loss"] else {"batch"}
