"""The class that a cell of a table stands for: the same label is the same class, in any kind of file."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any

import numpy as np

MISSING = ("", "none", "nan", "-nan", "null", "<na>", "n/a", "#n/a", "nat")  # how tables write an empty cell
INTEGER = re.compile(r"(-?0|-?[1-9]\d{0,18})(\.0+)?", re.ASCII)  # not "007", which is a text
UNSEEN = "\u200b\u200e\u200f\u2060\ufeff"  # spaces without width, marks of direction and of byte order
AROUND = re.compile(f"^[\\s{UNSEEN}]+|[\\s{UNSEEN}]+$")
NUMBERS = (float, Decimal, np.floating)


def normal_text(text: str) -> str:
    """Return a text without space and unseen characters around it, and with each accented letter as one character.

    The names that macOS gives to files have accents as characters of their own, which look the same.

    Example:
        >>> normal_text("cafe\N{COMBINING ACUTE ACCENT} ") == "caf\N{LATIN SMALL LETTER E WITH ACUTE}"
        True
    """
    return unicodedata.normalize("NFC", AROUND.sub("", text))


def is_missing(text: str) -> bool:
    """Return whether a text is how tables write an empty cell: nothing, or `nan`, `NULL`, `N/A` and the like.

    Example:
        >>> [is_missing(text) for text in ("", "NaN", "NA", "na", "0")]
        [True, True, True, False, False]
    """
    return text.lower() in MISSING or text == "NA"  # in small letters it is a syllable


def label_of(cell: Any) -> int | str | None:
    """Return the label in a cell: a number if it is an integer, else a text; `None` if the cell is empty.

    A float that is an integer is this integer. Leading zeros make a text.

    Raises:
        ValueError: If the cell is neither a number nor a text.

    Example:
        >>> [label_of(cell) for cell in (7, 7.0, "7", "7.0", " 7 ", "007", "cat", None, float("nan"), "")]
        [7, 7, 7, 7, 7, '007', 'cat', None, None, None]
    """
    if isinstance(cell, bytes):
        try:
            cell = cell.decode()
        except UnicodeDecodeError:
            raise ValueError(f"expected text in UTF-8 but got {cell!r}. Write the labels as text") from None
    if cell is None or (isinstance(cell, NUMBERS) and math.isnan(cell)):
        return None
    if isinstance(cell, str):
        text = normal_text(cell)
        if is_missing(text):
            return None
        whole = INTEGER.fullmatch(text)
        return _integer(int(whole[1])) if whole else text
    if isinstance(cell, int | np.integer) and not isinstance(cell, bool):
        return _integer(int(cell))
    if isinstance(cell, NUMBERS):
        whole_number = cell % 1 == 0 and abs(cell) < 2**53  # beyond, floats skip integers
        return int(cell) if whole_number else str(cell)
    if isinstance(cell, dict | list | tuple | set):
        raise ValueError(f"expected a number or a text but got {cell!r}. Write one label in each row")
    return str(cell)


def _integer(number: int) -> int | str:
    return number if abs(number) < 2**63 else str(number)  # which a tensor cannot hold


def labels_of(cells: Iterable[Any], where: Callable[[int], str], name: str = "label") -> list[int | str]:
    """Return the labels of a column: integers if all of them are, else texts.

    Args:
        cells: The column.
        where: Function of a row number that returns its place, for messages.
        name: Name of the column, for messages.

    Raises:
        ValueError: If labels are missing; the message counts them and names the first row.

    Example:
        >>> labels_of(["3", "12"], "row {}".format), labels_of(["3", "x"], "row {}".format)
        ([3, 12], ['3', 'x'])
    """
    known: dict[Any, int | str | None] = {}
    labels: list[Any] = []
    for row, cell in enumerate(cells):
        key = (type(cell), repr(cell) if isinstance(cell, dict | list) else cell)
        if key not in known:
            known[key] = _label_at(cell, where(row), name)
        labels.append(known[key])
    missing = [row for row, label in enumerate(labels) if label is None]
    if missing:
        raise ValueError(
            f"{where(missing[0])}: the {name} is missing (in {len(missing):,} of {len(labels):,} rows). "
            "Fill in these cells, or remove the rows."
        )
    return labels if all(isinstance(label, int) for label in labels) else [str(label) for label in labels]


def _label_at(cell: Any, where: str, name: str) -> int | str | None:
    try:
        return label_of(cell)
    except ValueError as error:
        raise ValueError(f"{where}, column `{name}`: {error}.") from error
