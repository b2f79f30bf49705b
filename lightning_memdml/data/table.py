"""Images listed in a table (CSV, Parquet), or packed in one `.npz` file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from lightning_memdml.checks import check_types
from lightning_memdml.data.archives import JpegArchive
from lightning_memdml.data.labels import is_missing, labels_of
from lightning_memdml.data.module import RetrievalDataModule
from lightning_memdml.data.paths import listed_path, local_path, required_file, shown
from lightning_memdml.data.records import Box, ClassSplit, Record, Role, box_of, split_classes
from lightning_memdml.data.table_files import Table, read_csv, read_parquet

FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
BOX = ("x_1", "y_1", "x_2", "y_2")
COLUMNS = ("path", "label", "split", "is_query", "is_gallery", *BOX)
NO_ROW = "{} has no row; expected one for each image, with its `path` and `label`. Add them."
READERS: dict[str, Callable[[Path, Sequence[str]], Table]] = {".csv": read_csv, ".parquet": read_parquet}


class TableDataModule(RetrievalDataModule):
    """Images listed in a table, in the layout of open-metric-learning, or packed in one `.npz` archive.

    A **table** (`.csv`, `.parquet`, or a folder `*.parquet` of such files) has the columns `path`, relative to `root`
    or absolute, and `label`; further

    - `split`: `train`, `validation` or `test`. As in open-metric-learning, `validation` is what is tested on; only if
      there are `test` rows as well, the `validation` rows are the validation classes. Without this column the
      classes are split by `split_by`;
    - `is_query`, `is_gallery`: role of a test image, true or false. Without them every test image is both;
    - `x_1`, `y_1`, `x_2`, `y_2`: the part of the image that shows the object, in pixels.

    Other columns are not read. A label is a number or a text: `7` and `7.0` are one class, `007` is another. An
    **archive** (`.npz`, without pickles) has the arrays `jpeg` (uint8, all image files end to end), `offset` (`N + 1`
    integers: file `i` is `jpeg[offset[i]:offset[i + 1]]`), `label` (`N` integers), and, if the classes have names,
    `classes` (texts; label `c` is `classes[c]`). Its classes are split by `split_by`.

    Args:
        path: The table or archive.
        root: Folder that relative paths of a table start from; by default the table's own.
        split_by: Which classes train if the file has no `split`: the first of two `halves`, or every second class
            (`alternate`), for classes that are ordered by kind. Integer labels are ordered by size, others as text.
        columns: Names of columns in the table, where they are others: `{path: image, label: category}`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, lacks a column or array, or points out of `root`; the message names the row.

    Example:
        >>> data = TableDataModule("my/table.csv", columns={"path": "image", "label": "category"})
    """

    def __init__(
        self,
        path: str,
        root: str | None = None,
        split_by: ClassSplit = "halves",
        columns: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        check_types(TableDataModule.__init__, locals())
        super().__init__(**kwargs)
        self.path = local_path(path, "path")
        self.root = self.path.parent if root is None else local_path(root, "root")
        self.split_by = split_by
        self.columns = {name: name for name in COLUMNS} | (columns or {})
        if unknown := [name for name in self.columns if name not in COLUMNS]:
            raise ValueError(
                f"Expected `columns` to map some of {', '.join(COLUMNS)} to names in the table but got {unknown[0]!r}. "
                f"{_nearest(unknown[0], COLUMNS)}"
            )
        self.suffix = self.path.suffix.lower()
        if self.suffix not in (*READERS, ".npz"):
            raise ValueError(
                f"Expected `path` to end in {', '.join(READERS)} or .npz but got {path!r}. Convert the table."
            )

    def records(self) -> list[Record]:
        """Return a record per row of the table, or per image of the archive."""
        if not (self.suffix == ".parquet" and self.path.is_dir()):
            required_file(self.path, "TableDataModule", "Pass `path=` of a table or an archive.")
        if self.suffix == ".npz":
            return split_classes(self.archive.records(), self.archive.classes, self.split_by)
        table = self._table()
        labels = labels_of(table.columns["label"], table.where)
        _require_paths(table)
        has_test = any(_word(table, "split", row) == "test" for row in range(len(table)))
        records: list[Record] = []
        for row, label in enumerate(labels):
            path = listed_path(self.root, table.text("path", row), table.where(row))
            records.append(Record(path, label, _role(table, row, has_test), _box(table, row)))
        if "split" in table.columns:
            return records
        return split_classes(records, sorted({record.label for record in records}), self.split_by)

    def images(self, records: Sequence[Record]) -> Tensor | Callable[[int], Image.Image | Tensor]:
        """Return the function that opens the image of a row."""
        return self.archive if self.suffix == ".npz" else super().images(records)

    @cached_property
    def archive(self) -> JpegArchive:
        """The archive at `path`, in memory."""
        return JpegArchive(self.path)

    def _table(self) -> Table:
        """Return the table, its columns under the names of this package."""
        table = READERS[self.suffix](self.path, list(self.columns.values()))
        table.columns = {name: table.columns[own] for name, own in self.columns.items() if own in table.columns}
        where = shown(self.path)
        for name in ("path", "label"):
            if name not in table.columns:
                raise ValueError(_missing_column(table, self.columns[name]))
        if not len(table):
            raise ValueError(NO_ROW.format(where))
        if "split" not in table.columns and {"is_query", "is_gallery"} & table.columns.keys():
            raise ValueError(
                f"{where} has the column `is_query` or `is_gallery` but no `split`. Add the column `split`."
            )
        return table


def _missing_column(table: Table, name: str) -> str:
    """Return the message about a column that a table lacks."""
    found = [column for column in table.names if column]
    if not found:
        return NO_ROW.format(shown(table.path))
    lower = {column.lower(): column for column in found}
    near = get_close_matches(name.lower(), lower, n=1)
    hint = f"; is it `{lower[near[0]]}`?" if near else "."
    return (
        f"{shown(table.path)} ({table.format}) has no column `{name}`. Found: {', '.join(sorted(found))}{hint} "
        "Pass names of other columns as `--data.columns '{path: ..., label: ...}'`."
    )


def _require_paths(table: Table) -> None:
    missing = [row for row in range(len(table)) if is_missing(table.text("path", row))]
    if missing:
        raise ValueError(
            f"{table.where(missing[0])}: the path is missing (in {len(missing):,} of {len(table):,} rows). Fill in "
            "these cells, or remove the rows."
        )


def _nearest(name: str, names: Sequence[str]) -> str:
    near = get_close_matches(name, names, n=1)
    return f"Is it `{near[0]}`?" if near else "Write the name of this package first: `{path: image}`."


def _word(table: Table, column: str, row: int) -> str:
    return table.text(column, row).lower()


def _role(table: Table, row: int, has_test: bool) -> Role:
    if "split" not in table.columns:
        return "test"
    split = _word(table, "split", row)
    if split not in ("train", "validation", "valid", "val", "test"):
        raise ValueError(
            f"{table.where(row)}: expected `split` to be train, validation or test but got "
            f"{table.text('split', row)!r}. Correct the cell."
        )
    if split == "train" or (split != "test" and has_test):
        return "train" if split == "train" else "val"
    is_query, is_gallery = (_flag(table, name, row) for name in ("is_query", "is_gallery"))
    if not (is_query or is_gallery):
        raise ValueError(
            f"{table.where(row)}: the test image is neither query nor gallery. Set one of the two, or remove the row."
        )
    if is_query and is_gallery:
        return "test"
    return "query" if is_query else "gallery"


def _flag(table: Table, column: str, row: int) -> bool:
    text = table.text(column, row, default="true")
    if text.lower() not in FLAGS:
        raise ValueError(
            f"{table.where(row)}: expected `{column}` of a test image to be true or false but got {text!r}. "
            "Correct the cell."
        )
    return FLAGS[text.lower()]


def _box(table: Table, row: int) -> Box | None:
    cells = [table.text(name, row) for name in BOX]
    empty = [is_missing(cell) for cell in cells]
    if all(empty):
        return None
    if any(empty):
        raise ValueError(
            f"{table.where(row)}: expected four numbers in {', '.join(BOX)} but got {cells}. Fill in all, or none."
        )
    return box_of(cells, table.where(row))
