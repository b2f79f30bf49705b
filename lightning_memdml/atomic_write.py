"""Write a file so that a reader finds either the old content or the new one, and never a part of it."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Windows has no disk quota error; `ulimit -f` limits the size of a file.
DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG}


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`. What is written there replaces `path` when the block ends.

    Missing folders are made. The new content is flushed to the disk before it replaces the old one, so that a power
    failure leaves one of the two. After an error the temporary file is removed and `path` is unchanged. If several
    processes write the same path, the last one to finish wins.

    Args:
        path: The file to write.

    Yields:
        A path in the same folder, with the same suffix.

    Raises:
        OSError: If the disk is full. The message names `path`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "new", "file.txt")
        ...     with atomic_write(path) as temporary:
        ...         written = temporary.write_text("all of it")
        ...     path.read_text(), [file.name for file in path.parent.iterdir()]
        ('all of it', ['file.txt'])
    """
    # Libraries choose the format by the suffix. The random part keeps threads and processes apart.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    with named_if_full(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _flush(temporary, os.O_RDWR)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        with suppress(OSError):  # Windows opens no folders, and some network file systems flush none
            _flush(path.parent, os.O_RDONLY)


@contextmanager
def named_if_full(path: Path, *, replaces: bool = True) -> Iterator[None]:
    """Name the file or folder that was to be written if the disk is full; other errors pass unchanged.

    Args:
        path: What is written in the block.
        replaces: Whether the block writes beside `path`, so that what was there is unchanged after an error.

    Raises:
        OSError: If the block found no space on the disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        kept = " What was there before is unchanged." if replaces and path.exists() else ""
        named = OSError(f"Expected space on the disk for {path} but there is no space left.{kept} Free some space.")
        named.errno = error.errno
        raise named from error


def _flush(path: Path, flags: int) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
