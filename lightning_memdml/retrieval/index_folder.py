"""The folder of an index: replaced as a whole, and written by one process at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lightning_memdml.atomic_write import named_if_full

DESCRIPTION = "index.json"  # written last: a folder without it is no index
_LOCK = "lock"


@contextmanager
def staged_folder(target: Path, *, resume: bool = False) -> Iterator[Path]:
    """Yield a folder beside `target` to write to. It replaces `target` when the block ends without an error.

    The old index stays whole until the new one is finished. The staged folder is locked, so that two processes never
    write to it together.

    Args:
        target: Folder of the index.
        resume: Keep the staged folder after an error or a kill, and yield it again with what it holds. Otherwise it is
            empty at the start, and removed after an error.

    Raises:
        ValueError: If `target` is something other than an index, or contains the working directory.
        OSError: If another process writes to the staged folder, or the disk is full.
    """
    target = target.resolve()
    if target in (here := Path.cwd(), *here.parents):
        raise ValueError(
            f"Expected the output to be a folder of its own but got {target}, which contains the working directory. "
            "Pass another folder, such as `runs/index`."
        )
    require_replaceable(target)
    staged = target.with_name(f".{target.name}{'.partial' if resume else '.new'}")
    with named_if_full(target), _locked(staged, target):
        if resume:
            yield staged
        else:
            for file in staged.iterdir():
                if file.name != _LOCK:
                    file.unlink()
            try:
                yield staged
            except BaseException:
                shutil.rmtree(staged, ignore_errors=True)
                raise
        _replace_folder(staged, target)


def write_header(file: BinaryIO, shape: tuple[int, int]) -> int:
    """Write the header of a `.npy` file of float32 rows, and return where the first row begins.

    Rows are then written, not mapped: on a full disk a write is an error, and a map of a sparse file kills the process.
    """
    descr = np.lib.format.dtype_to_descr(np.dtype(np.float32))
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.tell()


def require_replaceable(target: Path) -> None:
    """Check that nothing but an index would be replaced.

    Raises:
        ValueError: If `target` holds something else.
    """
    if target.exists() and not (target / DESCRIPTION).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"Expected {target} to be an index, or not to exist, but it is something else. It was not overwritten; "
            "pass another folder."
        )


def existing_folder(target: Path) -> Path:
    """Return the folder to read an index from: `target`, or where a killed process has left the index it replaced."""
    old = _set_aside(target)
    return old if not target.exists() and (old / DESCRIPTION).is_file() else target


def _set_aside(target: Path) -> Path:
    resolved = target.resolve()
    return resolved.with_name(f".{resolved.name}.old")


def _replace_folder(staged: Path, target: Path) -> None:
    """Rename `staged` to `target`. A kill between the two renames leaves the old index where it is still found."""
    require_replaceable(target)
    old = _set_aside(target)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    os.replace(staged, target)
    (target / _LOCK).unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _locked(staged: Path, target: Path) -> Iterator[None]:
    """Hold the lock of the staged folder. The system releases it if the process dies."""
    while True:
        staged.mkdir(parents=True, exist_ok=True)
        file = (staged / _LOCK).open("ab")
        try:
            if not _try_lock(file):
                raise OSError(
                    f"Expected to be the only process that writes {target} but another one does. Wait until it ends, "
                    "or pass another folder."
                )
            if file.closed or _is_at(file, staged / _LOCK):
                yield
                return
        finally:
            file.close()


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether the open file is still the one at the path: another process may have renamed its folder meanwhile."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _try_lock(file: BinaryIO) -> bool:
    """Lock a file without waiting. Windows, where an open file cannot be moved with its folder, has no such lock."""
    try:
        import fcntl
    except ImportError:
        file.close()
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
