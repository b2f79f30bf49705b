"""Retrieval galleries: queries with their nearest references, marked right or wrong, as a figure or a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ImageOps

from lightning_memdml.atomic_write import atomic_write
from lightning_memdml.picture_style import FAINT, INK, as_label, new_figure
from lightning_memdml.retrieval.cells import Cell, ClassNames, ImageSource, gallery_rows
from lightning_memdml.retrieval.examples import RetrievalExample
from lightning_memdml.retrieval.page import gallery_html

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"query": "#33415c", "right": "#1a7f4b", "wrong": "#c8323c", "found": "#8a93a5"}
_PAPER = "#eef0f4"
_CELL, _PICTURE, _ROW, _HEAD, _GAP, _EDGE = 1.15, 1.05, 1.57, 0.62, 0.28, 0.18  # inches


def save_gallery(
    path: str | Path,
    examples: Sequence[RetrievalExample],
    image: ImageSource,
    gallery_image: ImageSource | None = None,
    *,
    class_names: ClassNames = None,
    title: str = "",
) -> Path:
    """Write the page of `gallery_html` (`.html`) or the figure of `gallery_figure` (`.png`, `.pdf`, `.svg`).

    Args:
        path: The file; folders are made.
        examples: From `retrieval_examples`.
        image: Returns the picture of a query by its position.
        gallery_image: Returns that of a reference; by default `image`.
        class_names: Name of each label; the label itself where there is none.
        title: A heading.

    Raises:
        ValueError: If the ending is unknown, or there is no example.
    """
    path = Path(path)
    if path.suffix not in (".html", ".png", ".pdf", ".svg"):
        raise ValueError(f"Expected a path ending in .html, .png, .pdf or .svg but got {path.name!r}. Pass page.html.")
    with atomic_write(path) as unfinished:
        if path.suffix == ".html":
            page = gallery_html(examples, image, gallery_image, class_names=class_names, title=title)
            unfinished.write_text(page, encoding="utf-8")
        else:
            figure = gallery_figure(examples, image, gallery_image, class_names=class_names, title=title)
            figure.savefig(unfinished, dpi=150)
    return path


def gallery_figure(
    examples: Sequence[RetrievalExample],
    image: ImageSource,
    gallery_image: ImageSource | None = None,
    *,
    class_names: ClassNames = None,
    title: str = "",
) -> Figure:
    """Draw a row per query: the query, its neighbours, and the first right reference if none of them is.

    Args:
        examples: From `retrieval_examples`.
        image: Returns the picture of a query by its position.
        gallery_image: Returns that of a reference; by default `image`.
        class_names: Name of each label; the label itself where there is none.
        title: A heading.

    Returns:
        A matplotlib figure, which pyplot does not keep.

    Raises:
        ValueError: If there is no example.
    """
    rows = gallery_rows(examples, image, gallery_image, class_names)
    headings = {"query": _EDGE, "nearest neighbours": _EDGE + _CELL + _GAP}
    if any(row[-1].rank for row in rows):
        neighbours = max(len(example.neighbours) for example in examples)
        headings["first right one"] = _EDGE + (1 + neighbours) * _CELL + 2 * _GAP
    last = headings.get("first right one", _EDGE + _GAP + (max(map(len, rows)) - 1) * _CELL)
    width, height = last + _CELL + 0.1, _HEAD + len(rows) * _ROW + 0.1
    figure = new_figure(width, height, free=True)
    figure.text(_EDGE / width, 1 - 0.2 / height, as_label(title), fontsize=12, weight="bold", color=INK, va="top")
    for text, left in headings.items():
        figure.text(left / width, 1 - (_HEAD - 0.06) / height, text, fontsize=8, color=FAINT)
    for number, row in enumerate(rows):
        bottom = height - _HEAD - number * _ROW - _CELL
        for place, cell in enumerate(row):
            left = last if cell.rank else _EDGE + place * _CELL + (_GAP if place else 0)
            size = (left / width, bottom / height, _PICTURE / width, _PICTURE / height)
            _draw(figure.add_axes(size), cell)
    return figure


def _draw(axes: Axes, cell: Cell) -> None:
    """Draw one picture, padded to a square, in a frame that is dashed if it is wrong, above two lines of text."""
    side, colour = max(cell.picture.size), _COLOURS[cell.kind]
    axes.imshow(np.asarray(ImageOps.pad(cell.picture, (side, side), color=_PAPER)), interpolation="antialiased")
    low, high = -0.5 - 0.04 * side, side - 0.5 + 0.04 * side  # leaves a gap between picture and frame
    axes.set(xticks=[], yticks=[], xlim=(low, high), ylim=(high, low))
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2, capstyle="projecting")
        if cell.kind == "wrong":
            spine.set(linestyle=(0, (2.4, 1.6)), capstyle="butt")
    if cell.kind == "query":
        _write(axes, 0, cell.name, colour, "bold")
    else:
        _write(axes, 0, cell.facts, INK if cell.kind == "found" else colour, "bold")
        _write(axes, 1, cell.rank or cell.name, INK, "normal")


def _write(axes: Axes, line: int, text: str, colour: str, weight: str) -> None:
    axes.annotate(
        as_label(text, width=20),
        xy=(0, 0),
        xytext=(0, -4 - 9 * line),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=6.5,
        color=colour,
        weight=weight,
        va="top",
    )
