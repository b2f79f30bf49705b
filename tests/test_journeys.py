"""The script of the journeys: its pictures, its programs, and the times it notes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from support.children import load

SCRIPT = Path(__file__).parents[1] / "experiments/journeys.py"


@pytest.fixture(scope="module")
def script() -> Any:
    return load(str(SCRIPT))


def test_five_journeys_from_432_pictures_of_24_classes(script: Any, tmp_path: Path) -> None:
    assert script.write_pictures(tmp_path, None) == "23"
    assert len(list((tmp_path / "pictures").iterdir())) == 24
    assert len(list(tmp_path.rglob("*.jpg"))) == 432
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 433
    found = {journey.name: journey for journey in script.journeys(None)}
    assert list(found) == ["folder", "table", "LightningModule", "pytorch-metric-learning", "timm"]
    for journey in found.values():
        for name, program in journey.programs.items():
            compile(program, name, "exec")
    assert found["folder"].lines == 0
    assert found["pytorch-metric-learning"].lines == 16


def test_the_first_number_and_picture_are_noted(script: Any, tmp_path: Path) -> None:
    program = "print('Recall@1 25.0 %', flush=True)\nopen('map.png', 'w').close()\n"
    journey = script.Journey("any", ["python a.py", "python missing.py"], {"a.py": program})
    script.walk(journey, tmp_path, "23", dict(os.environ))
    assert set(journey.first) == {"number", "picture"}
    assert 0 < journey.first["number"] < 60
    assert "missing.py" in journey.failed
