"""Charts as SVG inside a page: lines, and a map of points. The browser draws them, in any script of the world."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 440, 270  # of a chart, in units of its own; it scales with the page
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 40
DASHES = ("", "7 4", "2 4", "9 3 2 3")
# One shape per series or class, around (0, 0), so that colour is never the only difference.
MARKS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",  # circle
    "M0 5L-5-4H5Z",  # triangle down
    "M-4-4H4V4H-4Z",  # square
    "M0-6L5 0L0 6L-5 0Z",  # diamond
    "M0-5L5 4H-5Z",  # triangle up
    "M-2-5H2V-2H5V2H2V5H-2V2H-5V-2H-2Z",  # plus
    "M-5-3L-3-5L0-2L3-5L5-3L2 0L5 3L3 5L0 2L-3 5L-5 3L-2 0Z",  # cross
)


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
        name: As the legend shows it.
        x: Ascending.
        y: As many; a value that is not finite interrupts the line.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]


class Point(NamedTuple):
    """A point of a map.

    Attributes:
        x: Position.
        y: Position.
        group: Number of its style, from 0; -1 for a faint dot.
        lines: Shown while the pointer is on it.
    """

    x: float
    y: float
    group: int
    lines: tuple[str, str]


def line_chart(title: str, lines: Sequence[Line], x_label: str, *, percent: bool = False) -> str:
    """Return a chart of lines with their legend as HTML.

    Args:
        title: Heading; it is escaped here, as all names are.
        lines: Each with a colour, a dash and marks of its own.
        x_label: What the horizontal axis is.
        percent: Whether the values are shares, to be shown in percent.

    Example:
        >>> "<svg" in line_chart("Loss", [Line("batch", [0, 1], [2.0, 1.0])], "step")
        True
    """
    factor = 100.0 if percent else 1.0
    lines = [line._replace(y=[factor * value for value in line.y]) for line in lines]
    points = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    if not points:
        return ""
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    ticks = nice_ticks(min(0.0, *(y for _, y in points)), max(y for _, y in points))
    low_y, high_y = ticks[0], ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / ((high_x - low_x) or 1)
        up = (y - low_y) / ((high_y - low_y) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks:
        y = at(low_x, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in nice_ticks(low_x, high_x):
        if low_x <= tick <= high_x:
            x, y = at(tick, low_y)
            parts.append(f'<text x="{x:.1f}" y="{y + 17:.1f}" text-anchor="middle">{_number(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    for number, line in enumerate(lines):
        parts.append(_drawn(line, number, at))
    legend = "".join(_legend_entry(line.name, number) for number, line in enumerate(lines))
    described = escape(f"{title}: {', '.join(line.name for line in lines)}")
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b>{" in percent" if percent else ""}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{described}">{"".join(parts)}</svg>'
        f'<div class="legend">{legend}</div></figure>'
    )


def _drawn(line: Line, number: int, at: object) -> str:
    place = at
    parts, pen = [], "M"
    marks = []
    every = max(1, len(line.x) // 8)
    for index, (x, y) in enumerate(zip(line.x, line.y, strict=True)):
        if not math.isfinite(y):
            pen = "M"
            continue
        left, top = place(x, y)  # type: ignore[operator]
        parts.append(f"{pen}{left:.1f} {top:.1f}")
        pen = "L"
        if index % every == 0 or index == len(line.x) - 1:
            tip = f"<title>{escape(line.name)}: {_number(y)} at {_number(x)}</title>"
            marks.append(
                f'<path class="mark" transform="translate({left:.1f} {top:.1f})" d="{_mark(number)}">{tip}</path>'
            )
    dash = f' stroke-dasharray="{DASHES[number % len(DASHES)]}"' if number % len(DASHES) else ""
    return f'<g class="s{number % len(MARKS)}"><path class="line"{dash} d="{"".join(parts)}"/>{"".join(marks)}</g>'


def _mark(number: int) -> str:
    return MARKS[number % len(MARKS)]


def _legend_entry(name: str, number: int) -> str:
    dash = f' stroke-dasharray="{DASHES[number % len(DASHES)]}"' if number % len(DASHES) else ""
    return (
        f'<span class="s{number % len(MARKS)}"><svg viewBox="0 0 34 14"><path class="line"{dash} d="M0 7H34"/>'
        f'<path class="mark" transform="translate(17 7)" d="{_mark(number)}"/></svg><bdi>{escape(name)}</bdi></span>'
    )


def scatter(points: Sequence[Point], groups: Sequence[str]) -> str:
    """Return a map of points with its legend as HTML; a point shows its lines while the pointer is on it.

    Args:
        points: In any unit.
        groups: Names of the groups with a style of their own.

    Example:
        >>> "circle" in scatter([Point(0, 0, -1, ("a", "1.png"))], [])
        True
    """
    width, height, edge = 560, 440, 14
    scale = min(1.8, max(1.0, (600 / len(points)) ** 0.5))  # of the marks
    low_x, high_x = min(point.x for point in points), max(point.x for point in points)
    low_y, high_y = min(point.y for point in points), max(point.y for point in points)
    drawn = []
    for point in sorted(points, key=lambda point: point.group):  # those with a style above the faint ones
        x = edge + (point.x - low_x) / ((high_x - low_x) or 1) * (width - 2 * edge)
        y = 58 + (high_y - point.y) / ((high_y - low_y) or 1) * (height - 58 - edge)
        first, second = (escape(shortened(line, 64)) for line in point.lines)
        shape = '<circle r="3"/>' if point.group < 0 else f'<path d="{_group_mark(point.group)}"/>'
        drawn.append(
            f'<g class="pt {_group_style(point.group)}" tabindex="-1">'
            f'<g transform="translate({x:.1f} {y:.1f}) scale({scale:.2f})"><circle class="reach" r="9"/>{shape}</g>'
            f'<text class="tip" x="8" y="18">{first}</text><text class="tip" x="8" y="37">{second}</text></g>'
        )
    legend = "".join(
        f'<span class="{_group_style(number)}"><svg viewBox="0 0 14 14"><path transform="translate(7 7)" '
        f'd="{_group_mark(number)}"/></svg><bdi>{escape(name)}</bdi></span>'
        for number, name in enumerate(groups)
    )
    if any(point.group < 0 for point in points):
        legend += '<span class="faint"><svg viewBox="0 0 14 14"><circle cx="7" cy="7" r="3"/></svg>other classes</span>'
    return (
        f'<figure class="map"><svg viewBox="0 0 {width} {height}" role="img" aria-label="map of the embeddings">'
        f'{"".join(drawn)}</svg><div class="legend">{legend}</div></figure>'
    )


def _group_style(number: int) -> str:
    """Return the classes of a group: after the seventh the shapes are hollow, so that none looks like another."""
    return "faint" if number < 0 else f"s{number % 7}{' hollow' if number >= 7 else ''}"


def _group_mark(number: int) -> str:
    return MARKS[number % len(MARKS)]


def shortened(text: str, width: int) -> str:
    """Return text of at most `width` columns, wide letters being two; a longer one loses its middle.

    Example:
        >>> shortened("abcdefghij", 7), shortened("漢字漢字", 5)
        ('abc…hij', '漢…字')
    """
    sizes = [2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text]
    if sum(sizes) <= width:
        return text
    head, tail, side = 0, len(text), (width - 1) // 2
    while sum(sizes[: head + 1]) <= side:
        head += 1
    while sum(sizes[tail - 1 :]) <= side:
        tail -= 1
    return f"{text[:head]}…{text[tail:]}"


def nice_ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers that enclose a range.

    Example:
        >>> nice_ticks(0, 47)
        [0, 10, 20, 30, 40, 50]
    """
    if high <= low:
        high = low + 1
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) if step < 1 else int(number * step) for number in range(first, last + 1)]


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.3g}"
