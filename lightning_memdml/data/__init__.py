"""Where images come from: a base that makes loaders of records, and one file per data set."""

from lightning_memdml.data.folder import FolderDataModule
from lightning_memdml.data.glyphs import GlyphDataModule
from lightning_memdml.data.images import Record
from lightning_memdml.data.module import RetrievalDataModule
from lightning_memdml.data.table import TableDataModule

__all__ = ["FolderDataModule", "GlyphDataModule", "Record", "RetrievalDataModule", "TableDataModule"]
