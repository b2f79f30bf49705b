"""`memdml demo` from an empty folder, and its table."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from support.children import run_python

from lightning_memdml.demo import comparison_table, demo
from lightning_memdml.packaged_configs import FOLDER

NOTICES = (("pytorch", "rank_zero"), ("fabric", "seed"))
SMALL = """--data.num_classes 20 --model.backbone.width=4 --trainer.max_steps=2 --trainer.val_check_interval=2
    --trainer.enable_progress_bar=false"""


def test_the_demo_leaves_a_table_and_a_picture_in_an_empty_folder(tmp_path: Path, glyph_cache: str) -> None:
    command = ["-m", "lightning_memdml", "demo", *SMALL.split(), "--seeds", "0", "1", "--untrained"]
    done = run_python(*command, cwd=tmp_path, env={"LIGHTNING_MEMDML_CACHE": glyph_cache})
    table = (tmp_path / "runs/demo.md").read_text(encoding="utf-8")
    assert table in done.stdout
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == ["| before training", "| glyphs_batch", "| glyphs_memory"]
    assert all(row[1] == "2" and re.fullmatch(r"\d+\.\d ± \d+\.\d", row[2]) for row in rows)
    assert min(Image.open(tmp_path / "runs/demo.png").size) > 100
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["demo.md", "demo.png"]


def test_a_wrong_name_is_refused_before_the_first_run(tmp_path: Path) -> None:
    code = (
        "import sys; from lightning_memdml.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit as e: print(e)"
    )
    done = run_python("-c", code, "demo", "--configs", "glyphs_batch", "glyphs_memry", *SMALL.split(), cwd=tmp_path)
    assert "but got 'glyphs_memry'. Did you mean 'glyphs_memory'?" in done.stdout
    assert "seed 0" not in done.stdout


def test_configurations_of_the_same_file_name_are_arms_of_their_own(tmp_path: Path, glyph_cache: str) -> None:
    """The folder of every run has a `config.yaml`."""
    for run, config in (("one", "glyphs_batch"), ("two", "glyphs_memory")):
        (tmp_path / run).mkdir()
        shutil.copy(FOLDER / f"{config}.yaml", tmp_path / run / "config.yaml")
    command = ["-m", "lightning_memdml", "demo", *SMALL.split(), "--configs", "one/config.yaml", "two/config.yaml"]
    run_python(*command, cwd=tmp_path, env={"LIGHTNING_MEMDML_CACHE": glyph_cache})
    table = (tmp_path / "runs/demo.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[:2] for line in table.splitlines()[2:]]
    assert rows == [["| one/config.yaml", "1"], ["| two/config.yaml", "1"]]


def test_a_demo_that_fails_leaves_the_notices_of_lightning_as_they_were(tmp_path: Path) -> None:
    loggers = [logging.getLogger(f"lightning.{name}.utilities.{kind}") for name, kind in NOTICES]
    before = [logger.level for logger in loggers]
    folder = [f"--picture={tmp_path}/demo.png", f"--output={tmp_path}/demo.md"]
    with pytest.raises((ValueError, SystemExit)):
        demo([*folder, "--configs", "glyphs_memry"])
    assert [logger.level for logger in loggers] == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--configs", "glyphs_batch", "glyphs_batch"], "Expected `--configs` without repeats but got glyphs_batch 2"),
        (["--seeds", "1", "0", "1"], "Expected `--seeds` without repeats but got 1 2 times"),
    ],
)
def test_the_same_run_is_not_counted_twice(options: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        demo([*options, *SMALL.split()])


@pytest.mark.parametrize(("values", "cell"), [([61.04], "61.0"), ([60.0, 62.0], "61.0 ± 1.4")])
def test_the_table_has_mean_and_sample_standard_deviation(values: list[float], cell: str) -> None:
    runs = [
        {"recall_at_1": value, "map_at_r": 1.0, "r_precision": 2.0, "ms_per_step": float("nan")} for value in values
    ]
    assert comparison_table({"arm": runs}).splitlines()[-1].startswith(f"| arm | {len(values)} | {cell} | ")
    assert comparison_table({"arm": runs}).endswith(" | - |")
