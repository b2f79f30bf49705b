"""``memdml index`` and ``memdml search``: find the nearest images with a trained network."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor

from lightning_memdml.cli_messages import ArgumentParser
from lightning_memdml.data.images import ImageDataset
from lightning_memdml.deploy.embedding import PROGRESS, embed
from lightning_memdml.deploy.sources import (
    FromFile,
    NamedImages,
    Part,
    image_files,
    images_at,
    input_transform,
    part_of,
    tensor_shape,
)
from lightning_memdml.deploy.trained import configuration_of, data_of, file_digest, load_learner
from lightning_memdml.retrieval import Neighbour, RetrievalExample, save_gallery
from lightning_memdml.retrieval.index import (
    EmbeddingIndex,
    IndexedImages,
    IndexOptions,
    build_index,
    load_index,
    replace_folder,
    require_replaceable,
)

INDEX = """\
Embed images with a trained network, and build a faiss index of them.

  memdml index --ckpt_path runs/memdml/version_0/checkpoints/last.ckpt
  memdml index --ckpt_path last.ckpt --source my/images --output runs/my_index
  memdml index --ckpt_path last.ckpt --source catalogue.csv --kind ivf --probes 16

Without --source these are the images of the checkpoint's own data, by default those its test searches. A folder is
taken with all images in it, at any depth. A run that was killed goes on where it stopped."""
SEARCH = """\
Find the images of an index that are nearest to image files.

  memdml search bird.jpg --index runs/index
  memdml search *.jpg --index runs/index --k 20 --html found.html"""


def index(arguments: list[str]) -> None:
    """Run ``memdml index`` with what follows it on the command line."""
    parser = ArgumentParser(prog="memdml index", description=INDEX)
    parser.add_function_arguments(index_images, as_group=False, skip={"data", "options"})
    parser.add_subclass_arguments(
        LightningDataModule,
        "data",
        required=False,
        help="Where the images come from, if not from the checkpoint's own data.",
    )
    parser.add_class_arguments(IndexOptions, as_group=False)
    given = parser.parse_args(arguments).as_dict()
    options = IndexOptions(**{field.name: given.pop(field.name) for field in fields(IndexOptions)})
    given.pop("config", None)
    index_images(**given, options=options)


def search(arguments: list[str]) -> None:
    """Run ``memdml search`` with what follows it on the command line."""
    parser = ArgumentParser(prog="memdml search", description=SEARCH)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="An image file.")
    parser.add_function_arguments(search_images, as_group=False, skip={"images"})
    given = parser.parse_args(arguments).as_dict()
    given.pop("config", None)
    search_images(**given)


def index_images(
    ckpt_path: str,
    source: str | None = None,
    images: Part = "gallery",
    data: dict[str, Any] | None = None,
    output: str = "runs/index",
    device: str = "cpu",
    options: IndexOptions | None = None,
) -> EmbeddingIndex:
    """Embed images with a trained network, and build an index of them in a folder.

    Args:
        ckpt_path: A checkpoint of ``memdml fit``.
        source: A folder of images, or a table or archive as `TableDataModule` reads it, instead of the checkpoint's
            data. They are prepared as its test images are.
        images: Which images of the data module, if there is no `source`.
        data: Class path and arguments of another data module.
        output: Folder of the index; an index there is replaced when the new one is finished.
        device: Where the network runs, ``cpu`` or ``cuda``; on ``cuda``, faiss trains the index there too.
        options: Kind of index.

    Raises:
        FileNotFoundError: If there is no such source.
        OSError: If an image is missing or damaged.
        ValueError: If the checkpoint or the device cannot be used, or `output` is something else than an index.
    """
    folder = Path(output)
    require_replaceable(folder)
    about: dict[str, Any] = {
        "ckpt_path": str(Path(ckpt_path).resolve()),
        "source": None if source is None else str(Path(source).expanduser().resolve()),
        "images": images,
        "data": data or configuration_of(ckpt_path)["data"],
    }
    learner, digest = load_learner(ckpt_path, device), file_digest(ckpt_path)
    module = data_of(about["data"])
    about["tensor_shape"] = tensor_shape(module)
    chosen = _chosen(about)
    partial = folder.with_name(f".{folder.name}.partial")
    rows = embed(
        learner,
        chosen.images,
        partial,
        digest,
        batch_size=module.eval_batch_size,
        num_workers=min(8, os.cpu_count() or 1) if module.num_workers is None else module.num_workers,
        device=device,
    )
    named = IndexedImages(chosen.images.paths, chosen.images.labels.tolist(), chosen.classes)
    about["sha256"] = digest
    built = build_index(rows, named, options, about=about, device=device, progress=True)
    print(
        f"{len(built):,} images of {len(set(chosen.classes)):,} classes, {built.options.kind} index: {built.measure()}"
    )
    built.write(partial)
    (partial / PROGRESS).unlink()
    replace_folder(partial, folder)
    print(f"    {folder}")
    if chosen.images.has_pictures:
        print(f"Next: memdml search IMAGE... --index {folder}")
    return built


def _chosen(about: dict[str, Any]) -> NamedImages:
    """The images an index is of."""
    module = data_of(about["data"])
    if about["source"] is None:
        return part_of(module, about["images"])
    return images_at(about["source"], FromFile(input_transform(module), about["tensor_shape"]))


def search_images(
    images: Sequence[str],
    index: str = "runs/index",
    k: int = 10,
    ckpt_path: str | None = None,
    html: str | None = None,
    png: str | None = None,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Find the images of an index that are nearest to image files, and print them.

    Args:
        images: Image files.
        index: Folder of the index.
        k: Number of neighbours.
        ckpt_path: The checkpoint the index was made with, if it was moved.
        html: Write them as a page, too.
        png: Write them as a picture, too.
        device: Where the network runs, ``cpu`` or ``cuda``.

    Returns:
        Cosine similarities and positions in the index, `(Q, min(k, N))` each.

    Raises:
        FileNotFoundError: If there is no such index, checkpoint or image.
        OSError: If an image is damaged.
        ValueError: If the index is damaged, or was made with another checkpoint or of features, or there is no such
            device.
    """
    opened = load_index(index)
    about = opened.about
    if "sha256" not in about:
        raise ValueError(
            f"The index in {index} does not say which network embeds its queries; make it with `memdml index`, or "
            "search it in a program: `load_index(folder).search(embeddings)`."
        )
    learner = load_learner(_same_checkpoint(ckpt_path or about["ckpt_path"], about["sha256"]), device)
    transform = FromFile(input_transform(data_of(about["data"])), about["tensor_shape"])
    files = image_files(images, transform)
    with torch.inference_mode():
        start = time.perf_counter()
        queries = torch.cat([learner(files[row][0][None].to(device)).cpu() for row in range(len(files))])
        embedding_time = time.perf_counter() - start
    similarity, position = opened.search(queries, k)
    for path, values, rows in zip(images, similarity.tolist(), position.tolist(), strict=True):
        print(path)
        for place, (value, row) in enumerate(zip(values, rows, strict=True), start=1):
            if row >= 0:
                print(f"  {place:3d}  {value:.4f}  {opened.images.classes[row]:24}  {opened.images.paths[row]}")
    latency = _search_milliseconds(opened, queries, k)
    print(
        f"{len(opened):,} images, {opened.options.kind} index: {latency:.2f} ms per search, "
        f"{1000 * embedding_time / len(files):.0f} ms to embed an image; "
        f"recall@{similarity.shape[1]} against exact search {opened.recall(queries, k):.4f}"
    )
    if html or png:
        _show(opened, files, similarity, position, [path for path in (html, png) if path])
    return similarity, position


