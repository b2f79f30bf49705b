"""The checks of a GPU run on a CPU at tiny sizes, and their rules follow from the rows."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.children import ChildError, load, run_python

SCRIPT = Path(__file__).parents[2] / "experiments/benchmarks/gpu_checks.py"
RUN = """
import runpy, sys
for name in ("jsonargparse", "yaml", "lightning_memdml.cli", "lightning_memdml.lightning_cli"):
    sys.modules[name] = None  # importing it fails, as if it were not installed
script, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, str(__import__("pathlib").Path(script).parent))
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return load(str(SCRIPT))


def test_every_section_runs_on_a_cpu_without_the_command_line(tmp_path: Path) -> None:
    output = tmp_path / "gpu.md"
    run_python("-c", RUN, SCRIPT, "--device", "cpu", "--output", output)
    rows = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    measured = dict.fromkeys(row["section"] for row in rows)
    assert list(measured) == ["ceilings", "losses", "rivals", "enqueue", "blocks", "bounds", "retrieval"]
    text = output.read_text()
    assert all(f"## {section}\n" in text for section in measured)
    assert "| 16 | 512 | 32 | trained | triplet, soft |" in text
    errors = [row["error"] for row in rows if "error" in row]
    assert len(errors) == 4
    assert max(errors) < 1e-4


def test_a_machine_without_a_gpu_is_refused() -> None:
    with pytest.raises(ChildError, match=r"Expected a CUDA GPU but torch finds none\. Pass `--device cpu`"):
        run_python(SCRIPT, env={"CUDA_VISIBLE_DEVICES": ""})


def rows(triton: float = 0.5, wall: float = 1.0, error: float = 1e-4, dim: int = 128, **others: Any) -> list[dict]:
    size = {"batch": 64, "memory": 65_536, "dim": dim, "method": "contrastive"}
    loss = {**size, "section": "losses", "regime": "trained"}
    fused = {"failed": "a shape"} if others.get("broken") else {"device": triton, "wall": wall, "error": error}
    return [
        {**loss, "method": "floor", "device": 0.1},
        {**loss, "backend": "blocks", "device": 1.0, "wall": 1.0, "error": error},
        {**loss, "backend": "triton", **fused},
        {**loss, "backend": "triton_blocks", "device": others.get("between", 0.6), "wall": 1.0, "error": 1e-4},
        *(
            {**size, "section": "lists", "regime": regime, "lists": has_lists, "device": taken if has_lists else 1.0}
            for regime, taken in (("trained", others.get("few", 0.5)), ("untrained", others.get("all", 1.05)))
            for has_lists in (True, False)
        ),
        {**size, "section": "rivals", "device": others.get("compiled", 2.0)},
        {**size, "section": "graphs", **({"failed": "a wait"} if others.get("failed") else {"device": 0.1})},
        {"section": "enqueue", "waits": others.get("waits", 1)},
    ]


def answers(script: ModuleType, given: list[dict]) -> list[str]:
    return [line.rsplit(": ", 1)[1] for line in script.verdicts(given)]


def test_the_rules_follow_from_what_was_measured(script: ModuleType) -> None:
    assert answers(script, []) == ["not measured."] * 8
    right = ["yes.", "`triton`.", "not measured.", *["yes."] * 5]
    assert answers(script, rows()) == right
    wrong = (rows(error=3e-3), rows(few=0.9), rows(all=1.2), rows(compiled=0.9), rows(failed=True), rows(waits=2))
    for number, given in zip((0, 3, 4, 5, 6, 7), wrong, strict=True):
        assert answers(script, given) == ["**no**." if k == number else right[k] for k in range(8)]
    assert answers(script, rows(broken=True))[:2] == ["**no**.", "`triton_blocks`."]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"triton": 0.6, "between": 0.5}, "triton"),
        ({"triton": 0.7, "between": 0.5}, "triton_blocks"),
        ({"triton": 0.7, "between": 0.9}, "triton"),
        ({"triton": 0.9, "between": 0.8}, "triton_blocks"),
        ({"triton": 0.5, "wall": 1.2, "between": 0.9}, "blocks"),
        ({"triton": 0.9, "between": 0.9}, "blocks"),
    ],
)
def test_a_default_is_chosen_for_narrow_and_for_wide_rows(script: ModuleType, given: dict, expected: str) -> None:
    narrow, wide = answers(script, rows(**given) + rows(dim=512))[1:3]
    assert (narrow, wide) == (f"`{expected}`.", "`triton`.")
    narrow, wide = answers(script, rows() + rows(**given, dim=512))[1:3]
    assert (narrow, wide) == ("`triton`.", f"`{expected}`.")
