"""When it is remembered: Trainer hooks around the plain objects, for any LightningModule."""

from lightning_memdml.callbacks.memory import MemoryCallback, against_memory
from lightning_memdml.callbacks.weight_curves import WeightCurveLogger

__all__ = ["MemoryCallback", "WeightCurveLogger", "against_memory"]
