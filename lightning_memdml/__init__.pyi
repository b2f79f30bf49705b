"""Memory-based deep metric learning on PyTorch Lightning."""

from lightning_memdml.backbones import SmallConvNet as SmallConvNet
from lightning_memdml.callbacks import ChannelsLast as ChannelsLast
from lightning_memdml.callbacks import GalleryLogger as GalleryLogger
from lightning_memdml.callbacks import MemoryCallback as MemoryCallback
from lightning_memdml.callbacks import MemoryChoice as MemoryChoice
from lightning_memdml.callbacks import MemoryReport as MemoryReport
from lightning_memdml.callbacks import TrainingLength as TrainingLength
from lightning_memdml.callbacks import WeightCurveLogger as WeightCurveLogger
from lightning_memdml.callbacks import against_memory as against_memory
from lightning_memdml.data import CUB200 as CUB200
from lightning_memdml.data import Cars196 as Cars196
from lightning_memdml.data import CJKDataModule as CJKDataModule
from lightning_memdml.data import DeepFashion2 as DeepFashion2
from lightning_memdml.data import FeatureDataModule as FeatureDataModule
from lightning_memdml.data import FolderDataModule as FolderDataModule
from lightning_memdml.data import GlyphDataModule as GlyphDataModule
from lightning_memdml.data import INaturalist2018 as INaturalist2018
from lightning_memdml.data import InShop as InShop
from lightning_memdml.data import Omniglot as Omniglot
from lightning_memdml.data import RetrievalDataModule as RetrievalDataModule
from lightning_memdml.data import StanfordOnlineProducts as StanfordOnlineProducts
from lightning_memdml.data import TableDataModule as TableDataModule
from lightning_memdml.data import VehicleID as VehicleID
from lightning_memdml.learner import MetricLearner as MetricLearner
from lightning_memdml.losses import Band as Band
from lightning_memdml.losses import BinomialDevianceLoss as BinomialDevianceLoss
from lightning_memdml.losses import CircleLoss as CircleLoss
from lightning_memdml.losses import Constant as Constant
from lightning_memdml.losses import ContrastiveLoss as ContrastiveLoss
from lightning_memdml.losses import DirectWeightLoss as DirectWeightLoss
from lightning_memdml.losses import Exponential as Exponential
from lightning_memdml.losses import HybridLoss as HybridLoss
from lightning_memdml.losses import InfoNCELoss as InfoNCELoss
from lightning_memdml.losses import LiftedStructureLoss as LiftedStructureLoss
from lightning_memdml.losses import Linear as Linear
from lightning_memdml.losses import MarginLoss as MarginLoss
from lightning_memdml.losses import MultiSimilarityLoss as MultiSimilarityLoss
from lightning_memdml.losses import NCALoss as NCALoss
from lightning_memdml.losses import PairLoss as PairLoss
from lightning_memdml.losses import Piecewise as Piecewise
from lightning_memdml.losses import Power as Power
from lightning_memdml.losses import Sigmoid as Sigmoid
from lightning_memdml.losses import SupConLoss as SupConLoss
from lightning_memdml.losses import Threshold as Threshold
from lightning_memdml.losses import TripletLoss as TripletLoss
from lightning_memdml.losses import WeightFunction as WeightFunction
from lightning_memdml.memory import EmbeddingMemory as EmbeddingMemory
from lightning_memdml.memory import InstanceMemory as InstanceMemory
from lightning_memdml.memory import MomentumEncoder as MomentumEncoder
from lightning_memdml.memory import ShardedMemory as ShardedMemory
from lightning_memdml.retrieval import RetrievalMetrics as RetrievalMetrics
from lightning_memdml.schedules import LinearRamp as LinearRamp
from lightning_memdml.schedules import WarmupCosine as WarmupCosine

__all__: list[str]
__version__: str
