"""`memdml study` where it is killed, changed or fails: which runs are kept, and which are trained again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.children import PATIENCE, failure
from support.studies import ARMS, MEMORY, Write, finished

from lightning_memdml.lightning_cli import MemdmlCLI
from lightning_memdml.study import runner
from lightning_memdml.study.plan import Plan
from lightning_memdml.study.runner import FailedRunsError
from lightning_memdml.study.study_command import run_study
from lightning_memdml.study.study_file import read_study


def alive(pid: int) -> bool:
    """Whether a process is there, and not only waiting to be forgotten."""
    status = Path(f"/proc/{pid}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the workers of a process in /proc")
def test_killed_study_of_two_processes_leaves_whole_files_and_no_process(write: Write) -> None:
    path = write(seeds=[0, 1, 2])
    command = [sys.executable, "-m", "lightning_memdml", "study", str(path), "--output", ".", "--processes", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = Path("log.txt")
    with log.open("w") as file, subprocess.Popen(command, env=env, stdout=file, stderr=file) as study:
        deadline = time.monotonic() + PATIENCE
        while not list(Path("study").glob("runs/*.json")):
            if study.poll() is not None or time.monotonic() > deadline:
                raise failure(f"study ended with {study.poll()}", log.read_text())
            time.sleep(0.05)
        children = Path(f"/proc/{study.pid}/task/{study.pid}/children").read_text().split()
        study.send_signal(signal.SIGKILL)
    runs = finished(Path("study"))
    assert 0 < len(runs) < 6
    assert {run["steps"] for run in runs.values()} == {6}
    deadline = time.monotonic() + PATIENCE  # a worker that was just started first has to import
    while any(alive(int(child)) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_study_stops_at_its_time_limit_and_continues_later(
    write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No run is started after the limit; the second call trains what the first one left."""
    path, train, now = write(seeds=[0, 1, 2], claims={}), runner.train, [0.0]

    def train_for_a_minute(*arguments: Any) -> dict[str, Any]:
        now[0] += 60
        return train(*arguments)

    monkeypatch.setattr(runner, "train", train_for_a_minute)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    run_study(path, MemdmlCLI, output="out", time_limit=1.5)
    assert len(finished(Path("out"))) == 2
    assert "Stopped after 1.5 minutes. Run the same command again to continue." in capsys.readouterr().out
    run_study(path, MemdmlCLI, output="out", time_limit=100)
    assert len(finished(Path("out"))) == 6
    assert "Stopped" not in capsys.readouterr().out


def test_changed_arm_is_the_only_one_that_runs_again(write: Write) -> None:
    """A run is known by its whole configuration; how it is watched is no part of it."""

    def keys(path: Path, *options: str) -> dict[str, set[str]]:
        runs = Plan(read_study(path), MemdmlCLI, options).test_runs([])
        return {arm: {run.key for run in runs if run.arm == arm} for arm in ARMS}

    first = keys(write())
    assert keys(write()) == first
    assert keys(write(title="Other words", claims={})) == first
    assert keys(write(), "--trainer.log_every_n_steps=3", "--data.num_workers=1") == first
    changed = {**MEMORY, "model": {"memory_loss": {"class_path": "MultiSimilarityLoss", "init_args": {"alpha": 3}}}}
    second = keys(write(arms={**ARMS, "memory": changed}))
    assert second["batch"] == first["batch"]
    assert not second["memory"] & first["memory"]
    third = keys(write(), "--model.embedding_dim=16")
    assert not (third["batch"] | third["memory"]) & (first["batch"] | first["memory"])


def test_function_of_the_user_that_changed_makes_its_arm_run_again(write: Write, tmp_path: Path) -> None:
    weighted = {"model": {"loss": {"class_path": "DirectWeightLoss", "init_args": {"negative": "own_weights.hard"}}}}
    path = write(arms={"batch": {}, "own": weighted}, claims={})
    module = tmp_path / "own_weights.py"
    sys.path.append(str(tmp_path))
    keys = []
    for exponent in (1, 2):
        module.write_text(f"def hard(similarity):\n    return similarity.clamp_min(0) ** {exponent}\n")
        runs = Plan(read_study(path), MemdmlCLI).test_runs([])
        keys.append({run.arm: run.key for run in runs if run.seed == 0})
    assert keys[0]["batch"] == keys[1]["batch"]
    assert keys[0]["own"] != keys[1]["own"]


