"""Runs a study: plans what is to be trained, trains what is not done yet, keeps one file per finished run."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import logging
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
import yaml
from tqdm import tqdm

from lightning_memdml.study.recording import DivergedError, RunRecorder, has_diverged
from lightning_memdml.study.study_file import Config, Study, Values, with_values

Stage = Literal["search", "test"]
Record = dict[str, Any]
#: Builds learner, data and Trainer: `lightning_memdml.cli.MemdmlCLI`, given by who calls, as nothing imports the CLI.
CLI = Callable[..., Any]

PACKAGE = Path(__file__).parents[1]
LIBRARIES = ("lightning-memdml", "lightning", "torch", "torchvision", "numpy")
# What a run is alike with and without: no part of what it measures.
COSMETIC = {
    "trainer": (
        "logger", "default_root_dir", "enable_progress_bar", "enable_model_summary", "enable_checkpointing",
        "num_sanity_val_steps", "enable_autolog_hparams", "model_registry", "profiler", "log_every_n_steps",
    ),
    "data": ("num_workers", "cache_dir", "pixel_cache", "pixel_cache_gb"),
}  # fmt: skip
PROBE_STEPS = 12


@dataclass(frozen=True)
class Run:
    """One training with its score.

    Attributes:
        stage: `search` is scored on validation classes, `test` on test classes.
        arm: Its arm.
        data: Its data set.
        seed: Its seed.
        choice: What the search has chosen, or is trying.
        config: The whole configuration, defaults included.
        key: Hash of all that decides the result. A finished run is the same run if its key is.
    """

    stage: Stage
    arm: str
    data: str
    seed: int
    choice: Values
    config: Config
    key: str

    @property
    def file_name(self) -> str:
        """Name of the file of the finished run."""
        return f"{self.stage}-{self.data}-{self.arm}-seed{self.seed}-{self.key[:10]}.json"

    @property
    def images(self) -> int:
        """Number of images it trains on, for which it takes its time."""
        budget = budget_of(self.config, self.arm)
        return budget.steps * budget.images_per_step

    def in_words(self) -> str:
        """Return the run in a few words."""
        tried = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in self.choice.items())
        return f"{self.arm} on {self.data}, seed {self.seed}" + (f", {tried}" if tried else "")


class Budget(NamedTuple):
    """What a run takes."""

    steps: int
    images_per_step: int


def budget_of(config: Config, arm: str) -> Budget:
    """Return the optimiser steps of a configuration, and the images of each.

    Raises:
        ValueError: If the number of steps is not set outright, or several devices share a run.
    """
    trainer, data = config["trainer"], config["data"].get("init_args", {})
    if (trainer.get("max_steps") or -1) < 1 or trainer.get("max_epochs") not in (None, -1):
        raise ValueError(
            f"Arm {arm!r}: expected `trainer.max_steps` above 0 and `trainer.max_epochs: -1`, as arms are compared at "
            f"equal optimiser steps, but got max_steps={trainer.get('max_steps')} and "
            f"max_epochs={trainer.get('max_epochs')}."
        )
    if trainer.get("devices") not in ("auto", 1, "1", [0]) or trainer.get("num_nodes") not in (None, 1):
        raise ValueError(
            f"Arm {arm!r}: expected one device for each run but got devices={trainer['devices']}; leave it out, and "
            "pass `--processes N`, which spreads the runs over the GPUs there are."
        )
    if "batch_size" not in data:
        raise ValueError(f"Arm {arm!r}: expected `data.batch_size`, to compare budgets, but the data module has none.")
    return Budget(trainer["max_steps"], data["batch_size"] * (trainer.get("accumulate_grad_batches") or 1))


def check_budgets(study: Study, budgets: dict[tuple[str, str], Budget]) -> None:
    """Check that all arms of a data set have equal budgets.

    Args:
        study: Says what is equal.
        budgets: Of each (data set, arm).

    Raises:
        ValueError: If they have not; the message lists them.
    """
    for data in study.data:
        found = {arm: budgets[data, arm] for arm in study.arms}
        if study.equal == "images":
            if len({budget.steps * budget.images_per_step for budget in found.values()}) > 1:
                raise ValueError(
                    f"Expected `max_steps` times the batch size to be equal in all arms (`equal: images`), but on "
                    f"{data!r} they are: {_listed(found)}."
                )
        elif len(set(found.values())) > 1:
            raise ValueError(
                f"Expected equal optimiser steps and images per step in all arms, but on {data!r} they are: "
                f"{_listed(found)}. If the batch size is the question, say `equal: images` in the study file, and give "
                "each arm the `max_steps` that makes the images in all equal."
            )


def _listed(budgets: dict[str, Budget]) -> str:
    return "; ".join(f"{arm} {steps:,} steps of {images:,} images" for arm, (steps, images) in budgets.items())


class Plan:
    """What a study has to run. Every configuration is parsed before the first run, so that none fails at night.

    Args:
        study: The study.
        cli: Builds what a configuration says.
        options: Options of the command line for all runs, such as ``--data.path images.npz``.

    Raises:
        ValueError: If a configuration is wrong, naming arm and option; if budgets differ; or if an arm has no use for
            an option of the search.
    """

    def __init__(self, study: Study, cli: CLI, options: Sequence[str] = ()) -> None:
        self.study = study
        self._parse = _parser(cli, options)
        self._resolved: dict[str, Config] = {}
        self._sources = {file.stem: file.read_bytes() for file in sorted(study.path.parent.glob("*.py"))}
        budgets: dict[tuple[str, str], Budget] = {}
        for data in study.data:
            for arm in study.arms:
                for choice in self.choices(arm, data):
                    budget = budget_of(self.resolve(arm, data, choice), arm)
                    if budgets.setdefault((data, arm), budget) != budget:
                        raise ValueError(f"Expected a search that leaves the budget alone, but {choice} changes it.")
        check_budgets(study, budgets)

    def choices(self, arm: str, data: str) -> list[Values]:
        """Return what the search tries for an arm; one empty choice if there is no search."""
        search = self.study.search
        return [{}] if search is None else search.choices(self.study.config(arm, data), arm)

    def search_runs(self) -> list[Run]:
        """Return the runs on validation classes."""
        search = self.study.search
        if search is None:
            return []
        return [
            self._run("search", arm, data, search.seed, choice)
            for data in self.study.data
            for arm in self.study.arms
            for choice in self.choices(arm, data)
        ]

    def test_runs(self, searched: Sequence[Record]) -> list[Run]:
        """Return the runs on test classes, each arm with what scored best on the validation classes.

        All arms of a seed come before the next seed: what an interrupted study has done can be compared.
        """
        best = {
            (data, arm): self.best_choice(arm, data, searched) for data in self.study.data for arm in self.study.arms
        }
        return [
            self._run("test", arm, data, seed, best[data, arm])
            for seed in self.study.seeds
            for data in self.study.data
            for arm in self.study.arms
        ]

    def best_choice(self, arm: str, data: str, searched: Sequence[Record]) -> Values:
        """Return what scored best; of equals the first.

        Raises:
            ValueError: If a searching run of the arm is missing.
        """
        search = self.study.search
        if search is None:
            return {}
        scores = []
        for choice in self.choices(arm, data):
            key = self._run("search", arm, data, search.seed, choice).key
            record = next((record for record in searched if record["key"] == key), None)
            if record is None:
                raise ValueError(f"The search of {arm!r} on {data!r} is not finished: {choice} has no score.")
            scores.append((record["scores"][search.score], choice))
        return max(scores, key=lambda scored: scored[0])[1]

    def resolve(self, arm: str, data: str, choice: Values) -> Config:
        """Return a whole configuration, defaults included."""
        # Of a grid of numbers the first is parsed, and the others are put into its place: parsing is most of the time.
        parsed = (
            self.choices(arm, data)[0] if all(isinstance(value, int | float) for value in choice.values()) else choice
        )
        text = yaml.safe_dump(with_values(self.study.config(arm, data), parsed), sort_keys=False)
        if text not in self._resolved:
            self._resolved[text] = self._parse(text, f"Arm {arm!r} on {data!r}")
        return with_values(self._resolved[text], choice)

    def logger(self) -> dict[str, Any]:
        """Return the logger that the base configures, which is that of the study: runs have none of their own."""
        arm, data = next(iter(self.study.arms)), next(iter(self.study.data))
        logger = self.resolve(arm, data, self.choices(arm, data)[0])["trainer"].get("logger")
        return logger if isinstance(logger, dict) else {}

    def _run(self, stage: Stage, arm: str, data: str, seed: int, choice: Values) -> Run:
        config = deepcopy(self.resolve(arm, data, choice))
        config["seed_everything"] = seed
        if "seed" in config["data"].get("init_args", {}):
            config["data"]["init_args"]["seed"] = seed
        return Run(stage, arm, data, seed, choice, config, self._key(stage, config))

    def _key(self, stage: Stage, config: Config) -> str:
        config = deepcopy(config)
        for group, names in COSMETIC.items():
            options = config[group] if group == "trainer" else config[group].get("init_args", {})
            for name in names:
                options.pop(name, None)
        text = json.dumps({"stage": stage, **config}, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode())
        for module, source in self._sources.items():
            if re.search(rf'"{re.escape(module)}\.', text):  # a class or function of the user's own, which may change
                digest.update(source)
        return digest.hexdigest()


def _parser(cli: CLI, options: Sequence[str]) -> Callable[[str, str], Config]:
    """Return what turns a configuration into a whole one; wrong names raise, and say whose they are."""

    class ParsedOnly(cli):  # type: ignore[valid-type, misc]
        def instantiate_classes(self) -> None:
            """Build nothing."""

        def _set_seed(self) -> None:
            """Leave the random numbers of this process alone."""

    built: list[Any] = []  # once: a parser takes as long to build as to use

    def parse(text: str, whose: str) -> Config:
        said, arguments = io.StringIO(), ["--config", text, *options]
        try:
            with contextlib.redirect_stderr(said), _as_if_alone():
                if built:
                    built[0].parse_arguments(built[0].parser, arguments)
                else:
                    built.append(ParsedOnly(run=False, args=arguments))
                parsed = built[0]
                return yaml.safe_load(parsed.parser.dump(parsed.config, skip_validation=True, skip_unset=False))
        except SystemExit as error:
            raise ValueError(f"{whose}: {said.getvalue().rpartition('error: ')[2].strip()}") from error

    return parse


# ------------------------------------------------------------------------------------------------------------ training
def train(run: Run, cli: CLI, folder: Path, max_steps: int | None = None) -> Record:
    """Train a run and score it; nothing is written but what callbacks write into `folder`.

    Args:
        run: The run.
        cli: Builds what its configuration says.
        folder: Where callbacks of the run leave their files.
        max_steps: Stop after so many steps and score nothing, to see how long a step takes.

    Raises:
        ValueError: If it took other than its steps, or there are no validation classes to search on.
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
    with _as_if_alone(), _quiet():
        start = time.perf_counter()
        built = cli(run=False, args=["--config", yaml.safe_dump(config)])
        trainer, learner, data = built.trainer, built.model, built.datamodule
        trainer.callbacks.append(recorder)
        with contextlib.suppress(DivergedError):
            trainer.fit(learner, data)
        diverged = has_diverged(learner)
        scores = {} if max_steps is not None else _scores(run, trainer, learner, data, diverged)
    if max_steps is None and not diverged and trainer.global_step != run.config["trainer"]["max_steps"]:
        raise ValueError(
            f"Expected {run.config['trainer']['max_steps']} optimiser steps but the training stopped after "
            f"{trainer.global_step}: leave out what stops it early, as arms are compared at equal budgets."
        )
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


