"""Memory-based deep metric learning on PyTorch Lightning."""

from lightning_memdml.backbones import SmallConvNet
from lightning_memdml.callbacks import MemoryCallback, WeightCurveLogger, against_memory
from lightning_memdml.data import FolderDataModule, GlyphDataModule, RetrievalDataModule, TableDataModule
from lightning_memdml.learner import MetricLearner
from lightning_memdml.losses import *  # noqa: F403
from lightning_memdml.losses import __all__ as _losses
from lightning_memdml.memory import EmbeddingMemory
from lightning_memdml.retrieval import RetrievalMetrics

__version__ = "0.1.0"
__all__ = [
    "EmbeddingMemory",
    "FolderDataModule",
    "GlyphDataModule",
    "MemoryCallback",
    "MetricLearner",
    "RetrievalDataModule",
    "RetrievalMetrics",
    "SmallConvNet",
    "TableDataModule",
    "WeightCurveLogger",
    "against_memory",
    *_losses,
]