def test_unequal_budgets_are_refused(write: Write) -> None:
    larger = {"data": {"init_args": {"batch_size": 16}}}
    fewer = {"data": {"init_args": {"batch_size": 16}}, "trainer": {"max_steps": 3}}
    longer = {"trainer": {"max_steps": 7}}

    def plan(**changes: Any) -> Plan:
        return Plan(read_study(write(claims={}, **changes)), MemdmlCLI)

    for arm in (larger, fewer, longer):
        with pytest.raises(
            ValueError,
            match=r"Expected equal steps and images per step in all arms \(`equal: budget`\) but .*batch 6 st",
        ):
            plan(arms={"batch": {}, "other": arm})
    assert plan(arms={"batch": {}, "other": fewer}, equal="images")
    with pytest.raises(ValueError, match="Expected equal images in total in all arms"):
        plan(arms={"batch": {}, "other": larger}, equal="images")
    assert plan(arms={"batch": {}, "other": larger}, equal="steps")
    with pytest.raises(ValueError, match="Expected equal optimiser steps in all arms"):
        plan(arms={"batch": {}, "other": longer}, equal="steps")
    accumulated = {"trainer": {"accumulate_grad_batches": 2, "max_steps": 3}}
    assert plan(arms={"batch": {}, "other": accumulated}, equal="images")
    with pytest.raises(ValueError, match=r"expected `trainer.max_steps` above 0 and `trainer.max_epochs: -1`"):
        plan(arms={"batch": {"trainer": {"max_epochs": 2}}})
    with pytest.raises(ValueError, match="expected one device per run but got devices=2"):
        plan(arms={"batch": {"trainer": {"devices": 2}}})
    options = {"size": {"data.init_args.batch_size": [8, 16]}}
    with pytest.raises(ValueError, match="a search that does not change the budget"):
        plan(search={"options": options})


def test_training_that_stops_early_is_a_failed_run_and_the_others_are_kept(write: Write) -> None:
    """Equal budgets are looked at again after the training, where no configuration can hide them."""
    early = {"trainer": {"callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/map_at_r",
             "stopping_threshold": 0.0, "check_finite": False, "mode": "max"}}]}}  # fmt: skip
    path = write(arms={"stops": early, "batch": {}}, seeds=[0], claims={})
    with pytest.raises(FailedRunsError, match="1 of 2 runs failed") as failure:
        run_study(path, MemdmlCLI, output="out")
    (reason,) = re.findall(
        r"stops on Glyph, seed 0: .*Expected 6 optimiser steps but got 3\..*\((out/failed/\S+)\)", str(failure.value)
    )
    assert "Traceback" in Path(reason).read_text()
    assert [run["arm"] for run in finished(Path("out")).values()] == ["batch"]
    assert "1 of 2 runs" in Path("out/report.md").read_text()


def test_runs_on_data_that_cannot_be_read_are_not_started_and_those_on_other_data_are(write: Write) -> None:
    """Without this, every run fails with the same message."""
    missing = {
        "class_path": "FolderDataModule",
        "init_args": {"root": "nowhere", "batch_size": 8, "images_per_class": 2},
    }
    data = {"missing": {"data": missing}, "glyphs": {}}
    path = write(arms={"batch": {}, "memory": MEMORY}, data=data, seeds=[0, 1], claims={})
    with pytest.raises(FailedRunsError, match="1 of 8 runs failed") as failure:
        run_study(path, MemdmlCLI, output="out")
    said = str(failure.value)
    assert re.search(r"the network before the training, on missing: .*nowhere, which does not exist", said)
    assert said.endswith("4 runs on missing were not started: they would fail in the same way.")
    assert sorted(run["data"] for run in finished(Path("out")).values()) == ["glyphs"] * 4


@pytest.mark.filterwarnings("ignore:.* NaN, infinite or zero")
def test_run_that_diverges_is_a_losing_result_and_no_accident(write: Write) -> None:
    """Its weights retrieve nothing: it is scored 0, marked, and never chosen by a search."""
    wild = {"model": {"optimizer": {"init_args": {"lr": 1e30}}}}
    results = run_study(
        write(arms={"wild": [MEMORY, wild], "batch": {}}, seeds=[0], claims={}), MemdmlCLI, output="out"
    )
    (run,) = results.of("wild", "Glyph")
    assert run["diverged"]
    assert set(run["scores"]) >= {"map_at_r", "recall_at_1"}
    assert set(run["scores"].values()) == {0.0}
    assert not results.of("batch", "Glyph")[0]["diverged"]
    assert re.search(r"\| wild \| 1, 1 diverged \| 0\.0 ", Path("out/report.md").read_text())