def _scores(run: Run, trainer: Any, learner: Any, data: Any, diverged: bool) -> dict[str, float]:
    """Score the last step; a searching run never sees the test classes.

    Weights that are NaN or infinite retrieve nothing. That is a result, and a run that had it is not left out.
    """
    if diverged:
        return dict.fromkeys([f"recall_at_{k}" for k in learner.test_metrics.k] + ["map_at_r", "r_precision"], 0.0)
    stage = "val" if run.stage == "search" else "test"
    score = trainer.validate if run.stage == "search" else trainer.test
    results = score(learner, data, verbose=False)
    found = {name.partition("/")[2]: value for name, value in (results or [{}])[0].items() if name.startswith(stage)}
    if not found:
        raise ValueError(
            "Expected validation classes to search on, but there are none: set `data.val_fraction` above 0, and no "
            "`trainer.limit_val_batches: 0`. The test classes are not searched on."
        )
    return found


def made_by(device: torch.device) -> dict[str, Any]:
    """Return what made a run: commit, versions, hardware."""
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
    """Return the commit of the package's repository, `-dirty` if files differ from it; None for an installed copy."""
    git = ["git", "-C", str(PACKAGE)]
    try:
        ours = subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=False)
        if ours.returncode:
            return None
        said = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:  # no git
        return None
    return said.stdout.strip() or None


