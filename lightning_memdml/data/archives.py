"""Read arrays of untrusted `.npz` archives, and images packed in them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lightning_memdml.data.paths import shown
from lightning_memdml.data.pictures import open_picture
from lightning_memdml.data.records import Record

FREE_BYTES, MAX_EXPANSION = 1 << 28, 100  # an archive may unpack to this many bytes plus 100 times its own size


def npz_arrays(path: Path, needed: Sequence[str], further: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Read arrays of a `.npz` archive; nothing in it is unpickled.

    Args:
        path: The archive.
        needed: Names of arrays that have to be there.
        further: Names of arrays that are read if they are there.

    Raises:
        ValueError: If the file is damaged or no archive, lacks an array, or would unpack to more than 256 MB plus
            100 times its own size.
    """
    _check_expansion(path)
    try:
        # A file with a single array makes numpy return that: it has no context, which is an error of either type.
        with np.load(path, allow_pickle=False) as stored:
            found, arrays = stored.files, {name: stored[name] for name in (*needed, *further) if name in stored}
    except Exception as error:  # on damaged files numpy and zipfile raise nearly every type there is
        reason = "it needs more memory than there is" if isinstance(error, MemoryError) else error
        raise ValueError(f"{shown(path)} is no readable .npz archive: {reason}. Create it again.") from error
    if lacking := [name for name in needed if name not in arrays]:
        raise ValueError(
            f"{shown(path)} has no array {', '.join(lacking)}. Found: {', '.join(found)}. Create the archive again."
        )
    return arrays


def _check_expansion(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except Exception:  # numpy finds the same, and `npz_arrays` reports it
        return
    if unpacked > (limit := FREE_BYTES + MAX_EXPANSION * path.stat().st_size):
        raise ValueError(
            f"{shown(path)}: expected an archive that unpacks to at most {limit:,} bytes but got {unpacked:,}. "
            "Write it with `np.savez`, which does not compress."
        )


class JpegArchive:
    """Image files packed end to end in one `.npz` file, held in memory and decoded when asked for.

    Args:
        path: The file; see `TableDataModule` for its arrays.

    Raises:
        ValueError: If the file is damaged, lacks an array, or its arrays do not fit together.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found = npz_arrays(path, ("jpeg", "offset", "label"), ("classes",))
        self.jpeg, self.offset, self.labels = found["jpeg"], found["offset"], found["label"]
        self._names = found.get("classes")
        self._check()

    def _check(self) -> None:
        """Raise a `ValueError` unless the arrays fit together."""
        for name, array in (("offset", self.offset), ("label", self.labels)):
            if array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
                raise ValueError(
                    f"{self.path}: expected `{name}` of integers but got {array.shape} of {array.dtype}. "
                    "Create the archive again."
                )
        if len(self.offset) != len(self.labels) + 1:
            raise ValueError(
                f"{self.path}: expected {len(self.labels) + 1} offsets but got {len(self.offset)}. "
                "Create the archive again."
            )
        if self.jpeg.ndim != 1 or self.jpeg.dtype != np.uint8:
            raise ValueError(
                f"{self.path}: expected `jpeg` of bytes but got {self.jpeg.shape} of {self.jpeg.dtype}. "
                "Create the archive again."
            )
        if self.offset[0] < 0 or self.offset[-1] > len(self.jpeg) or (self.offset[1:] < self.offset[:-1]).any():
            raise ValueError(
                f"{self.path}: expected `offset` to rise from 0 to at most {len(self.jpeg)}. Create the archive again."
            )
        if self._names is None:
            return
        if self._names.ndim != 1 or len(set(self._names.tolist())) != len(self._names):
            raise ValueError(f"{self.path}: expected `classes` of distinct names. Create the archive again.")
        if self.labels.min() < 0 or self.labels.max() >= len(self._names):
            raise ValueError(
                f"{self.path}: expected labels in [0, {len(self._names)}), one for each name in `classes`. "
                "Create the archive again."
            )

    @property
    def classes(self) -> list[int | str]:
        """All classes in the order of their numbers, by name if they have one."""
        numbers = np.unique(self.labels)
        return (numbers if self._names is None else self._names[numbers]).tolist()

    def records(self) -> list[Record]:
        """Return a record per image, all with the role `test`."""
        labels = (self.labels if self._names is None else self._names[self.labels]).tolist()
        return [Record(f"{self.path}#{i}", label, "test") for i, label in enumerate(labels)]

    def __call__(self, row: int) -> Image.Image:
        """Return image `row`, upright and in RGB."""
        return open_picture(io.BytesIO(self.jpeg[self.offset[row] : self.offset[row + 1]].tobytes()))
