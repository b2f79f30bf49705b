"""When it is remembered: Trainer hooks around the plain objects, for any LightningModule."""

from lightning_memdml.callbacks.gallery import GalleryLogger
from lightning_memdml.callbacks.memory import MemoryCallback, against_memory
from lightning_memdml.callbacks.memory_report import MemoryReport
from lightning_memdml.callbacks.weight_curves import WeightCurveLogger

__all__ = ["GalleryLogger", "MemoryCallback", "MemoryReport", "WeightCurveLogger", "against_memory"]
