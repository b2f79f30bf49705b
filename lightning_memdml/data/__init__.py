"""Data modules: a base that makes sets and loaders of records, and one file per data set."""

from lightning_memdml.data.cars196 import Cars196
from lightning_memdml.data.cjk import CJKDataModule
from lightning_memdml.data.cub200 import CUB200
from lightning_memdml.data.deep_fashion2 import DeepFashion2
from lightning_memdml.data.features import FeatureDataModule
from lightning_memdml.data.folder import FolderDataModule
from lightning_memdml.data.glyphs import GlyphDataModule
from lightning_memdml.data.hugging_face import HuggingFaceDataModule
from lightning_memdml.data.in_shop import InShop
from lightning_memdml.data.inaturalist import INaturalist2018
from lightning_memdml.data.module import RetrievalDataModule
from lightning_memdml.data.omniglot import Omniglot
from lightning_memdml.data.records import Record
from lightning_memdml.data.stanford_online_products import StanfordOnlineProducts
from lightning_memdml.data.table import TableDataModule
from lightning_memdml.data.vehicle_id import VehicleID

__all__ = [
    "CUB200",
    "CJKDataModule",
    "Cars196",
    "DeepFashion2",
    "FeatureDataModule",
    "FolderDataModule",
    "GlyphDataModule",
    "HuggingFaceDataModule",
    "INaturalist2018",
    "InShop",
    "Omniglot",
    "Record",
    "RetrievalDataModule",
    "StanfordOnlineProducts",
    "TableDataModule",
    "VehicleID",
]
