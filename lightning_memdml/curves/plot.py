"""The picture of pair weights: of positives, of negatives, and below them the number of pairs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_memdml.curves.reading import BINS, EDGES, SIDES, Reading, Side
from lightning_memdml.picture_style import FAINT, STYLES, LineStyle, as_label, new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


SIDE_STYLES = {"positive": STYLES[0], "negative": STYLES[1]._replace(line="-")}
LOSS_STYLES = STYLES[:6]
TITLE_WIDTH = 88  # characters that fit
LETTERS = {"positive": "P", "negative": "N"}
SIGNS = {"positive": "+", "negative": "-"}


def plot_readings(readings: Sequence[Reading]) -> Figure:
    """Draw the weights of one loss, or of several in one picture, against the similarity.

    A line is an exact curve. Where the weight also depends on other pairs, dots are measured pairs, and the marked line
    is their mean in each hundredth of the axis. The lowest panel has the number of measured pairs, of the first loss
    that has any.

    Args:
        readings: At least one.

    Raises:
        ValueError: If there are none, or more than six.
    """
    if not 1 <= len(readings) <= len(LOSS_STYLES):
        raise ValueError(
            f"Expected 1 to {len(LOSS_STYLES)} losses in one picture but got {len(readings)}. Draw several pictures."
        )
    measured = next((reading for reading in readings if reading.anchors), None)
    heights = [2, 2, 1.4] if measured else [2, 2]
    figure = new_figure(7, 0.8 + 0.25 * len(readings) + 1.3 * sum(heights))
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for side, axes in zip(SIDES, panels, strict=False):
        _draw_side(axes, readings, side)
    if measured:
        _draw_histogram(
            panels[2], measured, {side: SIDE_STYLES[side].color if len(readings) == 1 else FAINT for side in SIDES}
        )
    for number, axes in enumerate(panels):
        plain_axes(axes, grid=number < 2)
    panels[-1].set(xlabel="cosine similarity of the pair", xlim=(-1, 1))
    _write_title(figure, readings)
    return figure


def _draw_side(axes: Axes, readings: Sequence[Reading], side: Side) -> None:
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.set_ylabel(f"weight $w^{SIGNS[side]}$ of a {side}")
    styles = (SIDE_STYLES[side],) if len(readings) == 1 else LOSS_STYLES
    weights = [_draw_weights(axes, reading, side, style) for reading, style in zip(readings, styles, strict=False)]
    _cut_spike(axes, torch.cat(weights))
    if len(readings) == 1 or set(axes.get_legend_handles_labels()[1]) != {"exact"}:
        axes.legend(loc="best", frameon=False, fontsize="small")


def _draw_weights(axes: Axes, reading: Reading, side: Side, style: LineStyle) -> Tensor:
    """Draw one side of one loss, and return the drawn weights."""
    curve, measured = reading.side(side)
    line: dict[str, Any] = {"color": style.color, "linestyle": style.line, "linewidth": 1.6}
    if curve is not None:
        label = f"exact, drawn times $|{LETTERS[side]}|$" if curve.divided else "exact"
        axes.plot(curve.similarity, curve.weight, label=label, **line)
        return curve.weight
    if measured is None:
        axes.plot([], [], label="depends on other pairs: none measured", **line)
        return torch.zeros(1)
    dots: dict[str, Any] = {"s": 7, "alpha": 0.3, "color": style.color, "marker": style.mark, "linewidths": 0}
    axes.scatter(measured.similarity, measured.weight, **dots)
    mean = measured.mass / measured.pairs  # NaN in a bin without pairs, which interrupts the line
    axes.plot(
        EDGES[:-1] + 1 / BINS, mean, marker=style.mark, markersize=3, label="measured pairs, and their mean", **line
    )
    return measured.weight if len(measured.weight) else torch.zeros(1)


def _cut_spike(axes: Axes, weights: Tensor) -> None:
    """Cut off a spike that would flatten the rest, such as 1/distance near distance 0, and write its height."""
    highest, usual = float(weights.max()), float(weights.quantile(0.995))
    if usual > 0 and highest > 10 * usual:
        axes.set_ylim(-0.1 * usual, 1.5 * usual)
        axes.annotate(f"up to {highest:,.4g}", (0.97, 0.96), xycoords="axes fraction", ha="right", va="top")


def _draw_histogram(axes: Axes, reading: Reading, colors: dict[Side, str]) -> None:
    looks: dict[Side, tuple[float, str | None]] = {"negative": (0.3, None), "positive": (0.0, "////")}
    for side, (shade, hatch) in looks.items():
        measured, color = reading.side(side).measured, colors[side]
        if measured is None:
            continue
        pairs = measured.pairs
        label = f"{int(pairs.sum()):,} {side}s"
        look: dict[str, Any] = {"facecolor": (color, shade), "edgecolor": color, "hatch": hatch, "linewidth": 1}
        axes.stairs(pairs, EDGES, fill=True, label=label, **look)
    axes.set_yscale("symlog", linthresh=1, linscale=0.3)  # log, and 0 has a place
    axes.set(ylabel="pairs (log)", ylim=(0, None))
    against = "each other" if reading.in_batch else f"{reading.references:,} references"
    title = f"{reading.anchors:,} anchors\nagainst {against}"
    axes.legend(loc="best", frameon=False, fontsize="small", title=title, title_fontsize="small", alignment="left")


def _write_title(figure: Figure, readings: Sequence[Reading]) -> None:
    from matplotlib.lines import Line2D

    names = [textwrap.fill(as_label(reading.loss), TITLE_WIDTH, subsequent_indent="   ") for reading in readings]
    if len(names) == 1:
        figure.suptitle(names[0], fontsize="small", x=0.02, ha="left")
        return
    lines = [
        Line2D([], [], color=style.color, linestyle=style.line, label=name)
        for name, style in zip(names, LOSS_STYLES, strict=False)
    ]
    figure.legend(handles=lines, loc="outside upper left", frameon=False, handlelength=3, fontsize="small")
