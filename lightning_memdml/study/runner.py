"""Runs a study: trains all unfinished runs and keeps one file per finished run."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing import connection, parent_process
from typing import Any

import torch
from tqdm import tqdm

from lightning_memdml.study.agenda import Agenda
from lightning_memdml.study.plan import CLI, KnownRuns, Record, Run
from lightning_memdml.study.references import score_references
from lightning_memdml.study.run_folder import RunFolder
from lightning_memdml.study.sharing import SharedCLI
from lightning_memdml.study.training import train

PROBE_STEPS = 8


class FailedRunsError(RuntimeError):
    """Some runs of a study failed. The others are finished and kept."""


def run_all(
    known: Callable[[Sequence[Record]], KnownRuns],
    cli: CLI,
    folder: RunFolder,
    processes: int = 1,
    rule: Any = None,
    deadline: float = math.inf,
) -> Agenda:
    """Train all unfinished runs in the order of `Agenda`, and return what is finished.

    Args:
        known: Returns the known runs, given the records of finished ones: `Plan.known_runs`.
        cli: Builds learner, data and Trainer from a configuration.
        folder: Where finished runs are kept.
        processes: Number of runs that are trained at the same time. With GPUs, process i uses GPU i.
        rule: The rule that decides the verdicts; it is stored in each new record.
        deadline: Time of `time.monotonic` from which on no further run is started.

    Raises:
        FailedRunsError: If runs failed, after all others are finished.
    """
    agenda = Agenda(known, folder)
    failed: list[str] = []
    ended = len(agenda.records)
    before = sum(run.images for run in agenda.runs if run.key in agenda.records)  # of a study that continues
    with tqdm(unit=" images", unit_scale=True, initial=before, disable=agenda.is_complete) as bar:

        def show(images: int) -> None:
            bar.total = sum(run.images for run in agenda.planned)
            bar.set_description(f"{ended} of {len(agenda.planned)} runs")
            bar.update(images)

        show(0)
        for run, reason in _trained(agenda, cli, folder, processes, rule, deadline):
            ended += 1
            agenda.finish(run)
            show(run.images)
            if reason is not None:
                said = f"{run.in_words()}: {reason.strip().splitlines()[-1]} ({folder.fail(run, reason)})"
                left_out = agenda.leave_out(run.data) if run.stage == "reference" else 0
                others = f"\n  {left_out} runs on {run.data} were not started: they would fail in the same way."
                failed.append(said + (others if left_out else ""))
    if failed:
        trained = sum(run.stage != "reference" for run in agenda.planned)
        raise FailedRunsError(
            f"{len(failed)} of {trained} runs failed. The others are kept; run the study again to repeat the failed "
            "ones.\n" + "\n".join(failed)
        )
    return agenda


def _trained(
    agenda: Agenda, cli: CLI, folder: RunFolder, processes: int, rule: Any, deadline: float
) -> Iterator[tuple[Run, str | None]]:
    """Yield each run when it ends, with the traceback if it failed. Further runs may be known from then on."""
    if processes == 1:
        shared = SharedCLI(cli)
        while time.monotonic() < deadline and (run := agenda.next()) is not None:
            yield run, _train_and_save(run, shared, folder, rule)
        return
    # Spawned, because a forked child can use neither a GPU that its parent initialised nor the parent's OpenMP threads.
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(processes):
        numbers.put(number)
    with ProcessPoolExecutor(processes, context, _start_worker, (numbers, processes, sys.path)) as pool:
        futures: dict[Future[str | None], Run] = {}
        try:
            while True:
                # One run for each process, and no more, as a run that is known later may have to start earlier.
                while len(futures) < processes and time.monotonic() < deadline and (run := agenda.next()) is not None:
                    with _ignored_interrupts():
                        futures[pool.submit(_train_in_worker, run, cli, folder, rule)] = run
                if not futures:
                    return
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    yield futures.pop(future), future.result()
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


@lru_cache(maxsize=1)
def _shared_in_worker(cli: CLI) -> SharedCLI:
    """Return what the runs of this worker process share."""
    return SharedCLI(cli)


def _train_in_worker(run: Run, cli: CLI, folder: RunFolder, rule: Any) -> str | None:
    return _train_and_save(run, _shared_in_worker(cli), folder, rule)


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

    The estimate from a few steps covers only the steps of the training, before a memory is full: it is a lower bound.
    No head is fitted for it, and of photographs one is opened.
    """
    seconds: dict[tuple[str, str], float] = {}
    kinds: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        kinds.setdefault((run.data, run.arm), []).append(run)
    shared = SharedCLI(cli)
    for kind, alike in tqdm(kinds.items(), "A few steps of each arm", delay=1, leave=False):
        measured = [record["seconds"] for record in folder.finished(alike)]
        if measured:
            seconds[kind] = sum(measured) / len(measured)
            continue
        record = train(alike[0], shared, folder.path / "files" / "probe", max_steps=PROBE_STEPS)
        gc.collect()
        seconds[kind] = (record["ms_per_step"] or 0) * alike[0].config["trainer"]["max_steps"] / 1000
    return seconds
