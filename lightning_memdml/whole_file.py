"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give another name in the same folder to write to; what was written takes the place of `path` at the end.

    Folders are made. After an error nothing is left, and a file that was there before is as it was. Of several
    processes that write the same file, the last one's stays.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "new", "file.txt")
        >>> with whole_file(path) as unfinished:
        ...     written = unfinished.write_text("all of it")
        >>> path.read_text(), [file.name for file in path.parent.iterdir()]
        ('all of it', ['file.txt'])
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")  # writers go by the ending
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
