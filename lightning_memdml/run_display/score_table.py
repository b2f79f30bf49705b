"""Retrieval scores as a person reads them: percent with one decimal, under the names that papers use."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

LINE = ("map_at_r",)  # shown after the first recall in a line
COUNTS = ("queries", "excluded")


def score_name(name: str) -> str:
    """Return the name of a score as papers write it.

    Args:
        name: Such as `recall_at_1`, or `small/recall_at_1` of a gallery named `small`.

    Example:
        >>> [score_name(name) for name in ("recall_at_10", "map_at_r", "small/r_precision")]
        ['Recall@10', 'MAP@R', 'R-precision (small)']
    """
    gallery, _, score = name.rpartition("/")
    written = {"map_at_r": "MAP@R", "r_precision": "R-precision", "mean_average_precision": "mAP"}.get(score, score)
    written = re.sub(r"^recall_at_(\d+)$", r"Recall@\1", written)
    return f"{written} ({gallery})" if gallery else written


def percent(value: float) -> str:
    """Return a score in [0, 1] as percent with one decimal; a dash where there is none.

    Example:
        >>> percent(0.45789), percent(float("nan"))
        ('45.8', '-')
    """
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def scores_of(metrics: Mapping[str, float], stage: str, gallery_size: int | None = None) -> dict[str, float]:
    """Return the scores of one stage among the logged metrics, without those that cannot be below 100 %.

    Args:
        metrics: Logged names -> values, such as `val/recall_at_1`.
        stage: `val` or `test`.
        gallery_size: Number of images in the gallery: a recall among as many neighbours is always 1.

    Example:
        >>> scores_of({"val/recall_at_1": 0.5, "val/recall_at_1000": 1.0, "train/loss": 2.0}, "val", gallery_size=216)
        {'recall_at_1': 0.5}
    """
    found = {name.partition("/")[2]: float(value) for name, value in metrics.items() if name.startswith(f"{stage}/")}
    levels = {name: re.search(r"recall_at_(\d+)$", name) for name in found}
    return {
        name: value
        for name, value in found.items()
        if gallery_size is None or (level := levels[name]) is None or int(level[1]) < gallery_size
    }


def in_order(scores: Mapping[str, float]) -> list[str]:
    """Return the names of scores, recalls first by their level, without the counts.

    Example:
        >>> in_order({"map_at_r": 0.1, "recall_at_10": 0.5, "queries": 8, "recall_at_1": 0.2})
        ['recall_at_1', 'recall_at_10', 'map_at_r']
    """

    def place(name: str) -> tuple[bool, int]:
        level = re.search(r"recall_at_(\d+)$", name)
        return level is None, 0 if level is None else int(level[1])

    return sorted((name for name in scores if name.rpartition("/")[2] not in COUNTS), key=place)


def score_line(scores: Mapping[str, float]) -> str:
    """Return the first recall and MAP@R in percent, in a line.

    Example:
        >>> score_line({"recall_at_1": 0.458, "recall_at_10": 0.8, "map_at_r": 0.0971})
        'Recall@1 45.8  MAP@R 9.7'
    """
    names = in_order(scores)
    shown = [*names[:1], *(name for name in names[1:] if name in LINE)]
    return "  ".join(f"{score_name(name)} {percent(scores[name])}" for name in shown)


def score_table(title: str, scores: Mapping[str, float]) -> str:
    """Return all scores in percent, one a line.

    Args:
        title: What was scored.
        scores: With `queries` and `excluded`, how many were scored and how many have no match.

    Example:
        >>> print(score_table("Test classes", {"recall_at_1": 0.458, "map_at_r": 0.0971, "queries": 5052.0}))
        Test classes, 5,052 queries
          Recall@1    45.8 %
          MAP@R        9.7 %
    """
    queries, excluded = (int(scores.get(name, 0)) for name in COUNTS)
    left_out = f", {excluded:,} more without a match left out" if excluded else ""
    lines = [f"{title}, {queries:,} {'query' if queries == 1 else 'queries'}{left_out}"]
    names = {name: score_name(name) for name in in_order(scores)}
    width = max(map(len, names.values()), default=0)
    lines += [f"  {shown:{width}}  {percent(scores[name]):>6} %" for name, shown in names.items()]
    return "\n".join(lines)
