"""When it is remembered: Trainer hooks around the plain objects, for any LightningModule."""

from lightning_memdml.callbacks.memory import MemoryCallback, against_memory

__all__ = ["MemoryCallback", "against_memory"]
