"""Embeddings as a Parquet file, which `memdml score`, pandas and vector databases read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_memdml.atomic_write import atomic_write
from lightning_memdml.retrieval.tiles import row_slices

EMBEDDING = "embedding"
_BLOCK = 8192  # rows in memory at a time, and rows of a row group


def write_embedding_table(path: Path, embeddings: np.ndarray, columns: Mapping[str, Sequence[Any]]) -> Path:
    """Write embeddings to a Parquet file, with columns about each of them.

    A file that is there is replaced when the new one is finished. Embeddings that lie on a disk are read in blocks.

    Args:
        path: The file.
        embeddings: `(N, D)` float32; the column `embedding`, whose type is a list of D float32.
        columns: Name -> `N` numbers or texts.

    Returns:
        The file.

    Raises:
        OSError: If the disk is full. The message names the file.
    """
    import pyarrow
    from pyarrow import parquet

    dim = embeddings.shape[1]
    about = {name: pyarrow.array(values) for name, values in columns.items()}
    types = {**{name: values.type for name, values in about.items()}, EMBEDDING: pyarrow.list_(pyarrow.float32(), dim)}
    schema = pyarrow.schema(types)
    # Numbers of embeddings hardly repeat: a dictionary of them takes time and saves nothing.
    with atomic_write(path) as temporary, parquet.ParquetWriter(temporary, schema, use_dictionary=list(about)) as file:
        for part in row_slices(len(embeddings), _BLOCK):
            numbers = pyarrow.array(np.ascontiguousarray(embeddings[part]).reshape(-1))
            rows = pyarrow.FixedSizeListArray.from_arrays(numbers, dim)
            block = [values.slice(part.start, part.stop - part.start) for values in about.values()]
            file.write_table(pyarrow.table([*block, rows], schema=schema))
    return path
