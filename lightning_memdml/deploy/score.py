"""`memdml score`: exact retrieval scores of embeddings in files, from any source."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_memdml.csv_table import write_csv
from lightning_memdml.data.labels import label_of
from lightning_memdml.deploy.predictions import UNKNOWN, read_embeddings
from lightning_memdml.deploy.trained import call
from lightning_memdml.retrieval import normalized_mutual_information, rank_queries, rank_reranked, save_map

DESCRIPTION = """\
Score embeddings in files exactly, as `memdml test` does. For embeddings from any source, without checkpoint or images.

  memdml score --embeddings runs/memdml/version_1/embeddings.parquet
  memdml score --embeddings query.parquet --gallery small.parquet --gallery+ large.parquet --groups camera
  memdml score --embeddings embeddings.npy --intervals true --per_class classes.csv --map map.png

A file has the layout of `memdml predict`: a .parquet with the columns `embedding` and `label`, or a .npy beside a .csv.
'embeddings_rank*.parquet' means all files of a run on several ranks; an image in two of them counts once. With a column
`index` in all files, equal numbers are one image, which does not find itself; -1 means unknown."""


def score(arguments: list[str]) -> None:
    """Run `memdml score` with what follows it on the command line."""
    call(score_files, arguments, prog="memdml score", description=DESCRIPTION)


def score_files(
    embeddings: str,
    gallery: str | list[str] | None = None,
    k: Sequence[int] = (1, 10, 100, 1000),
    groups: str | None = None,
    mean_average_precision: bool = False,
    intervals: bool = False,
    nmi: bool = False,
    rerank: bool = False,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    per_class: str | None = None,
    map: str | None = None,
    map_method: Literal["pca", "umap"] = "pca",
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Print the exact retrieval scores of embeddings in files.

    Args:
        embeddings: File of the queries; without a gallery they search each other.
        gallery: File of a gallery, or several that the same queries search one by one.
        k: Recall levels.
        groups: A column, such as the camera: references of the query's label and group are left out.
        mean_average_precision: Also compute the rank of every match, however deep.
        intervals: Add 95 % confidence intervals, from 1,000 bootstrap samples of classes.
        nmi: Add the normalised mutual information of k-means clusters of the queries and their classes.
        rerank: Add scores after re-ranking by k-reciprocal neighbours, of 10,000 images at most.
        k1: Neighbours among which re-ranking searches reciprocal ones.
        k2: Neighbours over which re-ranking averages.
        lambda_value: Weight of the original distance in re-ranking, in [0, 1].
        per_class: Write the scores of each class to this .csv.
        map: Draw a map of the queries to this .png.
        map_method: Method of the map; `umap` needs the extra of this name.
        seed: Seed of intervals, clusters and map.

    Returns:
        Scores by gallery; without a gallery, under the name of the file itself. Those after re-ranking have the prefix
        `reranked_`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, lacks a column, or holds values that are not finite.
    """
    queries = read_embeddings(embeddings)
    searched = [gallery] if isinstance(gallery, str) else gallery or [embeddings]
    found: dict[str, dict[str, float]] = {}
    tables = []
    for name in searched:
        sets = _sets(queries, read_embeddings(name) if gallery else None, groups)
        counting: dict[str, Any] = {"depth": max(k), "mean_average_precision": mean_average_precision}
        ranks = rank_queries(**sets, **counting)
        scores = ranks.scores(k)
        tables.append(ranks.per_class(k))
        if nmi and not found.keys() - {name}:
            scores["nmi"] = normalized_mutual_information(queries[0], _labels(queries), seed=seed)
        limits = ranks.confidence_intervals(k, seed=seed) if intervals else {}
        lines = {score: _line(score, value, limits.get(score)) for score, value in scores.items()}
        if rerank:
            ranks = rank_reranked(**sets, **counting, k1=k1, k2=k2, lambda_value=lambda_value)
            limits = ranks.confidence_intervals(k, seed=seed) if intervals else {}
            for score, value in ranks.scores(k).items():
                if score not in ("queries", "excluded"):
                    scores[f"reranked_{score}"] = value
                    lines[score] += f"   re-ranked {_value(value, limits.get(score))}"
        found[name] = scores
        print(f"{embeddings} in {name}" if gallery else embeddings)
        print("\n".join(lines.values()))
    if per_class is not None:
        _write_classes(Path(per_class), searched, tables, _names(queries))
        print(f"    {per_class}")
    if map is not None:
        labels, names = _labels(queries), _names(queries)
        print(f"    {save_map(map, queries[0], labels, method=map_method, class_names=names, seed=seed)}")
    return found


