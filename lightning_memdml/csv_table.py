"""Writes tables for people as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning_memdml.atomic_write import atomic_write


def write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]], float_format: str | None = None) -> None:
    """Write a table. A text that a spreadsheet would take for a formula is written with a leading apostrophe.

    Args:
        path: The file.
        head: Names of the columns.
        rows: Cells; NaN and None are left empty.
        float_format: Such as `".7g"`; by default all digits.

    Raises:
        OSError: If the disk is full.
    """
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(map(as_text_cell, head))
        writer.writerows([_cell(value, float_format) for value in row] for row in rows)


def as_text_cell(text: str) -> str:
    """Return a text that a spreadsheet takes for a text.

    Example:
        >>> as_text_cell("=1+1"), as_text_cell("cat")
        ("'=1+1", 'cat')
    """
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") and text[:1] else text


def _cell(value: Any, float_format: str | None) -> Any:
    if isinstance(value, float):
        if value != value:
            return ""
        return value if float_format is None else format(value, float_format)
    return as_text_cell(value) if isinstance(value, str) else value
