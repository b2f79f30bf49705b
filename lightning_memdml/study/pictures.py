"""The pictures of a study: weight curves beside scores, claims, training, similarities, drift."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lightning_memdml.curves.plot import LETTERS, LOSS_STYLES, SIDE_STYLES
from lightning_memdml.curves.reading import SIDES
from lightning_memdml.picture_style import INK, STYLES, as_label, new_figure, plain_axes
from lightning_memdml.study.recording import BINS
from lightning_memdml.study.results import JudgedClaim, Record, Results
from lightning_memdml.study.statistics import Judgement
from lightning_memdml.study.tables import interval_in_words, largest_shown, score_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VERDICT_COLORS = {
    "supported": "#009E73",
    "contradicted": "#D55E00",
    "undecided": "#6b7486",
    "data sets differ": "#6b7486",
    "not able to tell": "#6b7486",
}
CENTERS = -1 + (2 * np.arange(BINS) + 1) / BINS


def break_name(name: str, width: int, lines: int = 3) -> str:
    r"""Break a name after its separators into lines of about `width` characters; a longer one ends in an ellipsis.

    Example:
        >>> print(break_name("contrastive_loss_with_momentum", 18))
        contrastive_loss_
        with_momentum
    """
    broken = [""]
    for part in re.findall(r"[^\s_.+=-]+[\s_.+=-]*|[\s_.+=-]+", name):
        if broken[-1] and len(broken[-1]) + len(part.rstrip()) > width:
            broken.append("")
        broken[-1] += part
    shown = [as_label(line.rstrip(), 2 * width) for line in broken[:lines]]
    return "\n".join(shown) + ("…" if len(broken) > lines else "")


def _bare(axes: Axes, *spines: str) -> None:
    plain_axes(axes, grid=False)
    for spine in spines:
        axes.spines[spine].set_visible(False)


# ----------------------------------------------------------------------------------------- weight curves beside scores
def plot_scores(results: Results, data: str, score: str) -> Figure:
    """Draw a row per arm: the weights of positives and negatives, and the score.

    The curves are those of the memory term, or of the batch for arms without a memory. A curve is exact where the
    weight depends on the similarity alone, and otherwise the mean over measured pairs. Each curve is scaled to its own
    maximum. The grey area shows the similarities of the pairs in the last batches. Dots are seeds; bars are intervals
    of their mean. A dashed line is the best score before any training.

    Args:
        results: The results of the study.
        data: The data set.
        score: The score.
    """
    arms = [arm for arm in results.study.arms if results.of(arm, data)]
    height = 0.62 * len(arms) + 1.0
    figure = new_figure(9, height)
    panels = figure.subplots(len(arms), 3, squeeze=False, width_ratios=[1.1, 1.1, 2.4], gridspec_kw={"wspace": 0.04})
    found = {arm: results.score(arm, data, score) for arm in arms}
    values = [value for one in found.values() if one for value in (*one.values, *_finite(one.over_seeds))]
    before = {name: row[score] for name, row in results.references(data).items() if score in row}
    reference = max(before, key=lambda name: before[name], default=None)
    values += [before[reference]] if reference is not None else []
    margin = 0.06 * (max(values) - min(values) or 1)
    span = (min(values) - margin, max(values) + margin)
    for row, arm in zip(panels, arms, strict=True):
        reading = _reading(results.of(arm, data))
        for axes, side in zip(row, SIDES, strict=False):
            _draw_thumbnail(axes, reading, side)
        name = break_name(arm, 26, lines=4)
        size = "x-small" if "\n" in name else "medium"
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=size, labelpad=10)
        _draw_score(row[2], found[arm], span, last=arm == arms[-1])
        if reference is not None:
            row[2].axvline(before[reference], color="0.35", linewidth=1, linestyle="--")
    for axes, side in zip(panels[0], SIDES, strict=False):
        axes.set_title(f"weight of {side}s", fontsize="small", color=SIDE_STYLES[side].color)
    dashed = "" if reference is None else f"; dashed: {reference}"
    panels[0][2].set_title(f"{score_name(score)}, percent{dashed}", fontsize="small")
    for axes in panels[-1][:2]:
        axes.set_xticks([-1, 0, 1])
        axes.set_xlabel("similarity", fontsize="small")
    return figure


def _finite(interval: Sequence[float]) -> list[float]:
    return [value for value in interval if math.isfinite(value)]


def _reading(records: Sequence[Record]) -> dict[str, Any] | None:
    """Return the reading of the memory loss, or else of the batch loss, with the measured pairs of all seeds pooled."""
    found = [record.get("weights") or {} for record in records]
    readings = [weights.get("memory", weights.get("batch", {})) for weights in found]
    if not all(readings):
        return None
    pooled = dict(readings[0])
    for side in SIDES:
        counted = [reading[side] for reading in readings if reading[side]["pairs"] is not None]
        sums = {name: np.sum([one[name] for one in counted], axis=0) for name in ("pairs", "mass")} if counted else {}
        pooled[side] = {**pooled[side], **sums}
    return pooled


def _draw_thumbnail(axes: Axes, reading: dict[str, Any] | None, side: str) -> None:
    axes.set(xlim=(-1, 1), ylim=(-0.06, 1.15), xticks=[], yticks=[])
    _bare(axes, "left")
    if reading is None:
        axes.text(0, 0.5, "not a pair loss", ha="center", va="center", fontsize="x-small", color="0.5")
        return
    packed, color = reading[side], SIDE_STYLES[side].color
    pairs = np.zeros(BINS) if packed["pairs"] is None else np.asarray(packed["pairs"], dtype=float)
    if pairs.any():
        axes.fill_between(CENTERS, pairs / pairs.max(), step="mid", color="0.88", linewidth=0)
    if packed["curve"] is not None:
        weight = np.asarray(packed["curve"])
        similarity = np.linspace(-1, 1, len(weight))
    else:
        seen = pairs > 0
        similarity, weight = CENTERS[seen], np.asarray(packed["mass"])[seen] / pairs[seen]
    if len(weight):
        axes.plot(similarity, weight / (weight.max() or 1), color=color, linewidth=1.6)
    if packed["divided"]:
        axes.text(
            0.98, 1.02, f"/ |{LETTERS[side]}|", transform=axes.transAxes, ha="right", va="top", fontsize="x-small"
        )


def _draw_score(axes: Axes, found: Any, span: tuple[float, float], last: bool) -> None:
    axes.set(xlim=span, ylim=(-1, 1), yticks=[])
    _bare(axes, "left")
    axes.grid(axis="x", color="0.92", linewidth=0.8)
    if not last:
        axes.tick_params(labelbottom=False, length=0)
        axes.spines["bottom"].set_visible(False)
    low, high = found.over_seeds
    if math.isfinite(low):
        axes.plot([low, high], [0, 0], color=INK, linewidth=5, alpha=0.25, solid_capstyle="butt")
    axes.plot(found.values, [0] * len(found.values), "o", color="#0072B2", markersize=4, alpha=0.55, markeredgewidth=0)
    axes.plot([found.estimate.mean], [0], "|", color=INK, markersize=16, markeredgewidth=2)
    axes.annotate(
        f"{found.estimate.mean:.1f}", (found.estimate.mean, 0), (0, 9), textcoords="offset points", ha="center",
        fontsize="small",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- claims
def plot_claims(judged: Sequence[JudgedClaim]) -> Figure | None:
    """Draw the deciding interval of every claim, on each data set and jointly; the region of the claim is shaded.

    Where the data sets have no joint difference, only the verdict stands in its place.

    Returns `None` if no claim has all its runs.
    """
    lines = [
        (one.claim, label, judgement, judgement.verdict if label and judgement else one.verdict)
        for one in judged
        if one.per_data
        for label, judgement in [("", one.joint), *(one.per_data.items() if len(one.per_data) > 1 else ())]
    ]
    if not lines:
        return None
    figure = new_figure(9.5, 0.5 * len(lines) + 0.9)
    panels = figure.subplots(len(lines), 1, squeeze=False, sharex=True)[:, 0]
    reach = 1.15 * largest_shown([one for _, _, one, _ in lines if one], [claim.by for claim, *_ in lines])
    for axes, (claim, label, judgement, verdict) in zip(panels, lines, strict=True):
        color = VERDICT_COLORS[verdict]
        region = {"more": (claim.by, reach), "not more": (-reach, claim.by), "same": (-claim.by, claim.by)}
        if judgement is not None:
            axes.axvspan(*region[claim.expects], color="#0072B2", alpha=0.08, linewidth=0)
            axes.axvline(0, color="0.75", linewidth=0.8)
            _draw_difference(axes, judgement, reach, color, is_part=bool(label))
        axes.set(xlim=(-reach, reach), ylim=(-1, 1), yticks=[])
        name = break_name(f"on {label}" if label else claim.name, 28)
        size = "x-small" if "\n" in name else "small" if label else "medium"
        axes.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=10, fontsize=size)
        place = "bottom" if judgement else "center"
        axes.text(1.01, 0.5, verdict, transform=axes.transAxes, color=color, va=place, weight="bold")
        _bare(axes, "left")
        if axes is not panels[-1]:
            axes.tick_params(labelbottom=False, length=0)
            axes.spines["bottom"].set_visible(False)
    panels[-1].set_xlabel("difference in points; shaded: the region of the claim")
    return figure


def _draw_difference(axes: Axes, judgement: Judgement, reach: float, color: str, is_part: bool) -> None:
    """Draw the difference with its interval, or an arrow where it lies beyond the axis, and write both beside it."""
    low, high = judgement.interval
    mean = judgement.estimate.mean
    if abs(mean) > reach:
        axes.annotate(
            "", (math.copysign(reach, mean), 0), (math.copysign(0.9 * reach, mean), 0),
            arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 2},
        )  # fmt: skip
    else:
        axes.plot([max(low, -reach), min(high, reach)], [0, 0], color=color, linewidth=3 if is_part else 5, alpha=0.4)
        axes.plot([mean], [0], "o", color=color, markersize=4 if is_part else 6)
    numbers = f"{mean:+.1f} {interval_in_words(judgement.interval, signed=True)}"
    axes.text(1.01, 0.45, numbers, transform=axes.transAxes, color=INK, va="top", fontsize="x-small")


# -------------------------------------------------------------------------------------------------------------- trend
def plot_trend(results: Results, data: str, score: str) -> Figure | None:
    """Draw how far the arms of the trend are above its first one, over the number in which they differ.

    Dots are seeds, the line joins the means, and bars are intervals of the mean. Numbers have equal distances.

    Returns `None` without a trend, or while runs are missing.
    """
    trend = results.study.trend
    if trend is None:
        return None
    first, *others = trend.arms.values()
    gains = [gain for arm in others if (gain := results.gain(arm, first, data, score)) is not None]
    if len(gains) < len(others):
        return None
    figure = new_figure(9, 3.6)
    axes = figure.subplots()
    axes.axhline(0, color="0.35", linewidth=1, linestyle="--")
    means = [0.0]
    for place, (values, found) in enumerate(gains, start=1):
        low, high = found.interval(results.study.confidence)
        if math.isfinite(low):
            axes.plot([place, place], [low, high], color=INK, linewidth=6, alpha=0.25, solid_capstyle="butt")
        axes.plot([place] * len(values), values, "o", color=STYLES[0].color, alpha=0.55, markeredgewidth=0)
        top = max([*values, *_finite([high])])
        axes.annotate(f"{found.mean:+.1f}", (place, top), (0, 7), textcoords="offset points", ha="center")
        means.append(found.mean)
    axes.plot(range(len(means)), means, color=INK, marker="_", markersize=16, markeredgewidth=2)
    axes.set_xticks(range(len(means)), [f"{number:g}" for number in trend.arms])
    axes.margins(y=0.15)
    axes.set(xlim=(-0.3, len(means) - 0.7), xlabel=as_label(trend.over, 100))
    axes.set_title(f"{score_name(score)}, points above {as_label(first, 40)}", fontsize="medium", loc="left")
    plain_axes(axes)
    return figure


# ------------------------------------------------------------------------------------------------------------ training
class _Panel(NamedTuple):
    """A quantity over the steps: its list in a record, its name there, and a factor."""

    title: str
    rows: str
    name: str
    factor: float = 1.0

    def series(self, record: Record) -> list[tuple[float, float]]:
        rows = (row for row in record.get(self.rows, []) if row.get(self.name) is not None)
        return [(row["step"], self.factor * row[self.name]) for row in rows]


def plot_training(results: Results, data: str, score: str) -> Figure | None:
    """Draw loss and validation score over the steps, averaged over seeds; `None` without curves.

    Runs that validated only once have no curve of the score: all their points would lie at one step.
    """
    return _plot_series(results, data, (_Panel("training loss", "training", "loss"), _validation(score)))


def has_validation_curve(results: Results, data: str, score: str) -> bool:
    """Return whether `plot_training` draws the validation score: an arm was validated more than once."""
    return bool(_curves(results, data, _validation(score)))


def _validation(score: str) -> _Panel:
    return _Panel(f"{score_name(score)} of validation classes, percent", "validation", score, 100)


def plot_drift(results: Results, data: str) -> Figure | None:
    """Draw the drift of the memory over the steps if `MemoryReport` measured it, else `None`."""
    drift = _Panel("drift of the oldest quarter of the memory, 1 - cosine", "memory", "drift_old")
    return _plot_series(results, data, (drift, _Panel("weighted negatives per anchor", "memory", "negatives")))


def _curves(results: Results, data: str, panel: _Panel) -> dict[str, list[tuple[float, float]]]:
    """Return the mean over seeds of each arm with records; empty if no run has two points, which make a curve."""
    runs = {arm: [panel.series(record) for record in results.of(arm, data)] for arm in results.study.arms}
    if not any(len(points) > 1 for series in runs.values() for points in series):
        return {}
    return {arm: mean for arm, series in runs.items() if (mean := _mean_series(series))}


def _plot_series(results: Results, data: str, panels: Sequence[_Panel]) -> Figure | None:
    lines = {panel.title: curves for panel in panels if (curves := _curves(results, data, panel))}
    if not lines:
        return None
    arms = list(results.study.arms)
    names = {arm: break_name(arm, 42) for arm in arms}
    longest = max(len(line) for name in names.values() for line in name.split("\n"))
    legend_columns = max(1, min(4, 110 // (longest + 8)))  # as many as fit side by side
    legend_lines = math.ceil(len(arms) / legend_columns) * max(name.count("\n") + 1 for name in names.values())
    figure = new_figure(9, 2.9 + 0.22 * legend_lines)
    drawn = figure.subplots(1, len(lines), squeeze=False)[0]
    for axes, (title, series) in zip(drawn, lines.items(), strict=True):
        for arm, points in series.items():
            place = arms.index(arm)
            style = LOSS_STYLES[place % len(LOSS_STYLES)]
            # With more arms than styles, the second round is thinner, so that all lines differ.
            width = (2.0, 1.0, 0.6)[min(2, place // len(LOSS_STYLES))]
            marker = style.mark if len(points) == 1 else None  # a line of a single point is invisible
            axes.plot(
                *zip(*points, strict=True),
                color=style.color,
                linestyle=style.line,
                linewidth=width,
                label=names[arm],
                marker=marker,
            )
        values = [abs(value) for points in series.values() for _, value in points]
        if max(values) > 20 * max(1.0, float(np.median(values))):
            axes.set_yscale("symlog", linthresh=1)  # one arm with another kind of loss would flatten all others
        axes.set_title(title, fontsize="small")
        axes.set_xlabel("optimiser step")
        axes.grid(color="0.92", linewidth=0.8)
        _bare(axes)
    handles = {label: handle for axes in drawn for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=legend_columns,
        frameon=False,
        fontsize="small",
        handlelength=3,
    )
    return figure


def _mean_series(runs: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    by_step: dict[float, list[float]] = {}
    for run in runs:
        for step, value in run:
            by_step.setdefault(step, []).append(value)
    return [(step, sum(values) / len(values)) for step, values in sorted(by_step.items())]


def plot_similarities(results: Results, data: str) -> Figure | None:
    """Draw the similarities of test images to their own class and to others for each arm; `None` without records."""
    arms = [
        arm for arm in results.study.arms if any(record.get("similarity") for record in results.of(arm, data))
    ]  # fmt: skip
    if not arms:
        return None
    columns = min(4, len(arms))
    rows = math.ceil(len(arms) / columns)
    figure = new_figure(9, 1.5 * rows + 0.5)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for place, axes in enumerate(panels.flat):
        axes.set_visible(place < len(arms))
        axes.tick_params(labelbottom=place + columns >= len(arms))  # the lowest of each column
    for axes, arm in zip(panels.flat, arms, strict=False):
        for side, alpha in (("negative", 0.3), ("positive", 0.3)):
            counts = np.sum([record["similarity"][side] for record in results.of(arm, data)], axis=0)
            density = counts / max(1, counts.sum())
            color = SIDE_STYLES[side].color
            axes.fill_between(CENTERS, density, step="mid", color=color, alpha=alpha, linewidth=0)
            axes.step(
                CENTERS, density, where="mid", color=color, linewidth=1, linestyle=("-", "--")[side == "negative"]
            )
        axes.set_title(break_name(arm, 26), fontsize="x-small" if len(arm) > 26 else "small")
        axes.set(xlim=(-1, 1), ylim=(0, None), yticks=[])
        _bare(axes, "left")
    figure.supxlabel("similarity of test images: same class (solid), other classes (dashed)", fontsize="small")
    return figure
