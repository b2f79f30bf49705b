"""A reader of a file finds the old content or the new one, whoever writes it and whenever the writer stops."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from lightning_memdml.atomic_write import atomic_write


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise OSError("not to be written")

    with pytest.raises(OSError, match="not to be written"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with atomic_write(path) as first:
        first.write_text("first")
        with atomic_write(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_it_replaces_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    with atomic_write(tmp_path / "file.txt") as temporary:
        temporary.write_text("new")
    assert calls[:2] == ["fsync", "replace"]


@pytest.mark.parametrize("old", [None, "old"])
def test_a_full_disk_names_the_file_and_keeps_the_old_one(old: str | None, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    if old is not None:
        path.write_text(old)

    def fail() -> None:
        with atomic_write(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="no space left") as raised:
        fail()
    assert str(path) in str(raised.value)
    assert ("What was there before is unchanged" in str(raised.value)) == (old is not None)
    assert (path.read_text() if path.exists() else None) == old
    assert raised.value.errno == errno.ENOSPC


def test_a_disk_that_is_really_full_keeps_the_old_file(small_disk: Path) -> None:
    path = small_disk / "rows.bin"
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"old")

    def fill() -> None:
        with atomic_write(path) as temporary:
            temporary.write_bytes(np.zeros(2**20, np.uint8).tobytes())

    with pytest.raises(OSError, match="no space left"):
        fill()
    assert path.read_bytes() == b"old"
    assert list(small_disk.iterdir()) == [path]
