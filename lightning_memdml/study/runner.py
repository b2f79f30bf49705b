"""Runs a study: trains all unfinished runs and keeps one file per finished run."""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lightning_memdml.atomic_write import atomic_write
from lightning_memdml.study.plan import CLI, Record, Run
from lightning_memdml.study.references import score_references
from lightning_memdml.study.training import train

PROBE_STEPS = 12


class RunFolder:
    """The finished runs of a study, one JSON file each.

    Args:
        path: The study's folder.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.runs = self.path / "runs"

    def load(self, run: Run) -> Record | None:
        """Return the record of a finished run, or `None`.

        Raises:
            ValueError: If its file is damaged.
        """
        file = self._file(run)
        if not file.is_file():
            return None
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            return record if record["key"] == run.key else None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Expected a finished run in {file} but the file is damaged. Delete it to repeat the run."
            ) from error

    def finished(self, runs: Sequence[Run]) -> list[Record]:
        """Return the records of all finished runs."""
        return [record for run in runs if (record := self.load(run)) is not None]

    def save(self, run: Run, record: Record) -> None:
        """Write the file of a finished run atomically."""
        with atomic_write(self._file(run)) as unfinished:
            unfinished.write_text(json.dumps(record, default=str), encoding="utf-8")

    def _file(self, run: Run) -> Path:
        return (self.path / "references" if run.stage == "reference" else self.runs) / run.file_name

    def fail(self, run: Run, reason: str) -> Path:
        """Keep the reason why a run failed, and return the file."""
        file = self.path / "failed" / run.file_name.replace(".json", ".txt")
        with atomic_write(file) as unfinished:
            unfinished.write_text(reason, encoding="utf-8")
        return file


class FailedRunsError(RuntimeError):
    """Some runs of a study failed. The others are finished and kept."""


def run_all(
    runs: Sequence[Run],
    cli: CLI,
    folder: RunFolder,
    processes: int = 1,
    rule: Any = None,
    deadline: float = math.inf,
) -> list[Record]:
    """Train all unfinished runs in the given order, and return the records of all that are finished.

    Args:
        runs: The runs.
        cli: Builds learner, data and Trainer from a configuration.
        folder: Where finished runs are kept.
        processes: Number of runs that are trained at the same time. With GPUs, process i uses GPU i.
        rule: The rule that decides the verdicts; it is stored in each new record.
        deadline: Time of `time.monotonic` from which on no further run is started.

    Raises:
        FailedRunsError: If runs failed, after all others are finished.
    """
    left = [run for run in runs if folder.load(run) is None]
    total, done = sum(run.images for run in runs), len(runs) - len(left)
    failed: list[str] = []
    with tqdm(
        total=total, initial=total - sum(run.images for run in left), unit=" images", unit_scale=True, disable=not left
    ) as bar:
        bar.set_description(f"{done} of {len(runs)} runs")
        for run, reason in _trained(left, cli, folder, processes, rule, deadline):
            done += 1
            bar.set_description(f"{done} of {len(runs)} runs")
            bar.update(run.images)
            if reason is not None:
                failed.append(f"{run.in_words()}: {reason.strip().splitlines()[-1]} ({folder.fail(run, reason)})")
    if failed:
        raise FailedRunsError(
            f"{len(failed)} of {len(runs)} runs failed. The others are kept; run the study again to repeat the failed "
            "ones.\n" + "\n".join(failed)
        )
    return folder.finished(runs)


def _trained(
    runs: Sequence[Run], cli: CLI, folder: RunFolder, processes: int, rule: Any, deadline: float
) -> Iterator[tuple[Run, str | None]]:
    """Yield each run when it ends, with the traceback if it failed."""
    if processes == 1 or len(runs) < 2:
        for run in runs:
            if time.monotonic() >= deadline:
                return
            yield run, _train_and_save(run, cli, folder, rule)
        return
    # Spawned, because a forked child can use neither a GPU that its parent initialised nor the parent's OpenMP threads.
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(processes):
        numbers.put(number)
    with ProcessPoolExecutor(processes, context, _start_worker, (numbers, processes, sys.path)) as pool:
        with _ignored_interrupts():
            futures = {pool.submit(_train_and_save, run, cli, folder, rule): run for run in runs}
        try:
            for future in as_completed(futures):
                if not future.cancelled():
                    yield futures[future], future.result()
                if time.monotonic() >= deadline:
                    for waiting in futures:
                        waiting.cancel()  # without effect on those that are running
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _ignored_interrupts() -> Iterator[None]:
    """Start processes that ignore Ctrl-C, which a terminal sends to all: the command ends them itself."""
    if threading.current_thread() is not threading.main_thread():  # the only one that may change signals
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _start_worker(numbers: Any, processes: int, path: list[str]) -> None:
    """Set up a worker process: its share of the cores, its GPU, and its exit with the study."""
    sys.path[:] = path  # includes the folder of the user's modules
    number = numbers.get()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    if gpus := torch.cuda.device_count():
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % gpus)
    parent = parent_process()
    if parent is not None:  # a killed study must not leave waiting workers behind
        sentinel = parent.sentinel
        threading.Thread(target=lambda: (connection.wait([sentinel]), os._exit(1)), daemon=True).start()


def _train_and_save(run: Run, cli: CLI, folder: RunFolder, rule: Any) -> str | None:
    """Train a run and keep its record; return the traceback if it failed."""
    try:
        if run.stage == "reference":
            record = score_references(run, cli)
        else:
            record = train(run, cli, folder.path / "files" / run.file_name.removesuffix(".json"))
        folder.save(run, {**record, "rule": rule})
    except Exception:  # a user's loss or data may raise anything: the other runs continue, and it is reported later
        return traceback.format_exc()
    finally:
        gc.collect()  # Trainer and learner reference each other
    return None


def estimate_seconds(runs: Sequence[Run], cli: CLI, folder: RunFolder) -> dict[tuple[str, str], float]:
    """Estimate the seconds of a run of each (data set, arm), from finished runs or else from a few steps.

    The estimate from a few steps covers only the training, before a memory is full: it is a lower bound.
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
        gc.collect()
        seconds[kind] = (record["ms_per_step"] or 0) * alike[0].config["trainer"]["max_steps"] / 1000
    return seconds
