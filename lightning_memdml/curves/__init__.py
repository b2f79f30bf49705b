"""The weights that a loss gives to pairs: exact curves of the similarity, or measured on pairs."""

from lightning_memdml.curves.files import histogram_rows, save_readings, weight_rows
from lightning_memdml.curves.plot import plot_readings
from lightning_memdml.curves.reading import (
    Curve,
    LossInputs,
    MeasuredWeights,
    Reading,
    SideReading,
    exact_curve,
    format_loss,
    read_weights,
)

__all__ = [
    "Curve",
    "LossInputs",
    "MeasuredWeights",
    "Reading",
    "SideReading",
    "exact_curve",
    "format_loss",
    "histogram_rows",
    "plot_readings",
    "read_weights",
    "save_readings",
    "weight_rows",
]
