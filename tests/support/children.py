"""Runs other processes for tests: a Python program, the command line, or a function on several ranks.

What a process printed last is in the first line of the failure. Waits only bound a hang, so they are long: a test never
depends on how fast the machine is.

Functions run in processes forked from one server that has imported torch, Lightning and this package: starting two
ranks costs a fraction of a second instead of several seconds of imports. Where there is no `fork`, each starts anew.
"""

from __future__ import annotations

import importlib.util
import multiprocessing.connection
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

PATIENCE = 600
"""Seconds after which a process counts as hanging."""
IMPORTED = ["torch", "lightning.pytorch", "lightning_memdml.cli", "pytest", "support.children"]
"""What the server of processes imports."""


@dataclass
class Task:
    """What a process does, and in which surroundings."""

    file: str
    function: str
    arguments: tuple[Any, ...]
    join: bool
    environment: dict[str, str]
    folder: str = field(default_factory=os.getcwd)
    path: list[str] = field(default_factory=lambda: list(sys.path))
    start_method: str = field(default_factory=multiprocessing.get_start_method)


class ChildError(AssertionError):
    """A process failed; the first line is the last it printed."""


def failure(name: str, printed: str) -> ChildError:
    """Return the error for a process that printed this and ended badly."""
    lines = [line for line in printed.splitlines() if line.strip()]
    return ChildError(f"{lines[-1].strip() if lines else 'It printed nothing.'} [{name}]\n{printed[-6000:]}")


def python_path() -> str:
    """Return what makes another Python find the modules that this one finds."""
    return os.pathsep.join(os.path.abspath(place) for place in sys.path if place)


def run_python(
    *arguments: Any, cwd: Path | None = None, env: Mapping[str, str | None] | None = None, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run Python with arguments and return what it printed.

    Args:
        *arguments: Of the interpreter, for example `"-c", "print(1)"`.
        cwd: The folder it runs in.
        env: Variables beside those of this process; None removes one.
        code: The exit status that is expected.

    Raises:
        ChildError: If it ends with another status, or hangs.
    """
    command = [sys.executable, *map(str, arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), **(env or {})}
    environment = {name: value for name, value in variables.items() if value is not None}
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired as hung:
        raise ChildError(f"{command} did not end within {PATIENCE} s.\n{hung.stderr}") from None
    if done.returncode != code:
        raise failure(f"{command[1:3]} ended with {done.returncode}, expected {code}", done.stdout + done.stderr)
    return done


def run_ranks(
    ranks: int,
    function: Callable[..., Any],
    *arguments: Any,
    join: bool = True,
    nodes: bool = False,
    killed: int | None = None,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Call a function of a file on several ranks, as torchrun would start them, and return what each returned.

    Args:
        ranks: How many processes.
        function: Of the top level of a file, which each process imports.
        *arguments: What it is called with.
        join: Whether the ranks are a gloo group when it is called. Else the function calls `join_group` itself.
        nodes: Whether each rank is a machine of its own, instead of one of a machine.
        killed: The rank that is to die by SIGKILL. The other ranks are stopped then, and nothing is returned.
        env: Variables beside those of this process.

    Raises:
        ChildError: If a rank raises, dies or hangs.
    """
    with tempfile.TemporaryDirectory(prefix="ranks", ignore_cleanup_errors=True) as folder:
        processes = []
        for rank in range(ranks):
            place = {"RANK": rank, "WORLD_SIZE": ranks, "GROUP_RANK": rank * nodes, "NODE_RANK": rank * nodes}
            place |= {"LOCAL_RANK": rank * (not nodes), "LOCAL_WORLD_SIZE": 1 if nodes else ranks}
            place |= {"TORCHELASTIC_RUN_ID": "tests", "RENDEZVOUS": f"{folder}/rendezvous", "OMP_NUM_THREADS": 1}
            environment = {**os.environ, **{name: str(value) for name, value in place.items()}, **(env or {})}
            task = Task(function.__code__.co_filename, function.__name__, arguments, join, environment)
            processes.append(start(task, Path(folder, str(rank))))
        logs = [Path(folder, f"{rank}.log") for rank in range(ranks)]
        died = wait_for(processes, logs, grace=10 if killed is None else 0)
        printed = [log.read_text(errors="replace") for log in logs]
        if killed is not None:
            if died != killed or processes[killed].exitcode != -9:
                raise failure(f"{function.__name__}: rank {killed} was not killed", printed[killed])
            return []
        if died is not None:
            raise failure(f"{function.__name__} on rank {died} ended with {processes[died].exitcode}", printed[died])
        return [pickle.loads(Path(folder, f"{rank}.pickle").read_bytes()) for rank in range(ranks)]


def start(task: Task, place: Path) -> Any:
    """Start a process that runs a task, prints to `<place>.log` and leaves what is returned in `<place>.pickle`."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    Path(f"{place}.log").touch()
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = python_path()  # for the server, whose path is not that of pytest
    try:
        if "forkserver" in methods:
            context.set_forkserver_preload(IMPORTED)
        process = context.Process(target=run_task, args=(task, str(place)))
        process.start()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return process


def wait_for(processes: Sequence[Any], logs: Sequence[Path], grace: float) -> int | None:
    """Wait until all are done; return the first that failed. The others are killed `grace` seconds later."""
    deadline = time.monotonic() + PATIENCE
    died: int | None = None
    try:
        while running := [process for process in processes if process.is_alive()]:
            multiprocessing.connection.wait([process.sentinel for process in running], timeout=5)
            bad = [number for number, process in enumerate(processes) if process.exitcode not in (None, 0)]
            if bad and died is None:  # the others fail for want of it, later, or wait in vain
                died = min(bad, key=lambda number: logs[number].stat().st_mtime_ns)
                deadline = time.monotonic() + grace
            if time.monotonic() > deadline:
                break
        if died is None and (hanging := [n for n, process in enumerate(processes) if process.exitcode != 0]):
            died = hanging[0]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return died


def run_task(task: Task, place: str) -> None:
    """Run a task; the target of each process."""
    log = os.open(f"{place}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update(task.environment)
    os.chdir(task.folder)
    sys.path[:] = task.path
    # For the workers of a data loader, as in a process of its own.
    multiprocessing.set_start_method(task.start_method, force=True)
    try:
        import torch

        torch.set_num_threads(1)
        if task.join:
            join_group()
        result = getattr(load(task.file), task.function)(*task.arguments)
        Path(f"{place}.pickle").write_bytes(pickle.dumps(result))
        leave_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def join_group() -> None:
    """Make the ranks of `run_ranks` one gloo group. They meet in a file: a port could be taken in between."""
    import torch.distributed as dist

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['RENDEZVOUS']}", rank=rank, world_size=ranks)
    dist.barrier()  # a rank that ended before another one had connected would fail that one


def leave_group() -> None:
    """Destroy the group if there is one: its threads can abort a process that ends."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def load(file: str) -> ModuleType:
    """Import a test file by its path, under its own name."""
    name = Path(file).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