@contextlib.contextmanager
def _as_if_alone() -> Iterator[None]:
    """Hide the command line, about which Lightning would warn, and take back what a run puts in the environment."""
    with mock.patch.object(sys, "argv", sys.argv[:1]), mock.patch.dict(os.environ):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let Lightning not introduce itself at every run."""
    loggers = [
        logging.getLogger(f"lightning.{name}") for name in ("pytorch.utilities.rank_zero", "fabric.utilities.seed")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")  # and none of this package
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ------------------------------------------------------------------------------------------------------- many of them
class RunFolder:
    """The finished runs of a study, one JSON file each.

    Args:
        path: The study's folder.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.runs = self.path / "runs"

    def load(self, run: Run) -> Record | None:
        """Return a finished run; None if it is not finished.

        Raises:
            ValueError: If its file is damaged.
        """
        file = self.runs / run.file_name
        if not file.is_file():
            return None
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            return record if record["key"] == run.key else None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Expected a finished run in {file} but it is damaged; delete it to run it again."
            ) from error

    def finished(self, runs: Sequence[Run]) -> list[Record]:
        """Return those that are finished."""
        return [record for run in runs if (record := self.load(run)) is not None]

    def save(self, run: Run, record: Record) -> None:
        """Put the file of a finished run into place whole."""
        write_whole(self.runs / run.file_name, json.dumps(record, default=str))

    def fail(self, run: Run, reason: str) -> Path:
        """Keep why a run failed."""
        file = self.path / "failed" / run.file_name.replace(".json", ".txt")
        write_whole(file, reason)
        return file


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name first, so that there is never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


