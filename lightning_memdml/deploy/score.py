"""`memdml score`: exact retrieval scores of embeddings in files, from any source, or of a checkpoint's test images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_memdml.csv_table import write_csv
from lightning_memdml.data.labels import label_of
from lightning_memdml.deploy.forms import EmbeddedImages, Form, asked_forms, embed_sets, read_sets
from lightning_memdml.deploy.predictions import UNKNOWN
from lightning_memdml.deploy.trained import call, refuse_without
from lightning_memdml.retrieval import normalized_mutual_information, rank_queries, rank_reranked, save_map
from lightning_memdml.whitening import Whitening

DESCRIPTION = """\
Score embeddings in files exactly, as `memdml test` does, or the test images of a checkpoint.

  memdml score --embeddings runs/memdml/version_1/embeddings.parquet
  memdml score --ckpt_path last.ckpt --flip --whiten --rerank
  memdml score --embeddings query.parquet --gallery small.parquet --gallery+ large.parquet --groups camera
  memdml score --embeddings embeddings.npy --intervals true --per_class classes.csv --map map.png

A file has the layout of `memdml predict`: a .parquet with the columns `embedding` and `label`, or a .npy beside a .csv.
'embeddings_rank*.parquet' means all files of a run on several ranks; an image in two of them counts once. With a column
`index` in all files, equal numbers are one image, which does not find itself; -1 means unknown."""


def score(arguments: list[str]) -> None:
    """Run `memdml score` with what follows it on the command line."""
    call(score_files, arguments, prog="memdml score", description=DESCRIPTION)


def score_files(
    embeddings: str | None = None,
    gallery: str | list[str] | None = None,
    k: Sequence[int] = (1, 10, 100, 1000),
    groups: str | None = None,
    mean_average_precision: bool = False,
    intervals: bool = False,
    nmi: bool = False,
    ckpt_path: str | None = None,
    flip: bool = False,
    whiten: bool = False,
    train: str | None = None,
    whiten_dim: int | None = None,
    shrinkage: float = 0.5,
    rerank: bool = False,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    per_class: str | None = None,
    map: str | None = None,
    map_method: Literal["pca", "umap"] = "pca",
    seed: int = 0,
    device: str = "cpu",
    trust: bool = False,
) -> dict[str, dict[str, float]]:
    """Print the exact retrieval scores of embeddings in files, or of the test images of a checkpoint.

    With `flip`, `whiten` and `rerank` each score stands beside the plain one: of each of them alone, and of all that
    are set together.

    Args:
        embeddings: File of the queries; without a gallery they search each other.
        gallery: File of a gallery, or several that the same queries search one by one.
        k: Recall levels.
        groups: A column, such as the camera: references of the query's label and group are left out.
        mean_average_precision: Also print the mean average precision, which needs the rank of every match.
        intervals: Add 95 % confidence intervals, from 1,000 bootstrap samples of classes.
        nmi: Add the normalised mutual information of k-means clusters of the queries and their classes.
        ckpt_path: Score the test images of this checkpoint, instead of files.
        flip: Add scores of embeddings that are averaged with those of the mirrored images.
        whiten: Add scores of embeddings that are whitened (PCA) on the training images.
        train: File of the embeddings of the training images, to whiten those in files.
        whiten_dim: Dimensions that whitening keeps; by default all.
        shrinkage: How far whitening moves the covariance towards the identity, in [0, 1).
        rerank: Add scores after re-ranking by k-reciprocal neighbours, of 10,000 images at most.
        k1: Neighbours among which re-ranking searches reciprocal ones.
        k2: Neighbours over which re-ranking averages.
        lambda_value: Weight of the original distance in re-ranking, in [0, 1].
        per_class: Write the scores of each class to this .csv.
        map: Draw a map of the queries to this .png.
        map_method: Method of the map; `umap` needs the extra of this name.
        seed: Seed of intervals, clusters and map.
        device: Where the network runs, `cpu` or `cuda`.
        trust: Let the checkpoint build and run whatever it names: only if you trust its author.

    Returns:
        Scores by gallery; without a gallery, under the name of the file itself. Those that are not plain have prefixes:
        `flip_`, `whitened_`, `reranked_`, and `flip_whitened_reranked_` for all together.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, lacks a column, or holds values that are not finite; if the checkpoint cannot
            be used; or if an option is set that needs another one.
    """
    refuse_without("rerank", rerank, score_files, k1=k1, k2=k2, lambda_value=lambda_value)
    refuse_without("whiten", whiten, score_files, train=train, whiten_dim=whiten_dim, shrinkage=shrinkage)
    asked = Form(flip, whiten, rerank)
    forms = asked_forms(asked)
    if ckpt_path is None:
        _check_files(embeddings, flip, whiten, train)
        queries, galleries, training = read_sets(str(embeddings), gallery, train)
    else:
        _check_checkpoint(embeddings=embeddings, gallery=gallery, train=train)
        queries, galleries, training = embed_sets(ckpt_path, asked, device, trust)
    whitenings: dict[bool, Whitening] = {}
    if training is not None:
        flips = {form.flip for form in forms if form.whiten}
        whitenings = {is_flip: Whitening.fit(training.view(is_flip), whiten_dim, shrinkage) for is_flip in flips}
    counting: dict[str, Any] = {"depth": max(k), "mean_average_precision": mean_average_precision}
    reranking: dict[str, Any] = {"k1": k1, "k2": k2, "lambda_value": lambda_value}
    found: dict[str, dict[str, float]] = {}
    tables = []
    for name, searched in galleries.items():
        sets = _sets(queries, searched, groups)
        scores: dict[str, float] = {}
        cells: list[dict[str, str]] = []
        for form in forms:
            rows = {"embeddings": _in_form(queries, form, whitenings)}
            if searched is not None:
                rows["gallery_embeddings"] = _in_form(searched, form, whitenings)
            given = {**sets, **rows, **counting}
            ranks = rank_reranked(**given, **reranking) if form.rerank else rank_queries(**given)
            tables.append((name, form.name, ranks.per_class(k)))
            values = ranks.scores(k)
            if form != Form():  # counts are those of the plain scores
                values = {score: value for score, value in values.items() if score not in ("queries", "excluded")}
            elif nmi and not found:
                values["nmi"] = normalized_mutual_information(queries.rows, _labels(queries), seed=seed)
            limits = ranks.confidence_intervals(k, seed=seed) if intervals else {}
            cells.append({score: _cell(score, value, limits.get(score)) for score, value in values.items()})
            scores |= {f"{form.prefix}{score}": value for score, value in values.items()}
        found[name] = scores
        print(name if searched is None or ckpt_path is not None else f"{embeddings} in {name}")
        print(_table([form.name for form in forms], cells))
    if training is not None:
        width = training.rows.shape[1]
        print(f"Whitened on {len(training.rows):,} training images, {width} to {whiten_dim or width} dimensions.")
    if per_class is not None:
        _write_classes(Path(per_class), tables, _names(queries))
        print(f"    {per_class}")
    if map is not None:
        labels, names = _labels(queries), _names(queries)
        print(f"    {save_map(map, queries.rows, labels, method=map_method, class_names=names, seed=seed)}")
    return found


def _check_files(embeddings: str | None, flip: bool, whiten: bool, train: str | None) -> None:
    if embeddings is None:
        raise ValueError(
            "Expected `--embeddings` or `--ckpt_path` but got neither. Pass a file of embeddings, such as `memdml "
            "predict` writes, or a checkpoint."
        )
    if flip:
        raise ValueError(
            "Expected `--ckpt_path` with `--flip`, as mirrored images have to be embedded, but got embeddings in a "
            "file. Pass the checkpoint in place of the file, or write the file with `memdml predict --flip`."
        )
    if whiten and train is None:
        raise ValueError(
            "Expected the embeddings of the training images with `--whiten` but got those to score alone. Add `--train "
            "FILE`, or pass `--ckpt_path` in place of the file."
        )


def _check_checkpoint(**options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"Expected either a checkpoint, whose own images are scored, or files but got `--ckpt_path` and "
                f"`--{name}`. Leave one out."
            )


def _in_form(embedded: EmbeddedImages, form: Form, whitenings: dict[bool, Whitening]) -> Tensor:
    rows = embedded.view(form.flip)
    return whitenings[form.flip](rows) if form.whiten else rows


def _sets(queries: EmbeddedImages, gallery: EmbeddedImages | None, groups: str | None) -> dict[str, Any]:
    """Return the arguments of `rank_queries` but for embeddings. Rows of equal index are one image."""
    files = [queries] if gallery is None else [queries, gallery]
    columns: dict[str, Sequence[Tensor | None]] = {
        "labels": _common_labels(*files),
        "groups": [None] * len(files) if groups is None else _group_numbers(files, groups),
        "indices": [None] * len(files),
    }
    if all("index" in file.columns for file in files):
        columns["indices"] = _index_numbers([file.columns["index"] for file in files])
    arguments: dict[str, Any] = {name: column[0] for name, column in columns.items()}
    if gallery is not None:
        arguments |= {f"gallery_{name}": column[1] for name, column in columns.items()}
    return arguments


def _labels(embedded: EmbeddedImages) -> Tensor:
    return _common_labels(embedded)[0]


def _common_labels(*files: EmbeddedImages) -> list[Tensor]:
    """Return the labels of each file; equal texts get equal numbers."""
    for _, columns, _ in files:
        if "label" not in columns:
            raise ValueError(f"Expected a column `label` but got {', '.join(columns) or 'none'}. Add or rename one.")
    return _numbered([file.columns["label"] for file in files])


def _group_numbers(files: Sequence[EmbeddedImages], column: str) -> list[Tensor]:
    for _, columns, _ in files:
        if column not in columns:
            raise ValueError(
                f"Expected the column `{column}` of `groups` but got {', '.join(columns)}. Name one of these."
            )
    return _numbered([file.columns[column] for file in files])


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


def _names(embedded: EmbeddedImages) -> dict[int, str]:
    columns = embedded.columns
    return dict(zip(_labels(embedded).tolist(), map(str, columns.get("class", columns["label"])), strict=True))


def _cell(name: str, value: float, limits: tuple[float, float] | None) -> str:
    if name in ("queries", "excluded"):
        return f"{value:>8,}"
    return f"{value:8.4f}" + ("" if limits is None else f"   [{limits[0]:.4f}, {limits[1]:.4f}]")


def _table(forms: Sequence[str], cells: Sequence[dict[str, str]]) -> str:
    """Return a row for each score, with a column for each form; a single form needs no headings."""
    columns = [
        [f"{form:>8}", *(column.get(score, "") for score in cells[0])]
        for form, column in zip(forms, cells, strict=True)
    ]
    widths = [max(map(len, column)) for column in columns]
    rows = [
        f"  {name:24} " + "   ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for name, *row in zip(["", *cells[0]], *columns, strict=True)
    ]
    return "\n".join(rows[len(forms) == 1 :])


def _write_classes(path: Path, tables: list[tuple[str, str, dict[str, Tensor]]], names: dict[int, str]) -> None:
    """Write a row for each gallery, form and class."""
    rows = (
        [gallery, form, names[row[0]], *row]
        for gallery, form, table in tables
        for row in zip(*(column.tolist() for column in table.values()), strict=True)
    )
    write_csv(path, ["gallery", "form", "class", *tables[0][2]], rows)
