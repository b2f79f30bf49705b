"""Images listed in a table (CSV, Parquet), or packed in one `.npz` file."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from lightning_memdml.data.images import ClassSplit, Record, Role, inside, npz_arrays, required_file, split_classes
from lightning_memdml.data.module import RetrievalDataModule

MISSING = ("", "none", "nan", "null", "<na>")  # how CSV writers spell an empty cell
FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
BOX = ("x_1", "y_1", "x_2", "y_2")

Rows = list[tuple[str, dict[str, str]]]  # where each row stands, for messages, and its cells


class TableDataModule(RetrievalDataModule):
    """Images listed in a table, in the layout of open-metric-learning, or packed in one `.npz` archive.

    A **table** (`.csv`, `.parquet`) has the columns `path`, relative to `root`, and `label`; further

    - `split`: `train`, `validation` or `test`. As in open-metric-learning, `validation` is what is tested on; only if
      there are `test` rows as well, the `validation` rows are the validation classes. Without this column the
      classes are split by `split_by`;
    - `is_query`, `is_gallery`: role of a test image, true or false. Without them every test image is both;
    - `x_1`, `y_1`, `x_2`, `y_2`: the part of the image that shows the object, in pixels.

    Other columns are not used. An **archive** (`.npz`, without pickles) has the arrays `jpeg` (uint8, all image files
    end to end), `offset` (`N + 1` integers: file `i` is `jpeg[offset[i]:offset[i + 1]]`), `label` (`N` integers), and,
    if the classes have names, `classes` (texts; label `c` is `classes[c]`). Its classes are split by `split_by`.

    Args:
        path: The table or archive.
        root: Folder the paths of a table are relative to; by default the table's own.
        split_by: Which classes train if the file does not say: the first of two `halves`, or every second class
            (`alternate`), for classes that are ordered by kind. Integer labels are ordered by size, others as text.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, lacks a column or array, or points out of `root`; the message names the row.
    """

    def __init__(self, path: str, root: str | None = None, split_by: ClassSplit = "halves", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.path = Path(path).expanduser()
        self.root = self.path.parent if root is None else Path(root).expanduser()
        self.split_by = split_by
        if self.path.suffix not in (*READERS, ".npz"):
            raise ValueError(f"Expected `path` to end in {', '.join(READERS)} or .npz but got {path!r}.")

    def records(self) -> list[Record]:
        """Return a record per row of the table, or per image of the archive."""
        required_file(self.path, "TableDataModule", "Pass `path=` of a table or an archive.")
        if self.path.suffix == ".npz":
            return split_classes(self.archive.records(), self.archive.classes, self.split_by)
        rows = READERS[self.path.suffix](self.path)
        if not rows:
            raise ValueError(f"{self.path} has no row; expected one for each image, with its `path` and `label`.")
        columns = {column for _, row in rows[:1] for column in row}
        _require_columns(columns, self.path)
        splits = {row.get("split", "").lower() for _, row in rows}
        records = [_record(row, where, self.root, "test" in splits) for where, row in rows]
        if all(re.fullmatch(r"-?(0|[1-9]\d{0,17})", str(record.label), re.ASCII) for record in records):  # not "01"
            records = [record._replace(label=int(record.label)) for record in records]
        if "split" in columns:
            return records
        return split_classes(records, sorted({record.label for record in records}), self.split_by)

    def images(self, records: Sequence[Record]) -> Tensor | Callable[[int], Image.Image | Tensor]:
        """Return the function that opens the image of a row."""
        return self.archive if self.path.suffix == ".npz" else super().images(records)

    @cached_property
    def archive(self) -> JpegArchive:
        """The archive at `path`, in memory."""
        return JpegArchive(self.path)


def _require_columns(columns: set[str], path: Path) -> None:
    """Raise a `ValueError` unless a table with these columns can be used."""
    for needed in ("path", "label"):
        if needed not in columns:
            near = get_close_matches(needed, columns, n=1)
            hint = f"; is it `{near[0]}`?" if near else "."
            raise ValueError(f"{path} has no column `{needed}`. Found: {', '.join(sorted(columns))}{hint}")
    if "split" not in columns and columns & {"is_query", "is_gallery"}:
        raise ValueError(
            f"{path} has the column `is_query` or `is_gallery` but no `split` to say which images they are for."
        )


def _record(row: dict[str, str], where: str, root: Path, has_test: bool) -> Record:
    """Return the record of one row of a table."""
    if row["label"].lower() in MISSING:
        raise ValueError(f"{where}: the label is missing.")
    role = _role(row, where, has_test) if "split" in row else "test"
    return Record(inside(root, row["path"], where), row["label"], role, _box(row, where))


def _role(row: dict[str, str], where: str, has_test: bool) -> Role:
    split = row["split"].lower()
    if split not in ("train", "validation", "val", "test"):
        raise ValueError(f"{where}: expected `split` to be train, validation or test but got {row['split']!r}.")
    if split == "train" or (split != "test" and has_test):
        return "train" if split == "train" else "val"
    is_query, is_gallery = (_flag(row, name, where) for name in ("is_query", "is_gallery"))
    if not (is_query or is_gallery):
        raise ValueError(f"{where}: the test image is neither query nor gallery; set one, or remove the row.")
    if is_query and is_gallery:
        return "test"
    return "query" if is_query else "gallery"


def _flag(row: dict[str, str], name: str, where: str) -> bool:
    if (text := row.get(name, "true").lower()) not in FLAGS:
        raise ValueError(f"{where}: expected `{name}` of a test image to be true or false but got {row[name]!r}.")
    return FLAGS[text]


def _box(row: dict[str, str], where: str) -> tuple[float, float, float, float] | None:
    cells = [row.get(name, "") for name in BOX]
    if all(cell.lower() in MISSING for cell in cells):
        return None
    try:
        left, upper, right, lower = (float(cell) for cell in cells)
    except ValueError:
        raise ValueError(f"{where}: expected four numbers in {', '.join(BOX)} but got {cells}.") from None
    return left, upper, right, lower


def read_csv(path: Path) -> Rows:
    """Return the rows of a CSV file with a header.

    Raises:
        ValueError: If the file is no text, or a row has more or fewer cells than the header.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            rows = [(f"{path}, line {reader.line_num}", cells) for cells in reader if cells]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no readable CSV file: {error}.") from error
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise ValueError(f"{path} has more than one column named {', '.join(map(repr, twice))}.")
    for where, cells in rows:
        if len(cells) != len(header):
            raise ValueError(f"{where}: expected {len(header)} cells, as in the header, but got {len(cells)}.")
    return [(where, dict(zip(header, map(str.strip, cells), strict=True))) for where, cells in rows]


