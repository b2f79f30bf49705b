"""Callbacks that keep a memory, report on it and draw what is retrieved, for any LightningModule."""

from lightning_memdml.callbacks.channels_last import ChannelsLast as ChannelsLast
from lightning_memdml.callbacks.freezing import FreezeBackbone as FreezeBackbone
from lightning_memdml.callbacks.gallery_logger import GalleryLogger as GalleryLogger
from lightning_memdml.callbacks.memory import MemoryCallback as MemoryCallback
from lightning_memdml.callbacks.memory_choice import MemoryChoice as MemoryChoice
from lightning_memdml.callbacks.memory_report import MemoryReport as MemoryReport
from lightning_memdml.callbacks.shuffle_labels import ShuffleLabels as ShuffleLabels
from lightning_memdml.callbacks.training_length import TrainingLength as TrainingLength
from lightning_memdml.callbacks.weight_curves import WeightCurveLogger as WeightCurveLogger
from lightning_memdml.memory_term import against_memory as against_memory

__all__: list[str]
