"""Checkpoints and index folders of version 0.1 still open: what they say, and what is computed from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lightning_memdml import MetricLearner
from lightning_memdml.cli import main

OLD = Path(__file__).parent / "fixtures" / "version_0_1"


@pytest.mark.parametrize("name", ["queue", "instance"])
def test_an_old_checkpoint_gives_the_same_embeddings(name: str) -> None:
    images = torch.linspace(0, 1, 4 * 28 * 28).reshape(4, 1, 28, 28).sin()
    learner = MetricLearner.load_from_checkpoint(OLD / f"{name}.ckpt").eval()
    with torch.no_grad():
        torch.testing.assert_close(learner(images), torch.load(OLD / "embeddings.pt")[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["queue", "instance"])
def test_an_old_run_goes_on(name, run_in, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copy(OLD / f"{name}.ckpt", tmp_path / "old.ckpt")
    with run_in(tmp_path):
        main(["fit", "--ckpt_path", "old.ckpt", "--trainer.max_steps", "8"])
    (last,) = tmp_path.glob("runs/**/last.ckpt")
    before, after = (torch.load(path, weights_only=True) for path in (tmp_path / "old.ckpt", last))
    (old,), (new,) = (
        [state["memory"] for key, state in checkpoint["callbacks"].items() if key.startswith("MemoryCallback")]
        for checkpoint in (before, after)
    )
    assert (before["global_step"], after["global_step"]) == (6, 8)
    assert new["batches"] == old["batches"] + 2, "the memory did not go on from its rows"
    assert len(new["labels"]) >= len(old["labels"])


def test_an_old_index_is_searched(run_in, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(OLD / "index", tmp_path / "index")
    with run_in(tmp_path):
        main(
            ["search", str(OLD / "photos" / "a" / "0.png"), "--index", "index", "--ckpt_path", str(OLD / "queue.ckpt")]
        )
    found = [line.split() for line in capsys.readouterr().out.splitlines() if "/srv/photos" in line]
    assert found[0] == ["1", "1.0000", "a", "/srv/photos/a/0.png"]
    assert [row[2] for row in found] == ["a", "b", "b", "b", "a", "a"]
    assert [float(row[1]) for row in found[1:]] == pytest.approx([0.9946, 0.9941, 0.9903, 0.9881, 0.9850], abs=2e-4)
