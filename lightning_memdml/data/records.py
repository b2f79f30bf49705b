"""What a data set lists about each image (`Record`), and which records are one image."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from lightning_memdml.data.paths import shown

Role = Literal["train", "val", "test", "query", "gallery"]
ClassSplit = Literal["halves", "alternate"]
Box = tuple[float, float, float, float]


class Record(NamedTuple):
    """One image of a data set, as its list files describe it.

    Attributes:
        path: Path of the image. It names the image in errors and galleries.
        label: The class as the data set writes it; equal labels are one class, in every role.
        role: `train`; `val` (only if the data set comes with its own validation classes); `test`, both
            query and gallery; or `query` and `gallery` apart.
        box: Left, upper, right, lower edge in pixels of the part that shows the object; `None` for all of it.
    """

    path: str
    label: int | str
    role: Role
    box: Box | None = None


def box_of(cells: Sequence[Any], where: str) -> Box:
    """Return left, upper, right and lower edge of a box.

    Raises:
        ValueError: If they are not four finite numbers, or have no area.
    """
    try:
        left, upper, right, lower = (float(cell) for cell in cells)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: expected a box of four numbers but got {cells!r}. Correct the box.") from None
    if not all(map(math.isfinite, (left, upper, right, lower))) or left >= right or upper >= lower:
        raise ValueError(
            f"{where}: expected left < right and upper < lower edge of a box but got {cells!r}. Correct the box."
        )
    return left, upper, right, lower


def split_classes(records: Sequence[Record], classes: Sequence[int | str], split_by: ClassSplit) -> list[Record]:
    """Return `records` with the roles `train` and `test`, of a data set that has no split of its own.

    Args:
        records: The records; their roles do not matter.
        classes: All labels, in the order to split them by.
        split_by: `halves`: the first half of the classes trains (the smaller one of an odd number). `alternate`: the
            first, third, fifth, ... class trains; for classes that are ordered by kind.

    Raises:
        ValueError: If `split_by` is neither.

    Example:
        >>> records = [Record(f"{label}.jpg", label, "test") for label in "abcde"]
        >>> [record.role for record in split_classes(records, "abcde", "halves")]
        ['train', 'train', 'test', 'test', 'test']
        >>> [record.role for record in split_classes(records, "abcde", "alternate")]
        ['train', 'test', 'train', 'test', 'train']
    """
    if split_by not in get_args(ClassSplit):
        raise ValueError(
            f"Expected `split_by` to be one of {', '.join(get_args(ClassSplit))} but got {split_by!r}. "
            "Pass one of these."
        )
    train = set(classes[: len(classes) // 2] if split_by == "halves" else classes[::2])
    return [record._replace(role="train" if record.label in train else "test") for record in records]


def first_rows(records: Sequence[Record], one_label: bool = True) -> list[int]:
    """Return, for each record, the row of the first record of the same image: the same box of the same file.

    Files are compared as the operating system identifies them, so that links, `./` and names that a file system does
    not distinguish lead to one image.

    Args:
        records: The records; images of files.
        one_label: Refuse an image with two labels. If false, an image with two labels counts as two.

    Raises:
        ValueError: If an image has two labels, and `one_label` is set.

    Example:
        >>> first_rows([Record("a.jpg", 1, "query"), Record("b.jpg", 1, "query"), Record("./a.jpg", 1, "gallery")])
        [0, 1, 0]
    """
    files: dict[str, Any] = {}
    first: dict[Any, int] = {}
    rows = []
    for row, record in enumerate(records):
        if record.path not in files:
            files[record.path] = _file_identity(record.path)
        key = files[record.path], record.box, None if one_label else record.label
        before = first.setdefault(key, row)
        if records[before].label != record.label:
            other = "" if records[before].path == record.path else f" (also listed as {shown(records[before].path)})"
            raise ValueError(
                f"Expected one class for each image but got {records[before].label!r} and {record.label!r} for "
                f"{shown(record.path)}{other}. Correct or remove one of the two."
            )
        rows.append(before)
    return rows


def _file_identity(path: str) -> Any:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return os.path.abspath(path)
    # Size and time too, because some network file systems use numbers again.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
