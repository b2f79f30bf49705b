"""A short form of `experiments/kill_and_resume.py`, which kills commands at random moments."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.children import load, python_path

SCRIPT = Path(__file__).parents[1] / "experiments/kill_and_resume.py"
pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes in /proc")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load(str(SCRIPT))


@pytest.mark.parametrize(("kind", "cycles"), [("cache", 3), ("index", 1)])
def test_killed_and_started_again_it_is_complete(
    kind: str,
    cycles: int,
    script: ModuleType,
    tmp_path: Path,
    glyph_cache: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LIGHTNING_MEMDML_CACHE", glyph_cache)
    monkeypatch.setenv("PYTHONPATH", python_path())
    outcome = script.kill_and_resume(kind, tmp_path, cycles, seed=None, minutes=10)
    assert outcome.different == []
    assert outcome.finished >= 1


def test_a_difference_is_found(script: ModuleType) -> None:
    saved = {"state_dict": {"a": torch.ones(2)}, "optimizer_states": [{}], "lr_schedulers": [], "global_step": 3,
             "epoch": 0, "callbacks": {"MemoryCallback": {"memory": {"labels": torch.arange(3)}}}}  # fmt: skip
    assert script.different_parts(saved, saved) == []
    other = {**saved, "state_dict": {"a": torch.tensor([1.0, 1.0 + 2**-23])}, "callbacks": {"MemoryCallback": {}}}
    assert script.different_parts(saved, other) == ["state_dict", "MemoryCallback"]
