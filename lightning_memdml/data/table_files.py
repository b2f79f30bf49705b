"""Read tables in CSV and Parquet files: the one reader of data sets and of the commands that take tables."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from lightning_memdml.data.paths import shown

MAX_ROWS = 20_000_000  # of a Parquet file, in which a few bytes can stand for billions of rows
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
         (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip


@dataclass
class Table:
    """Columns of equal length, and where each row stands in its file.

    Attributes:
        path: The file.
        columns: The cells of each column; texts in a CSV file, values of any type in a Parquet file.
        lines: Line number of each row of a CSV file.
        names: Names of all columns of the file, of those not read too.
        format: What kind of file it is, for messages.
    """

    path: Path
    columns: dict[str, list[Any]]
    names: list[str]
    format: str
    lines: list[int] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def where(self, row: int) -> str:
        """Return where a row stands, for messages."""
        return f"{shown(self.path)}, " + (f"row {row}" if self.lines is None else f"line {self.lines[row]}")

    def text(self, column: str, row: int, default: str = "") -> str:
        """Return a cell as text, `default` if there is no such column, and an empty text for an empty cell.

        Raises:
            ValueError: If the cell holds several values.
        """
        if column not in self.columns:
            return default
        cell = self.columns[column][row]
        if isinstance(cell, bytes):
            return cell.decode(errors="replace").strip()
        if isinstance(cell, dict | list):
            raise ValueError(
                f"{self.where(row)}, column `{column}`: expected a text or a number but got {cell!r:.60}. Write one "
                "value in each row."
            )
        return "" if cell is None else str(cell).strip()


def is_parquet(path: Path) -> bool:
    """Return whether a path is that of a Parquet file, or of a folder with such files."""
    return path.suffix.lower() == ".parquet"


def read_csv(path: Path, wanted: Sequence[str] | None = None) -> Table:
    """Return the rows of a CSV file with a header.

    The file is text in UTF-8, or in UTF-16 with a byte order mark. Its cells are separated by commas, semicolons, tabs
    or vertical bars, whichever fits the header best. Empty lines are left out.

    Args:
        path: The file.
        wanted: The columns to read, as far as they are there; by default all.

    Raises:
        ValueError: If the file is not text, or a row has more or fewer cells than the header.
    """
    text = read_text(path)
    first = next((line for line in re.split(r"[\r\n]+", text) if line.strip()), "")
    delimiter, skipped = _delimiter(first, wanted or ())
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)][skipped:]
    except csv.Error as error:
        raise ValueError(f"{shown(path)} is no readable CSV file: {error}. Write it again.") from error
    header = [name.strip() for name in rows[0][1]] if rows else []
    if twice := [name for name, count in Counter(header).items() if name and count > 1]:
        raise ValueError(f"{shown(path)} has more than one column named {', '.join(map(repr, twice))}. Rename one.")
    for line, cells in rows[1:]:
        if len(cells) != len(header):
            raise ValueError(
                f"{shown(path)}, line {line}: expected {len(header)} cells, as in the header, but got {len(cells)}. "
                f"Cells are separated by {DELIMITERS.get(delimiter, repr(delimiter))}; correct the line."
            )
    if delimiter != ",":
        rank_zero_info(f"{shown(path)}: cells are separated by {DELIMITERS.get(delimiter, repr(delimiter))}.")
    places = {name: place for place, name in enumerate(header) if name and (wanted is None or name in wanted)}
    columns = {name: [cells[place].strip() for _, cells in rows[1:]] for name, place in places.items()}
    kind = f"CSV separated by {DELIMITERS.get(delimiter, repr(delimiter))}"
    return Table(path, columns, header, kind, [line for line, _ in rows[1:]])


def read_text(path: Path) -> str:
    """Return the content of a text file.

    Raises:
        ValueError: If it is not UTF-8, nor UTF-16 or UTF-32 with a byte order mark.
    """
    content = path.read_bytes()
    encoding = next((encoding for mark, encoding in MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{shown(path)}, line {line}: expected text in UTF-8 but got the byte 0x{content[error.start]:02x}. "
            "Save the file as UTF-8."
        ) from error
    if "\0" in text:
        raise ValueError(f"{shown(path)}: expected text in UTF-8 but got NUL bytes. Save the file as UTF-8.")
    return text


def _delimiter(line: str, wanted: Sequence[str]) -> tuple[str, int]:
    """Return what separates the cells of the first line, and how many lines stand before the header."""
    if declared := re.fullmatch(r"sep=(.)", line.strip("\r\n")):  # Excel writes and reads such a first line
        return declared[1], 1

    def fit(delimiter: str) -> tuple[int, int]:
        names = {cell.strip(' "') for cell in line.split(delimiter)}
        return len(names.intersection(wanted)), len(names)

    return max(DELIMITERS, key=fit), 0


def read_parquet(path: Path, wanted: Sequence[str] | None = None) -> Table:
    """Return the rows of a Parquet file, or of a folder of such files.

    The folders in it may be partitions, `label=7/part-0.parquet`; such a value is a text.

    Args:
        path: The file or folder.
        wanted: The columns to read, as far as they are there; by default all but lists.

    Raises:
        ValueError: If the file is damaged, or has too many rows.
    """
    with _named_errors(path):
        dataset, keys = _parquet(path, ())
        read = [field.name for field in dataset.schema if _is_read(field, wanted)]
        texts = [name for name in read if name not in keys and _is_text(dataset.schema.field(name).type)]
        # Equal texts are stored once in the file: as a dictionary they are not multiplied in memory.
        table = _parquet(path, texts)[0].to_table(columns=read)
        columns = {name: _cells(table.column(name)) for name in read}
    return Table(path, columns, dataset.schema.names, "Parquet")


def read_vectors(path: Path, column: str) -> np.ndarray:
    """Return the lists of numbers in a column of a Parquet file, `(N, D)` float32.

    Raises:
        ValueError: If the file is damaged or has no such column, or a list or number is missing, or lists are not of
            one length.
    """
    from pyarrow import compute

    with _named_errors(path):
        dataset, _ = _parquet(path, ())
        if column not in dataset.schema.names:
            raise ValueError(
                f"{shown(path)} has no column `{column}` among {', '.join(dataset.schema.names)}. Rename the column."
            )
        lists = dataset.to_table(columns=[column]).column(column)
        lengths = np.array(compute.fill_null(compute.list_value_length(lists), -1).to_numpy(), dtype=np.int64)
        odd = np.flatnonzero((lengths != lengths[0]) | (lengths < 1)) if len(lengths) else lengths
        if len(odd):
            raise ValueError(
                f"{shown(path)}, row {odd[0]}: expected `{column}` to be a list of {max(lengths[0], 1)} numbers, as in "
                f"row 0, but got {'none' if lengths[odd[0]] < 0 else lengths[odd[0]]}. Remove or correct these "
                f"{len(odd):,} rows."
            )
        values = lists.combine_chunks().flatten()
        if values.null_count:
            row = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0]) // int(lengths[0])
            raise ValueError(
                f"{shown(path)}, row {row}: expected numbers in `{column}` but {values.null_count:,} are missing. "
                "Remove or correct these rows."
            )
        return np.array(values.to_numpy(zero_copy_only=False), dtype=np.float32).reshape(len(lengths), -1)


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Name the file in the errors of pyarrow."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        reason = "it needs more memory than there is" if isinstance(error, MemoryError) else error
        raise ValueError(f"{shown(path)} is no readable Parquet file: {reason}. Write it again.") from error


def _parquet(path: Path, texts: Sequence[str]) -> tuple[Any, set[str]]:
    """Return a Parquet file, or a folder of them, and the names of its partitions.

    Args:
        path: The file or folder.
        texts: Columns to read as dictionaries.

    Raises:
        ValueError: If it has too many rows.
    """
    import pyarrow
    from pyarrow import dataset

    if odd := [file for file in path.rglob("*") if not file.is_file() and not file.is_dir()]:
        raise ValueError(f"{shown(path)}: expected files but {shown(odd[0])} is a broken link or a pipe. Remove it.")
    files = [file.relative_to(path) for file in path.rglob("*.parquet")]
    keys = {part.split("=", 1)[0] for file in files for part in file.parts[:-1] if "=" in part}
    partitions = dataset.partitioning(pyarrow.schema([(key, pyarrow.string()) for key in sorted(keys)]), flavor="hive")
    options = dataset.ParquetFileFormat(read_options=dataset.ParquetReadOptions(dictionary_columns=texts))
    found = dataset.dataset(path, format=options, partitioning=partitions)
    if (rows := found.count_rows()) > MAX_ROWS:
        raise ValueError(f"{shown(path)}: expected at most {MAX_ROWS:,} rows but got {rows:,}. Split the table.")
    return found, keys


def _is_read(field: Any, wanted: Sequence[str] | None) -> bool:
    from pyarrow import types

    if wanted is not None:
        return field.name in wanted
    # pyarrow 15 does not count lists of a fixed size among the nested types.
    return not types.is_nested(field.type) and not types.is_fixed_size_list(field.type)


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return any(test(kind) for test in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary))


def _cells(column: Any) -> list[Any]:
    """Return the values of a column; equal texts of a dictionary are one object."""
    import pyarrow

    cells: list[Any] = []
    for chunk in column.chunks:
        if not pyarrow.types.is_dictionary(chunk.type):
            cells += chunk.to_pylist()
            continue
        words = chunk.dictionary.to_pylist()
        cells += [None if place is None else words[place] for place in chunk.indices.to_pylist()]
    return cells
