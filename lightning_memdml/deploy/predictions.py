"""Files of embeddings, with the path, label and class of each image: written by `memdml predict`, read by `score`."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_memdml.atomic_write import atomic_write
from lightning_memdml.data.labels import label_of, labels_of
from lightning_memdml.data.table_files import Table, is_parquet, read_csv, read_parquet, read_vectors
from lightning_memdml.retrieval.embedding_table import EMBEDDING, write_embedding_table
from lightning_memdml.retrieval.index_folder import write_header
from lightning_memdml.retrieval.retrieval_sets import UNKNOWN

FileFormat = Literal["parquet", "npy"]
Columns = Mapping[str, Sequence[Any]]


def write_embeddings(path: Path, embeddings: Tensor, columns: Columns, file_format: FileFormat) -> list[Path]:
    """Write embeddings, with columns about each of them.

    Args:
        path: The file, without its ending.
        embeddings: `(N, D)`.
        columns: Name -> `N` numbers or texts.
        file_format: `"parquet"`: one table, the embedding as a column of lists of D float32. `"npy"`: an array
            `(N, D)` float32, and a `.csv` of the columns.

    Returns:
        The files.

    Raises:
        OSError: If the disk is full. The message names the file.
    """
    rows = embeddings.detach().float().cpu().numpy()
    if file_format == "parquet":
        return [write_embedding_table(path.with_name(f"{path.name}.parquet"), rows, columns)]
    return [
        _written(path.with_name(f"{path.name}.npy"), lambda file: _write_npy(file, rows)),
        _written(path.with_name(f"{path.name}.csv"), lambda file: _write_csv(file, columns)),
    ]


def columns_of(
    labels: Tensor, indices: Tensor | None, images: Any = None, classes: Sequence[int | str] | None = None
) -> dict[str, list[Any]]:
    """Return the columns that go with embeddings, as far as they are known.

    Args:
        labels: `(N,)`.
        indices: `(N,)` index of each image, -1 where unknown.
        images: Data set with the `indices` and `paths` of all images.
        classes: Name of each label.

    Returns:
        `path`, `label`, `class` and `index`.
    """
    columns: dict[str, list[Any]] = {}
    if images is not None and indices is not None:
        path_of = dict(zip(images.indices.tolist(), images.paths, strict=True))
        columns["path"] = ["" if index == UNKNOWN else path_of[index] for index in indices.tolist()]
    columns["label"] = labels.tolist()
    if classes is not None:
        columns["class"] = [str(classes[label]) for label in labels.tolist()]
    if indices is not None:
        columns["index"] = indices.tolist()
    return columns


def _written(path: Path, write: Callable[[Path], None]) -> Path:
    with atomic_write(path) as temporary:
        write(temporary)
    return path


def _write_npy(path: Path, rows: np.ndarray) -> None:
    with path.open("wb") as file:  # `numpy.save` does not report a full disk as such
        write_header(file, rows.shape)
        file.write(np.ascontiguousarray(rows).data)


def _write_csv(path: Path, columns: Columns) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def read_embeddings(path: str | Path) -> tuple[Tensor, dict[str, list[Any]]]:
    """Read what `write_embeddings` wrote, or a file of the same layout.

    Args:
        path: A `.parquet` with a column `embedding`, or a `.npy` beside a `.csv` of the same name. With a `*` in the
            name, all such files are joined, such as those of several ranks; of rows of one `index`, the first is kept.

    Returns:
        The embeddings `(N, D)` float32, and the other columns; those of a `.csv` are texts. A label or index is an
        integer if the file has no others, else a text; an index that is missing is -1, unknown.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, has not one row of columns per embedding, or does not fit the other files.

    Example:
        >>> import tempfile
        >>> columns = {"path": ["a", "b"], "label": [0, 1]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = write_embeddings(Path(folder, "embeddings"), torch.eye(2), columns, "npy")
        ...     read_embeddings(files[0])
        (tensor([[1., 0.],
                [0., 1.]]), {'path': ['a', 'b'], 'label': [0, 1]})
    """
    path = Path(path)
    if path.suffix.lower() not in (".parquet", ".npy"):
        raise ValueError(
            f"Expected embeddings in a .parquet or .npy file but got {path}. `memdml predict` writes both."
        )
    if "*" in path.name:
        return _joined(path)
    for needed in (path,) if is_parquet(path) else (path, _beside(path)):
        if not (needed.is_file() or (is_parquet(path) and needed.is_dir())):
            ranks = path.with_name(f"{path.stem}_rank*{path.suffix}")
            hint = f"Pass those of all ranks, '{ranks}'" if _matching(ranks) else "`memdml predict` writes it"
            raise FileNotFoundError(f"Expected embeddings but there is no file {needed}. {hint}.")
    try:
        rows, table = _read_parquet(path) if is_parquet(path) else _read_npy(path)
        columns = dict(table.columns)
        if "label" in columns:
            columns["label"] = labels_of(columns["label"], table.where)
        if "index" in columns:
            columns["index"] = [UNKNOWN if (index := label_of(cell)) is None else index for cell in columns["index"]]
    except (ValueError, KeyError, OSError, EOFError, MemoryError) as error:
        raise ValueError(
            f"Expected embeddings of the layout of `memdml predict` in {path} but got: {str(error).removesuffix('.')}. "
            "Write the file again with `memdml predict`."
        ) from error
    if rows.ndim != 2 or any(len(column) != len(rows) for column in columns.values()):
        lengths = {name: len(column) for name, column in columns.items()}
        raise ValueError(
            f"Expected embeddings (N, D) and N of each column in {path} but got {rows.shape} and {lengths}. "
            "Write the file again with `memdml predict`."
        )
    return torch.from_numpy(rows), columns


def _matching(pattern: Path) -> list[Path]:
    return sorted(pattern.parent.glob(pattern.name))


def _joined(pattern: Path) -> tuple[Tensor, dict[str, list[Any]]]:
    files = _matching(pattern)
    if not files:
        raise FileNotFoundError(
            f"Expected embeddings but there is no file {pattern}. `memdml predict` writes such files."
        )
    parts = [read_embeddings(file) for file in files]
    kinds = {(rows.shape[1], *facts) for rows, facts in parts}
    if len(kinds) > 1:
        raise ValueError(
            f"Expected files of one dimension and the same columns in {pattern} but got {sorted(kinds)}. Remove "
            "the files of other runs."
        )
    rows = torch.cat([rows for rows, _ in parts])
    columns = {name: [value for _, facts in parts for value in facts[name]] for name in parts[0][1]}
    if "index" not in columns:
        return rows, columns
    # Lightning gives some images to two ranks, so that all ranks have equally many.
    first = dict(reversed([(index, row) for row, index in enumerate(columns["index"])]))
    kept = [row for row, index in enumerate(columns["index"]) if index == UNKNOWN or first[index] == row]
    return rows[kept], {name: [values[place] for place in kept] for name, values in columns.items()}


def _read_parquet(path: Path) -> tuple[np.ndarray, Table]:
    return read_vectors(path, EMBEDDING), read_parquet(path)


def _read_npy(path: Path) -> tuple[np.ndarray, Table]:
    return np.load(path, allow_pickle=False).astype(np.float32), read_csv(_beside(path))


def _beside(path: Path) -> Path:
    """Return the `.csv` of the same name as a `.npy`, in small letters or in capitals."""
    capitals = path.with_suffix(".CSV")
    return capitals if capitals.is_file() else path.with_suffix(".csv")
