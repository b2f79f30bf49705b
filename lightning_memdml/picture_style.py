"""The style of all pictures. matplotlib is optional, and imported where a figure is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#1d2433", "#6b7486"


class LineStyle(NamedTuple):
    """Colour, line and mark: each alone distinguishes two lines, in grey and for every form of colour vision."""

    color: str
    line: Any
    mark: str


#: The colours of Okabe and Ito, without the yellow, which is hard to see on white.
STYLES = (
    LineStyle("#0072B2", "-", "o"),
    LineStyle("#D55E00", "--", "v"),
    LineStyle("#009E73", "-.", "s"),
    LineStyle("#CC79A7", ":", "D"),
    LineStyle("#000000", (0, (6, 1, 1, 1, 1, 1)), "^"),
    LineStyle("#56B4E9", (0, (3, 2)), "P"),
    LineStyle("#E69F00", (0, (1, 1)), "X"),
)


def new_figure(width: float, height: float, *, free: bool = False) -> Figure:
    """Return an empty figure, which pyplot does not keep.

    Args:
        width: In inches.
        height: In inches.
        free: Whether the caller places the axes; otherwise matplotlib's constrained layout does.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white", layout=None if free else "constrained")


def plain_axes(axes: Axes, *, grid: bool = True) -> None:
    """Remove the frame above and on the right, and draw a faint grid below the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(color="0.92", linewidth=0.8)


def as_label(text: str, width: int | None = None) -> str:
    r"""Return text that matplotlib draws as it is, which would take `$...$` for a formula.

    Args:
        text: Such as the name of a class.
        width: Largest number of characters; a longer text ends in an ellipsis.

    Example:
        >>> as_label("$5 a piece"), as_label("abcdef", width=4)
        ('\\$5 a piece', 'abc…')
    """
    shown = text if width is None or len(text) <= width else f"{text[: width - 1]}…"
    return "".join(letter if letter.isprintable() else " " for letter in shown).replace("$", r"\$")
