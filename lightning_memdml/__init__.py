"""Memory-based deep metric learning on PyTorch Lightning."""

from lightning_memdml.backbones import SmallConvNet
from lightning_memdml.callbacks import GalleryLogger, MemoryCallback, MemoryReport, WeightCurveLogger, against_memory
from lightning_memdml.data import (
    CUB200,
    Cars196,
    DeepFashion2,
    FeatureDataModule,
    FolderDataModule,
    GlyphDataModule,
    INaturalist2018,
    InShop,
    Omniglot,
    RetrievalDataModule,
    StanfordOnlineProducts,
    TableDataModule,
    VehicleID,
)
from lightning_memdml.learner import LinearRamp, MetricLearner
from lightning_memdml.losses import *  # noqa: F403
from lightning_memdml.losses import __all__ as _losses
from lightning_memdml.memory import EmbeddingMemory, InstanceMemory, MomentumEncoder, ShardedMemory
from lightning_memdml.retrieval import RetrievalMetrics

__version__ = "0.1.0"
__all__ = [
    "CUB200",
    "Cars196",
    "DeepFashion2",
    "EmbeddingMemory",
    "FeatureDataModule",
    "FolderDataModule",
    "GalleryLogger",
    "GlyphDataModule",
    "InstanceMemory",
    "INaturalist2018",
    "InShop",
    "LinearRamp",
    "MemoryCallback",
    "MemoryReport",
    "MetricLearner",
    "MomentumEncoder",
    "Omniglot",
    "RetrievalDataModule",
    "RetrievalMetrics",
    "SmallConvNet",
    "ShardedMemory",
    "StanfordOnlineProducts",
    "TableDataModule",
    "VehicleID",
    "WeightCurveLogger",
    "against_memory",
    *_losses,
]
