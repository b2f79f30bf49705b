"""What a loss does to each pair: its weights, exact where they are curves, measured where they are not."""

from lightning_memdml.curves.files import histogram_table, save_readings, weights_table
from lightning_memdml.curves.plot import plot_readings
from lightning_memdml.curves.reading import (
    Curve,
    Measured,
    Pairs,
    Reading,
    SideReading,
    describe,
    exact_curve,
    read_weights,
)

__all__ = [
    "Curve",
    "Measured",
    "Pairs",
    "Reading",
    "SideReading",
    "describe",
    "exact_curve",
    "histogram_table",
    "plot_readings",
    "read_weights",
    "save_readings",
    "weights_table",
]
