"""Tables and training curves of `fine_tuning.py`.

Command: python experiments/photos/report.py runs/photos/runs.jsonl --picture runs/photos/curves.png
Cost: seconds. Intervals are of Student's t over the seeds; differences are paired by seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightning_memdml.picture_style import STYLES, new_figure, plain_axes
from lightning_memdml.study.statistics import estimate

Row = dict[str, Any]
SCORES = {"recall_at_1": "Recall@1", "map_at_r": "MAP@R"}
ARMS = {
    "frozen": "frozen features",
    "whitened": "frozen features, whitened",
    "batch": "batch, contrastive",
    "multi_similarity": "batch, Multi-Similarity",
    "memory": "memory",
    "memory_momentum": "memory and momentum encoder",
    "photos": "`photos`",
    "photos_without_memory": "`photos` without its memory",
}
DIFFERENCES = (
    ("memory", "frozen"),
    ("memory", "whitened"),
    ("memory", "batch"),
    ("memory", "multi_similarity"),
    ("memory_momentum", "memory"),
    ("photos", "frozen"),
    ("photos", "whitened"),
    ("photos", "photos_without_memory"),
)


def values(rows: Iterable[Row], arm: str, score: str) -> dict[int, float]:
    """Return the score of every seed of an arm, in percent."""
    return {row["seed"]: 100 * row["scores"][score] for row in rows if row["arm"] == arm}


def with_interval(numbers: list[float], sign: bool = False) -> str:
    """Return a mean and its 95 % interval in words."""
    found = estimate([numbers])
    shown = f"{found.mean:+.1f}" if sign else f"{found.mean:.1f}"
    if len(numbers) < 2:
        return shown
    low, high = found.interval()
    return f"{shown} ({low:+.1f} to {high:+.1f})" if sign else f"{shown} ({low:.1f} to {high:.1f})"


def scores_table(rows: list[Row]) -> list[str]:
    """Return a row for every arm that has runs."""
    lines = ["| arm | seeds | Recall@1 % | MAP@R % |", "|---|---|---|---|"]
    for arm, name in ARMS.items():
        found = [list(values(rows, arm, score).values()) for score in SCORES]
        if found[0]:
            seeds = "closed form" if arm in ("frozen", "whitened") else len(found[0])
            lines.append(f"| {name} | {seeds} | {' | '.join(map(with_interval, found))} |")
    return lines


def differences_table(rows: list[Row]) -> list[str]:
    """Return the differences that the verdicts are about, paired by seed; features have the same score in each."""
    lines = ["| difference | Recall@1, points | MAP@R, points |", "|---|---|---|"]
    there = {row["arm"] for row in rows}
    for one, other in DIFFERENCES:
        if not {one, other} <= there:
            continue
        cells = []
        for score in SCORES:
            more, less = values(rows, one, score), values(rows, other, score)
            if other in ("frozen", "whitened"):
                less = dict.fromkeys(more, *less.values())
            cells.append(with_interval([more[seed] - less[seed] for seed in more if seed in less], sign=True))
        lines.append(f"| {ARMS[one]} - {ARMS[other]} | {' | '.join(cells)} |")
    return lines


def tries_table(rows: list[Row]) -> list[str]:
    """Return what was tried, the best try of an arm in bold."""
    lines = ["| arm | settings | Recall@1 % | MAP@R % |", "|---|---|---|---|"]
    for arm, name in ARMS.items():
        tried = [row for row in rows if row["arm"] == arm]
        best = max((row["scores"]["map_at_r"] for row in tried), default=0)
        for row in tried:
            settings = ", ".join(f"{key} {value}" for key, value in row["settings"].items())
            cells = [f"{100 * row['scores'][score]:.1f}" for score in SCORES]
            chosen = row["scores"]["map_at_r"] == best and row["settings"]
            lines.append(f"| {name} | {settings} | {cells[0]} | {f'**{cells[1]}**' if chosen else cells[1]} |")
    return lines


def draw(rows: list[Row], names: list[str], picture: Path) -> None:
    """Draw MAP@R of the test classes over the steps, mean and smallest to largest of the seeds."""
    figure = new_figure(4.2 * len(names), 3.4)
    drawn = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(drawn, names, strict=True):
        own = [row for row in rows if row["data"] == name]
        start = next(100 * row["scores"]["map_at_r"] for row in own if row["arm"] == "whitened")
        frozen = next(100 * row["scores"]["map_at_r"] for row in own if row["arm"] == "frozen")
        axes.axhline(frozen, color="0.45", linewidth=1, linestyle=(0, (1, 1)), label=ARMS["frozen"])
        for arm, style in zip(list(ARMS)[2:], STYLES, strict=False):
            runs = [row["curve"] for row in own if row["arm"] == arm]
            if not runs:
                continue
            steps = sorted(map(int, runs[0]))
            seeds = [[start, *(100 * run[str(step)]["map_at_r"] for step in steps)] for run in runs]
            by_step = list(zip(*seeds, strict=True))
            mean = [sum(column) / len(column) for column in by_step]
            axes.plot(
                [0, *steps],
                mean,
                label=ARMS[arm].replace("`", ""),
                color=style.color,
                linestyle=style.line,
                marker=style.mark,
            )
            axes.fill_between(
                [0, *steps], list(map(min, by_step)), list(map(max, by_step)), color=style.color, alpha=0.12
            )
        axes.set_title(name, fontsize="medium", loc="left")
        axes.set_xlabel("optimiser step")
        plain_axes(axes)
    drawn[0].set_ylabel("MAP@R of unseen classes, %")
    drawn[-1].legend(frameon=False, fontsize="small", loc="lower right")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)


def main() -> None:
    """Print the tables, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="The file that fine_tuning.py wrote.")
    parser.add_argument("--picture", type=Path, default=Path("runs/photos/curves.png"))
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.runs.read_text().splitlines()]
    names = list(dict.fromkeys(row["data"] for row in rows))
    tables: dict[str, tuple[str, Callable[[list[Row]], list[str]]]] = {
        "Test classes": ("test", scores_table),
        "Differences on test classes": ("test", differences_table),
        "Tries on validation classes": ("search", tries_table),
    }
    for name in names:
        for title, (stage, table) in tables.items():
            own = [row for row in rows if row["data"] == name and row["stage"] == stage]
            print(f"\n{title}, {name}\n", *table(own), sep="\n")
    draw([row for row in rows if row["stage"] == "test"], names, options.picture)
    print(f"\n{options.picture}")


if __name__ == "__main__":
    main()
