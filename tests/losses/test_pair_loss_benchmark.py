"""The benchmark of the losses runs with torch alone, and its switches reach what they are to change."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.children import load, run_python

from lightning_memdml.losses import streaming

SCRIPT = Path(__file__).parents[2] / "experiments" / "benchmarks" / "pair_loss.py"
RUN = """
import runpy, sys
for name in ("jsonargparse", "yaml", "pytorch_metric_learning"):
    sys.modules[name] = None  # importing it fails, as if it were not installed
script, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, str(__import__("pathlib").Path(script).parent))
from lightning_memdml.losses import streaming
runpy.run_path(script, run_name="__main__")
print("block", streaming.BLOCK_ELEMENTS)
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return load(str(SCRIPT))


def test_on_a_gpu_it_measures_the_kernels_too(script: ModuleType) -> None:
    references: Any = SimpleNamespace(is_cuda=True, dtype=torch.float16)
    labels = torch.arange(4)
    steps = script.ours((labels, labels, references, labels), ["contrastive"], with_copy=False)
    assert list(steps) == ["contrastive", "contrastive (triton)", "contrastive (triton_blocks)"]


def test_the_size_of_a_block_reaches_both_ways_to_compute_in_blocks(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="comes with torch for CUDA")
    from lightning_memdml.losses.backends.triton import elementwise, kernel

    for module in (streaming, elementwise):
        monkeypatch.setattr(module, "GPU_BLOCK_ELEMENTS", 0)
    monkeypatch.setattr(kernel, "TILES", kernel.TILES)
    options = SimpleNamespace(block=4096, device="cuda", no_bfloat16=False, tiles=[64, 32, 8, 4])
    script.set_engine(options)
    assert (streaming.GPU_BLOCK_ELEMENTS, elementwise.GPU_BLOCK_ELEMENTS) == (4096, 4096)
    assert all(tiles == [kernel.Tiles(64, 32, 8, 4)] for tiles in kernel.TILES.values())


def test_it_runs_without_the_command_line_and_writes_a_row_per_method(tmp_path: Path) -> None:
    rows, profiles = tmp_path / "rows.jsonl", tmp_path / "profiles.txt"
    options = (
        "--batch 8 --memory 512 --dim 16 --rounds 1 --regime trained --losses contrastive --max-shared memory "
        f"--block 4096 --json {rows} --profile {profiles}"
    )
    done = run_python("-c", RUN, SCRIPT, *options.split())
    assert done.stdout.splitlines()[-1] == "block 4096"
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    masked = ["contrastive (masked torch)", "multi-similarity, mined (masked torch)"]
    assert [row["method"] for row in found] == ["contrastive", *masked]
    assert all(row["clock"] == "cpu" and row["ratio"] > 0 for row in found)
    assert "aten::mm" in profiles.read_text()


def test_it_compares_numbers_of_threads_in_one_run(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    options = (
        "--batch 8 --memory 512 --dim 16 --rounds 1 --regime trained --losses contrastive --ours-only "
        f"--threads 1 2 --json {rows}"
    )
    done = run_python("-c", RUN, SCRIPT, *options.split())
    one, two = (json.loads(line) for line in rows.read_text().splitlines())
    assert (one["threads"], two["threads"]) == (1, 2)
    assert one["clock"] == two["clock"] == "elapsed"
    assert one["gain"] == one["floor_gain"] == 1
    assert two["gain"] == round(one["ms"] / two["ms"], 2)
    assert two["floor_gain"] == round(one["floor_ms"] / two["floor_ms"], 2)
    assert f"{two['ratio']}, gain {two['gain']}" in done.stdout