def _same_checkpoint(path: str, digest: str) -> str:
    """Return the path of the checkpoint, if it is the one with this digest."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"The index was made with the checkpoint {path}, which is not there; pass `--ckpt_path` of where it is now."
        )
    if file_digest(path) != digest:
        raise ValueError(
            f"The index was made with another checkpoint than {path}, and embeddings of two networks cannot be "
            "compared; make the index again with `memdml index`, or pass `--ckpt_path` of the one it was made with."
        )
    return path


def _search_milliseconds(opened: EmbeddingIndex, queries: Tensor, k: int) -> float:
    """Median time of a search for one image alone."""
    times = []
    for row in range(max(5, min(50, len(queries)))):
        start = time.perf_counter()
        opened.search(queries[[row % len(queries)]], k)
        times.append(1000 * (time.perf_counter() - start))
    return float(np.median(times))


def _show(
    opened: EmbeddingIndex, files: ImageDataset, similarity: Tensor, position: Tensor, written: Sequence[str]
) -> None:
    """Write what was found as pages and pictures."""
    chosen = _chosen(opened.about)
    if chosen.images.paths != opened.images.paths:
        raise ValueError(
            "The images have changed since the index was made, so it cannot be told which were found; make it again "
            "with `memdml index`."
        )
    labels = opened.images.labels
    examples = [
        RetrievalExample(
            query,
            None,
            tuple(
                Neighbour(row, labels[row], value, None)
                for value, row in zip(similarity[query].tolist(), position[query].tolist(), strict=True)
                if row >= 0
            ),
            name=Path(files.paths[query]).name,
        )
        for query in range(len(files))
    ]
    names = dict(zip(labels, opened.images.classes, strict=True))
    for path in written:
        save_gallery(path, examples, files.picture, chosen.images.picture, class_names=names, title="Nearest images")
        print(f"    {path}")
