"""Readings on disk: a picture, a table of curves and sampled pairs, and a histogram of all pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning_memdml.atomic_write import atomic_write
from lightning_memdml.csv_table import write_csv
from lightning_memdml.curves.plot import plot_readings
from lightning_memdml.curves.reading import EDGES, SIDES, Reading

WEIGHT_COLUMNS = ("loss", "side", "kind", "similarity", "weight")
HISTOGRAM_COLUMNS = ("loss", "side", "low", "high", "pairs", "weight")


def save_readings(readings: Sequence[Reading], folder: Path | str, name: str) -> list[Path]:
    """Write `name.png`, `name.csv` and, if pairs were measured, `name_histogram.csv`; return their paths.

    Args:
        readings: What `read_weights` returned, for one to six losses.
        folder: Where the files go; it is made if it does not exist.
        name: The beginning of their names.

    Raises:
        ValueError: If there are none, or more than six readings.
    """
    folder = Path(folder)
    paths = [folder / f"{name}.png", folder / f"{name}.csv"]
    with atomic_write(paths[0]) as temporary:
        plot_readings(readings).savefig(temporary, dpi=150)
    write_csv(paths[1], WEIGHT_COLUMNS, weight_rows(readings), ".7g")
    histogram = list(histogram_rows(readings))
    if histogram:
        paths.append(folder / f"{name}_histogram.csv")
        write_csv(paths[2], HISTOGRAM_COLUMNS, histogram, ".7g")
    return paths


def weight_rows(readings: Sequence[Reading]) -> Iterator[tuple[Any, ...]]:
    """Yield the curves and the sampled pairs as rows `(loss, side, kind, similarity, weight)`.

    `kind` is `measured` for the weight of a pair, `curve` for a weight as a function of the similarity, and
    `curve / |P|` or `curve / |N|` if a pair's weight is that of the row divided by the number of positives, or
    negatives, of its anchor.

    Args:
        readings: What `read_weights` returned.

    Example:
        >>> from lightning_memdml import ContrastiveLoss
        >>> from lightning_memdml.curves import read_weights
        >>> next(weight_rows([read_weights(ContrastiveLoss())]))
        ('ContrastiveLoss(margin=0.5)', 'positive', 'curve', -1.0, 1.0)
    """
    for reading in readings:
        for side in SIDES:
            curve, measured = reading.side(side)
            if curve is not None:
                kind = f"curve / |{side[0].upper()}|" if curve.divided else "curve"
                for similarity, weight in zip(curve.similarity.tolist(), curve.weight.tolist(), strict=True):
                    yield reading.loss, side, kind, similarity, weight
            if measured is not None:
                for similarity, weight in zip(measured.similarity.tolist(), measured.weight.tolist(), strict=True):
                    yield reading.loss, side, "measured", similarity, weight


def histogram_rows(readings: Sequence[Reading]) -> Iterator[tuple[Any, ...]]:
    """Yield all measured pairs as rows `(loss, side, low, high, pairs, weight)`.

    `pairs` is the number of pairs with `low <= similarity < high`, `weight` the sum of their weights.

    Args:
        readings: What `read_weights` returned for pairs; curves alone give no rows.
    """
    for reading in readings:
        for side in SIDES:
            measured = reading.side(side).measured
            if measured is not None:
                columns = (EDGES[:-1], EDGES[1:], measured.pairs, measured.mass)
                for row in zip(*(column.tolist() for column in columns), strict=True):
                    yield (reading.loss, side, *row)
