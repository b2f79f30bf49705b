"""Embeddings in files, with the path, label and class of each image: written by ``memdml predict``, read by others."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_memdml.atomic_write import atomic_write

FileFormat = Literal["parquet", "npy"]
Columns = Mapping[str, Sequence[Any]]


def write_embeddings(path: Path, embeddings: Tensor, columns: Columns, file_format: FileFormat) -> list[Path]:
    """Write embeddings with columns about them, all at once.

    Args:
        path: The file, without its ending.
        embeddings: `(N, D)`.
        columns: Name -> `N` numbers or texts.
        file_format: `"parquet"`: one table, the embedding as a column of lists of D float32. `"npy"`: an array
            `(N, D)` float32, and a `.csv` of the columns.

    Returns:
        The files.
    """
    rows = embeddings.detach().float().cpu().numpy()
    if file_format == "parquet":
        return [_written(path.with_name(f"{path.name}.parquet"), lambda file: _write_parquet(file, rows, columns))]
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
        indices: `(N,)` image numbers.
        images: Data set with the `indices` and `paths` of all images.
        classes: Name of each label.

    Returns:
        `path`, `label`, `class` and `index`.
    """
    columns: dict[str, list[Any]] = {}
    if images is not None and indices is not None:
        path_of = dict(zip(images.indices.tolist(), images.paths, strict=True))
        columns["path"] = [path_of[index] for index in indices.tolist()]
    columns["label"] = labels.tolist()
    if classes is not None:
        columns["class"] = [str(classes[label]) for label in labels.tolist()]
    if indices is not None:
        columns["index"] = indices.tolist()
    return columns


def _written(path: Path, write: Callable[[Path], None]) -> Path:
    with atomic_write(path) as unfinished:
        write(unfinished)
    return path


def _write_parquet(path: Path, rows: np.ndarray, columns: Columns) -> None:
    import pyarrow
    from pyarrow import parquet

    values = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), rows.shape[1])
    parquet.write_table(pyarrow.table({**columns, "embedding": values}), path)


def _write_npy(path: Path, rows: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, rows)


def _write_csv(path: Path, columns: Columns) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def read_embeddings(path: str | Path) -> tuple[Tensor, dict[str, list[Any]]]:
    """Read what `write_embeddings` wrote, or a file of the same layout.

    Args:
        path: A `.parquet` with a column `embedding`, or a `.npy` beside a `.csv` of the same name. With a `*` in the
            name, all such files are joined, as those of several ranks; of rows with one `index`, the first is taken.

    Returns:
        The embeddings `(N, D)` float32, and the other columns; those of a `.csv` are texts, `label` and `index` apart.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or there is not one row of columns per embedding; if files do not fit
            together.

    Example:
        >>> import tempfile
        >>> stem = Path(tempfile.mkdtemp(), "embeddings")
        >>> files = write_embeddings(stem, torch.eye(2), {"path": ["a", "b"], "label": [0, 1]}, "npy")
        >>> read_embeddings(files[0])
        (tensor([[1., 0.],
                [0., 1.]]), {'path': ['a', 'b'], 'label': [0, 1]})
    """
    path = Path(path)
    if path.suffix not in (".parquet", ".npy"):
        raise ValueError(f"Expected embeddings in a .parquet or .npy file but got {path}.")
    if "*" in path.name:
        return _joined(path)
    for needed in (path,) if path.suffix == ".parquet" else (path, path.with_suffix(".csv")):
        if not needed.is_file():
            ranks = path.with_name(f"{path.stem}_rank*{path.suffix}")
            hint = f"name those of all ranks, '{ranks}'" if _matching(ranks) else "`memdml predict` writes them"
            raise FileNotFoundError(f"Expected embeddings but there is no file {needed}; {hint}.")
    try:
        rows, columns = _read_parquet(path) if path.suffix == ".parquet" else _read_npy(path)
    except (ValueError, KeyError, OSError, EOFError) as error:
        raise ValueError(
            f"Expected embeddings of the layout of `memdml predict` in {path} but got: {error}."
        ) from error
    if rows.ndim != 2 or any(len(column) != len(rows) for column in columns.values()):
        lengths = {name: len(column) for name, column in columns.items()}
        raise ValueError(
            f"Expected embeddings (N, D) and N of each column in {path} but got {rows.shape} and {lengths}."
        )
    return torch.from_numpy(rows), columns


def _matching(pattern: Path) -> list[Path]:
    return sorted(pattern.parent.glob(pattern.name))


def _joined(pattern: Path) -> tuple[Tensor, dict[str, list[Any]]]:
    files = _matching(pattern)
    if not files:
        raise FileNotFoundError(f"Expected embeddings but there is no file {pattern}; `memdml predict` writes them.")
    parts = [read_embeddings(file) for file in files]
    kinds = {(rows.shape[1], *facts) for rows, facts in parts}
    if len(kinds) > 1:
        raise ValueError(f"Expected files of one dimension and the same columns in {pattern} but got {sorted(kinds)}.")
    rows = torch.cat([rows for rows, _ in parts])
    columns = {name: [value for _, facts in parts for value in facts[name]] for name in parts[0][1]}
    if "index" not in columns:
        return rows, columns
    # Lightning shows some images to two ranks, so that all have as many.
    kept = np.sort(np.unique(columns["index"], return_index=True)[1]).tolist()
    return rows[kept], {name: [values[place] for place in kept] for name, values in columns.items()}


def _read_parquet(path: Path) -> tuple[np.ndarray, dict[str, list[Any]]]:
    from pyarrow import parquet

    table = parquet.read_table(path)
    if "embedding" not in table.column_names:
        raise ValueError(f"no column `embedding` among {', '.join(table.column_names)}")
    lists = table.column("embedding").combine_chunks()
    rows = np.array(lists.flatten().to_numpy(zero_copy_only=False), dtype=np.float32).reshape(len(lists), -1)
    return rows, table.drop_columns(["embedding"]).to_pydict()


def _read_npy(path: Path) -> tuple[np.ndarray, dict[str, list[Any]]]:
    rows = np.load(path, allow_pickle=False).astype(np.float32)
    with path.with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file, strict=True)
    columns: dict[str, list[Any]] = {name: list(cells) for name, *cells in zip(header, *lines, strict=True)}
    for name in {"label", "index"} & set(columns):
        columns[name] = [int(cell) for cell in columns[name]]
    return rows, columns