class FailedRunsError(RuntimeError):
    """Some runs of a study failed; the others are done and kept."""


def run_all(runs: Sequence[Run], cli: CLI, folder: RunFolder, processes: int = 1, rule: Any = None) -> list[Record]:
    """Train what is not finished, in the order given, and return all records.

    Args:
        runs: The runs.
        cli: Builds what a configuration says.
        folder: Where finished runs are kept.
        processes: How many are trained at a time; with GPUs, process i has GPU i.
        rule: What decides the verdicts, noted in each new record.

    Raises:
        FailedRunsError: After all others are done.
    """
    left = [run for run in runs if folder.load(run) is None]
    total, done = sum(run.images for run in runs), len(runs) - len(left)
    failed: list[str] = []
    with tqdm(
        total=total, initial=total - sum(run.images for run in left), unit=" images", unit_scale=True, disable=not left
    ) as bar:
        bar.set_description(f"{done} of {len(runs)} runs")
        for run, reason in _trained(left, cli, folder, processes, rule):
            done += 1
            bar.set_description(f"{done} of {len(runs)} runs")
            bar.update(run.images)
            if reason is not None:
                failed.append(f"{run.in_words()}: {reason.strip().splitlines()[-1]} ({folder.fail(run, reason)})")
    if failed:
        raise FailedRunsError(f"{len(failed)} of {len(runs)} runs failed; the others are kept.\n" + "\n".join(failed))
    return folder.finished(runs)


def _trained(
    runs: Sequence[Run], cli: CLI, folder: RunFolder, processes: int, rule: Any
) -> Iterator[tuple[Run, str | None]]:
    """Yield each run as it ends, with the traceback if it failed."""
    if processes == 1 or len(runs) < 2:
        for run in runs:
            yield run, _train_and_save(run, cli, folder, rule)
        return
    # Spawned: a forked child cannot use a GPU that its parent has looked at, nor the parent's OpenMP threads.
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(processes):
        numbers.put(number)
    with ProcessPoolExecutor(processes, context, _start_worker, (numbers, processes, sys.path)) as pool:
        futures = {pool.submit(_train_and_save, run, cli, folder, rule): run for run in runs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker(numbers: Any, processes: int, path: list[str]) -> None:
    """Set up a worker process: its share of the cores, its GPU, and an end when the study ends."""
    sys.path[:] = path  # with the folder of the user's modules
    number = numbers.get()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    if gpus := torch.cuda.device_count():
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % gpus)
    parent = parent_process()
    if parent is not None:  # a killed study must not leave workers behind, which would wait for ever
        sentinel = parent.sentinel
        threading.Thread(target=lambda: (connection.wait([sentinel]), os._exit(1)), daemon=True).start()


def _train_and_save(run: Run, cli: CLI, folder: RunFolder, rule: Any) -> str | None:
    """Train a run and keep its record; return the traceback if it failed."""
    try:
        record = train(run, cli, folder.path / "files" / run.file_name.removesuffix(".json"))
        folder.save(run, {**record, "rule": rule})
    except Exception:  # whatever a user's loss or data raises: the other runs go on, and it is told at the end
        return traceback.format_exc()
    finally:
        gc.collect()  # Trainer and learner refer to each other
    return None


def estimate_seconds(runs: Sequence[Run], cli: CLI, folder: RunFolder) -> dict[tuple[str, str], float]:
    """Return the seconds that a run of each (data set, arm) takes: as measured, or guessed from a few steps.

    A guess holds the training steps alone, before a memory has filled: it is a lower bound.
    """
    seconds: dict[tuple[str, str], float] = {}
    kinds: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        kinds.setdefault((run.data, run.arm), []).append(run)
    for kind, alike in tqdm(kinds.items(), "A few steps of each arm", delay=1, leave=False):
        measured = [record["seconds"] for record in folder.finished(alike)]
        if measured:
            seconds[kind] = sum(measured) / len(measured)
            continue
        record = train(alike[0], cli, folder.path / "files" / "probe", max_steps=PROBE_STEPS)
        seconds[kind] = (record["ms_per_step"] or 0) * alike[0].config["trainer"]["max_steps"] / 1000
    return seconds
