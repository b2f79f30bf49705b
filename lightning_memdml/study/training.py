"""One run of a study: trains a configuration, scores it, and records commit, versions and hardware."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import time
from collections.abc import Sequence
from copy import deepcopy
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from lightning_memdml.study.budgets import budget_of
from lightning_memdml.study.isolation import isolated
from lightning_memdml.study.overrides import Config
from lightning_memdml.study.plan import CLI, Record, Run
from lightning_memdml.study.probing import prepare_probe
from lightning_memdml.study.recording import DivergedError, RunRecorder, has_diverged
from lightning_memdml.verbosity import quiet

PACKAGE = Path(__file__).parents[1]
LIBRARIES = ("lightning-memdml", "lightning", "torch", "torchvision", "numpy")


def train(run: Run, cli: CLI, folder: Path, max_steps: int | None = None) -> Record:
    """Train and score a run. Only its callbacks write files, into `folder`.

    Args:
        run: The run.
        cli: Builds learner, data and Trainer from the configuration; a `SharedCLI` shares them between runs.
        folder: Folder for the files of the run's callbacks.
        max_steps: Stop after this number of steps without scoring, to measure the time of a step: see `prepare_probe`.

    Raises:
        ValueError: If the training stopped early, or a search run has no validation classes.
    """
    config = deepcopy(run.config)
    config["trainer"] |= {
        "devices": 1,
        "logger": False,
        "default_root_dir": str(folder),
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    if max_steps is not None:
        config["trainer"] |= {"max_steps": max_steps, "limit_val_batches": 0}
    recorder = RunRecorder()
    with isolated(), quiet():
        start = time.perf_counter()
        built = cli(run=False, args=config, load_from_checkpoint_support=False)
        trainer, learner, data = built.trainer, built.model, built.datamodule
        learner.logs_losses = _may_read_losses(config, trainer.callbacks)
        opening = 0.0 if max_steps is None else prepare_probe(trainer, learner, data)
        trainer.callbacks.append(recorder)
        with contextlib.suppress(DivergedError):
            trainer.fit(learner, data)
        diverged = has_diverged(learner)
        scores = {} if max_steps is not None else _scores(run, trainer, learner, data, diverged)
    if max_steps is None and not diverged and trainer.global_step != run.config["trainer"]["max_steps"]:
        raise ValueError(
            f"Expected {run.config['trainer']['max_steps']} optimiser steps but got {trainer.global_step}. Remove the "
            "option or callback that stops the training early: arms are compared at equal budgets."
        )
    if opening:
        recorder.record["ms_per_step"] += opening
    return {
        "stage": run.stage,
        "arm": run.arm,
        "data": run.data,
        "seed": run.seed,
        "choice": run.choice,
        "key": run.key,
        "scores": scores,
        "diverged": diverged,
        "images_per_step": budget_of(run.config, run.arm).images_per_step,
        "seconds": round(time.perf_counter() - start, 2),
        **recorder.record,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "made_by": made_by(trainer.strategy.root_device),
        "config": run.config,
    }


def _may_read_losses(config: Config, callbacks: Sequence[Callback]) -> bool:
    """Return whether a callback or scheduler of a run may read the losses that the learner logs at every step.

    They are recorded in another way. To log them as well would take about a sixth of the time of a small network.
    """
    own = all(type(callback).__module__.startswith(("lightning_memdml.", "lightning.")) for callback in callbacks)
    return not own or "train/" in json.dumps(config, default=str)


def _scores(run: Run, trainer: Any, learner: Any, data: Any, diverged: bool) -> dict[str, float]:
    """Score the last step. A search run never uses the test classes.

    A diverged run (NaN or infinite weights) scores 0. It is a result and is not left out.
    """
    if diverged:
        return dict.fromkeys([f"recall_at_{k}" for k in learner.test_metrics.k] + ["map_at_r", "r_precision"], 0.0)
    stage = "val" if run.stage == "search" else "test"
    score = trainer.validate if run.stage == "search" else trainer.test
    results = score(learner, data, verbose=False)
    found = {name.partition("/")[2]: value for name, value in (results or [{}])[0].items() if name.startswith(stage)}
    if not found:
        raise ValueError(
            "Expected validation classes for the search but there are none. Set `data.val_fraction` above 0 and remove "
            "`trainer.limit_val_batches: 0`. The search never uses the test classes."
        )
    return found


def made_by(device: torch.device) -> dict[str, Any]:
    """Return commit, versions and hardware of a run."""
    cuda = device.type == "cuda"
    return {
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES},
        "hardware": torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} {device.type}",
        "threads": torch.get_num_threads(),
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit of the package's repository, with `-dirty` if files were changed; `None` if it is installed."""
    git = ["git", "-C", str(PACKAGE)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=False)
        if tracked.returncode:
            return None
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:  # no git
        return None
    return described.stdout.strip() or None