def read_parquet(path: Path) -> Rows:
    """Return the rows of a Parquet file, every cell as text.

    Raises:
        ValueError: If the file is damaged.
    """
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (ValueError, OSError) as error:  # pyarrow's own errors are of these types
        raise ValueError(f"{path} is no readable Parquet file: {error}.") from error
    return [(f"{path}, row {i}", {name: str(cell) for name, cell in row.items()}) for i, row in enumerate(rows)]


READERS: dict[str, Callable[[Path], Rows]] = {".csv": read_csv, ".parquet": read_parquet}


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
                raise ValueError(f"{self.path}: expected `{name}` of integers but got {array.shape} of {array.dtype}.")
        if len(self.offset) != len(self.labels) + 1:
            raise ValueError(f"{self.path}: expected {len(self.labels) + 1} offsets but got {len(self.offset)}.")
        if self.jpeg.ndim != 1 or self.jpeg.dtype != np.uint8:
            raise ValueError(f"{self.path}: expected `jpeg` of bytes but got {self.jpeg.shape} of {self.jpeg.dtype}.")
        if self.offset[0] < 0 or self.offset[-1] > len(self.jpeg) or (np.diff(self.offset) < 0).any():
            raise ValueError(f"{self.path}: expected `offset` to rise from 0 to at most {len(self.jpeg)}.")
        if self._names is None:
            return
        if len(set(self._names.tolist())) != len(self._names):
            raise ValueError(f"{self.path}: expected `classes` of distinct names.")
        if self.labels.min() < 0 or self.labels.max() >= len(self._names):
            raise ValueError(
                f"{self.path}: expected labels in [0, {len(self._names)}), one for each name in `classes`."
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
        """Decode image `row`."""
        return Image.open(io.BytesIO(self.jpeg[self.offset[row] : self.offset[row + 1]].tobytes()))
