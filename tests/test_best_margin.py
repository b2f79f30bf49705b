"""The margin search of experiments/best_margin.py: what it trains and chooses, and that it goes on where it was."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
# Validation MAP@R of each arm at each margin; the test classes would choose otherwise.
VALIDATION = {"glyphs_batch": {0.5: 20.0, 0.7: 30.0}, "glyphs_memory": {0.5: 40.0, 0.7: 10.0}}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import best_margin

    loggers = [logging.getLogger(name) for name in best_margin.TALKATIVE]
    levels = [logger.level for logger in loggers]
    yield best_margin
    for logger, level in zip(loggers, levels, strict=True):  # which the script lowers for its process
        logger.setLevel(level)


def search(script: Any, monkeypatch: pytest.MonkeyPatch, record: Path) -> list[tuple[str, int, float, str]]:
    """Run the script with trainings that are answered from the table above; return those that were asked for."""
    trained = []

    def train(config: str, arguments: list[str], seed: int, margin: float, stage: str) -> dict[str, float]:
        arm = Path(config).stem
        trained.append((arm, seed, margin, stage))
        score = VALIDATION[arm][margin] if stage == "val" else 50 - 10 * margin + seed
        return {"recall_at_1": 2 * score, "map_at_r": score, "r_precision": score, "ms_per_step": 5.0}

    monkeypatch.setattr(script, "train", train)
    configs = [str(EXPERIMENTS / f"{arm}.yaml") for arm in VALIDATION]
    options = ["--margins", "0.5", "0.7", "--seeds", "0", "1", "--record", str(record)]
    monkeypatch.setattr(sys, "argv", ["best_margin.py", *configs, *options])
    script.main()
    return trained


def test_each_arm_is_tested_with_the_margin_that_was_best_on_validation_classes(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = search(script, monkeypatch, tmp_path / "record.jsonl")
    searched = [(arm, 100, margin, "val") for arm in VALIDATION for margin in (0.5, 0.7)]
    assert [run for run in trained if run[3] == "val"] == searched
    tested = [run[:3] for run in trained if run[3] == "test"]
    assert tested == [("glyphs_batch", seed, 0.7) for seed in (0, 1)] + [
        ("glyphs_memory", seed, 0.5) for seed in (0, 1)
    ]
    said = capsys.readouterr().out
    assert "| glyphs_batch | 20.0 | **30.0** |" in said
    assert "| glyphs_memory | 0.5 | 2 | 91.0 ± 1.4 | 45.5 ± 0.7 | 45.5 ± 0.7 | 5.0 |" in said


def test_a_search_that_was_stopped_repeats_nothing_that_is_recorded(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = tmp_path / "record.jsonl"
    everything = search(script, monkeypatch, record)
    lines = record.read_text().splitlines()
    assert [json.loads(line)["margin"] for line in lines] == [margin for _, _, margin, _ in everything]
    record.write_text("\n".join(lines[:3]) + "\n")
    assert search(script, monkeypatch, record) == everything[3:]
    assert search(script, monkeypatch, record) == []
