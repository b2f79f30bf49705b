"""Readings on disk: a picture, the curves and sampled pairs, the histogram."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_memdml.curves.plot import plot_readings
from lightning_memdml.curves.reading import EDGES, SIDES, Reading

if TYPE_CHECKING:
    import pandas as pd


def save_readings(readings: Sequence[Reading], folder: Path | str, name: str) -> list[Path]:
    """Write ``name.png``, ``name.csv`` and, if pairs were measured, ``name_histogram.csv``; return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.csv"]
    plot_readings(readings).savefig(paths[0], dpi=150)
    weights_table(readings).to_csv(paths[1], index=False, float_format="%.7g")
    histogram = histogram_table(readings)
    if len(histogram):
        paths.append(folder / f"{name}_histogram.csv")
        histogram.to_csv(paths[2], index=False, float_format="%.7g")
    return paths


def weights_table(readings: Sequence[Reading]) -> pd.DataFrame:
    """Return the curves and the sampled pairs as rows ``loss, side, kind, similarity, weight``.

    ``kind`` is ``curve``, ``curve / |P|`` or ``curve / |N|`` (a pair's weight is that of the row divided by the number
    of positives, or negatives, of its anchor), or ``measured``, a pair's weight.
    """
    parts: list[dict[str, Any]] = []
    for reading in readings:
        for side in SIDES:
            curve, measured = reading.side(side)
            head = {"loss": reading.loss, "side": side}
            if curve is not None:
                kind = f"curve / |{side[0].upper()}|" if curve.divided else "curve"
                parts.append({**head, "kind": kind, "similarity": curve.similarity, "weight": curve.weight})
            if measured is not None:
                pairs = {"similarity": measured.similarity, "weight": measured.weight}
                parts.append({**head, "kind": "measured", **pairs})
    return _table("loss side kind similarity weight", parts)


def histogram_table(readings: Sequence[Reading]) -> pd.DataFrame:
    """Return all measured pairs as rows ``loss, side, low, high, pairs, weight``.

    ``pairs`` is the number of pairs with ``low <= similarity < high``, ``weight`` the sum of their weights.
    """
    parts: list[dict[str, Any]] = []
    for reading in readings:
        for side in SIDES:
            measured = reading.side(side).measured
            if measured is not None:
                bins = {"low": EDGES[:-1], "high": EDGES[1:], "pairs": measured.pairs, "weight": measured.mass}
                parts.append({"loss": reading.loss, "side": side, **bins})
    return _table("loss side low high pairs weight", parts)


def _table(columns: str, parts: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    frames = [pd.DataFrame(part) for part in parts if len(part["weight"])]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns.split())