Embedded = tuple[Tensor, dict[str, list[Any]]]


def _sets(queries: Embedded, gallery: Embedded | None, groups: str | None) -> dict[str, Any]:
    """Return the arguments of `rank_queries`. Rows of equal index are one image, which does not find itself."""
    files = [queries] if gallery is None else [queries, gallery]
    columns: dict[str, Sequence[Tensor | None]] = {
        "embeddings": [rows for rows, _ in files],
        "labels": _common_labels(*files),
        "groups": [None] * len(files) if groups is None else _group_numbers(files, groups),
        "indices": [None] * len(files),
    }
    if all("index" in facts for _, facts in files):
        columns["indices"] = _index_numbers([facts["index"] for _, facts in files])
    arguments: dict[str, Any] = {name: column[0] for name, column in columns.items()}
    if gallery is not None:
        arguments |= {f"gallery_{name}": column[1] for name, column in columns.items()}
    return arguments


def _labels(embedded: Embedded) -> Tensor:
    return _common_labels(embedded)[0]


def _common_labels(*files: Embedded) -> list[Tensor]:
    """Return the labels of each file; equal texts get equal numbers."""
    for _, columns in files:
        if "label" not in columns:
            raise ValueError(f"Expected a column `label` but got {', '.join(columns) or 'none'}. Add or rename one.")
    return _numbered([columns["label"] for _, columns in files])


def _group_numbers(files: Sequence[Embedded], column: str) -> list[Tensor]:
    for _, facts in files:
        if column not in facts:
            raise ValueError(
                f"Expected the column `{column}` of `groups` but got {', '.join(facts)}. Name one of these."
            )
    return _numbered([facts[column] for _, facts in files])


def _index_numbers(columns: Sequence[list[Any]]) -> list[Tensor]:
    """Number image names; -1, an unknown image, stays."""
    if all(isinstance(index, int) for column in columns for index in column):
        return [torch.tensor(column, dtype=torch.long) for column in columns]
    number = {str(UNKNOWN): UNKNOWN}
    number |= {name: row for row, name in enumerate(dict.fromkeys(map(str, chain(*columns)))) if name != str(UNKNOWN)}
    return [torch.tensor([number[str(index)] for index in column], dtype=torch.long) for column in columns]


def _numbered(columns: Sequence[list[Any]]) -> list[Tensor]:
    """Number labels, equal ones alike whatever their type; each missing one differs from all others."""
    cells = [[label_of(cell) for cell in column] for column in columns]
    if all(isinstance(cell, int) for column in cells for cell in column):
        return [torch.tensor(column, dtype=torch.long) for column in cells]
    number: dict[Any, int] = {}
    return [
        torch.tensor(
            [number.setdefault(object() if cell is None else str(cell), len(number)) for cell in column],
            dtype=torch.long,
        )
        for column in cells
    ]


def _names(embedded: Embedded) -> dict[int, str]:
    columns = embedded[1]
    return dict(zip(_labels(embedded).tolist(), map(str, columns.get("class", columns["label"])), strict=True))


def _line(name: str, value: float, limits: tuple[float, float] | None) -> str:
    if name in ("queries", "excluded"):
        return f"  {name:24} {value:>8,}"
    return f"  {name:24} {_value(value, limits)}"


def _value(value: float, limits: tuple[float, float] | None) -> str:
    return f"{value:8.4f}" + ("" if limits is None else f"   [{limits[0]:.4f}, {limits[1]:.4f}]")


def _write_classes(path: Path, galleries: list[str], tables: list[dict[str, Tensor]], names: dict[int, str]) -> None:
    """Write a row for each gallery and class."""
    rows = (
        [gallery, names[row[0]], *row]
        for gallery, table in zip(galleries, tables, strict=True)
        for row in zip(*(column.tolist() for column in table.values()), strict=True)
    )
    write_csv(path, ["gallery", "class", *tables[0]], rows)
