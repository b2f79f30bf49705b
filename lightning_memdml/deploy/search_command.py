"""`memdml search`: find the images of an index that are nearest to image files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_memdml.cli_messages import ArgumentParser
from lightning_memdml.data.images import ImageDataset
from lightning_memdml.data.paths import shown
from lightning_memdml.deploy.index_command import indexed_images
from lightning_memdml.deploy.trained import file_digest, load_learner, refuse_without
from lightning_memdml.inference.evaluation import embed_images
from lightning_memdml.inference.sources import FromFile, data_of, image_files, input_transform
from lightning_memdml.retrieval import Neighbour, RetrievalExample, save_gallery
from lightning_memdml.retrieval.index import EmbeddingIndex, load_index

DESCRIPTION = """\
Find the images of an index that are nearest to image files.

  memdml search bird.jpg --index runs/index
  memdml search *.jpg --index runs/index --k 20 --html found.html
  memdml search bird.jpg --rerank --candidates 500

The image files are prepared and embedded as those of the index were, with its `--flip` and `--whiten`. `--rerank`
orders the candidates of each image again, by the neighbours that they share. It costs about 10 ms of one core for each
image with 200 candidates and 0.1 s with 1,000, whatever the size of the index."""
# What `memdml index` stores with an index: name -> its types.
_ABOUT: dict[str, tuple[type, ...]] = {
    "sha256": (str,),
    "ckpt_path": (str,),
    "source": (str, type(None)),
    "images": (str,),
    "data": (dict,),
    "tensor_shape": (list, type(None)),
    "flip": (bool, type(None)),  # None: an index of version 0.1
}


def search(arguments: list[str]) -> None:
    """Run `memdml search` with what follows it on the command line."""
    parser = ArgumentParser(prog="memdml search", description=DESCRIPTION)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="An image file.")
    parser.add_function_arguments(search_images, as_group=False, skip={"images"})
    given = parser.parse_args(arguments).as_dict()
    given.pop("config", None)
    search_images(**given)


def search_images(
    images: Sequence[str],
    index: str = "runs/index",
    k: int = 10,
    ckpt_path: str | None = None,
    html: str | None = None,
    png: str | None = None,
    device: str = "cpu",
    trust: bool = False,
    rerank: bool = False,
    candidates: int = 200,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
) -> tuple[Tensor, Tensor]:
    """Find the images of an index that are nearest to image files, and print them.

    Args:
        images: Image files.
        index: Folder of the index.
        k: Number of neighbours.
        ckpt_path: Path of the index's checkpoint, if it was moved.
        html: Also write the result to this HTML page.
        png: Also write the result to this picture.
        device: Where the network runs, `cpu` or `cuda`.
        trust: Let the index and its checkpoint build and run whatever they name: only if you trust their author.
        rerank: Order the candidates by k-reciprocal neighbours, and print the earlier place in brackets.
        candidates: Images that are re-ranked for each image file, at least `k`.
        k1: Neighbours among which re-ranking searches reciprocal ones.
        k2: Neighbours over which re-ranking averages.
        lambda_value: Weight of the original distance in re-ranking, in [0, 1].

    Returns:
        Cosine similarities and positions in the index, `(Q, min(k, N))` each, the nearest first.

    Raises:
        FileNotFoundError: If there is no such index, checkpoint or image.
        OSError: If an image is damaged.
        ValueError: If the index is damaged, was made with another checkpoint or from features, there is no such device,
            or an option is set that needs another one.
    """
    reranking: dict[str, Any] = {"candidates": candidates, "k1": k1, "k2": k2, "lambda_value": lambda_value}
    refuse_without("rerank", rerank, search_images, **reranking)
    opened = load_index(index)
    about = _checked_about(opened.about, index)
    learner = load_learner(_same_checkpoint(ckpt_path or about["ckpt_path"], about["sha256"]), device, trust=trust)
    transform = FromFile(input_transform(data_of(about["data"], index, trust=trust)), about["tensor_shape"])
    files = image_files(images, transform)
    with torch.inference_mode():
        start = time.perf_counter()
        prepared = (files[row][0][None].to(device) for row in range(len(files)))
        queries = torch.cat([embed_images(learner, image, bool(about.get("flip"))).cpu() for image in prepared])
        embedding_time = time.perf_counter() - start
    find = partial(opened.search_reranked, k=k, **reranking) if rerank else partial(opened.search, k=k)
    similarity, position = find(queries)
    before = opened.search(queries, candidates)[1].tolist() if rerank else None
    for query, (path, values, rows) in enumerate(zip(images, similarity.tolist(), position.tolist(), strict=True)):
        print(shown(path))
        for place, (value, row) in enumerate(zip(values, rows, strict=True), start=1):
            if row >= 0:
                name, found = shown(opened.images.classes[row]), shown(opened.images.paths[row])
                moved = "" if before is None else f" {f'({before[query].index(row) + 1})':>6}"
                print(f"  {place:3d}{moved}  {value:.4f}  {name:24}  {found}")
    latency = _search_milliseconds(find, queries)
    print(
        f"{len(opened):,} images, {opened.kind.kind()} index: {latency:.2f} ms per search, "
        f"{1000 * embedding_time / len(files):.0f} ms to embed an image; "
        f"recall@{similarity.shape[1]} against exact search {opened.recall(queries, k):.4f}"
    )
    if html or png:
        _show(opened, files, similarity, position, [path for path in (html, png) if path], trust)
    return similarity, position


def _checked_about(about: dict[str, Any], index: str) -> dict[str, Any]:
    """Return what `memdml index` keeps with an index, if it is all there and of the right types."""
    if "sha256" not in about:
        raise ValueError(
            f"Expected an index of `memdml index` in {index}, which records its network, but this one records none. "
            "Search it in a program: `load_index(folder).search(embeddings)`."
        )
    for name, types in _ABOUT.items():
        if not isinstance(about.get(name), types):
            raise ValueError(
                f"Expected a whole index in {index} but it is damaged: its {name} is {about.get(name)!r}. Make it "
                "again with `memdml index`."
            )
    return about


def _same_checkpoint(path: str, digest: str) -> str:
    """Return the path of the checkpoint, if the file has this digest."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"Expected the checkpoint of the index in {path} but there is no such file. Pass its path as `--ckpt_path`."
        )
    if file_digest(path) != digest:
        raise ValueError(
            f"Expected the checkpoint of the index but {path} is another one, and embeddings of two networks cannot be "
            "compared. Pass the right one as `--ckpt_path`, or make the index again with `memdml index`."
        )
    return path


def _search_milliseconds(find: Callable[[Tensor], Any], queries: Tensor) -> float:
    """Return the median time of a search for one image."""
    times = []
    for row in range(max(5, min(50, len(queries)))):
        start = time.perf_counter()
        find(queries[[row % len(queries)]])
        times.append(1000 * (time.perf_counter() - start))
    return float(np.median(times))


def _show(
    opened: EmbeddingIndex,
    files: ImageDataset,
    similarity: Tensor,
    position: Tensor,
    written: Sequence[str],
    trust: bool,
) -> None:
    """Write the result as pages and pictures."""
    chosen = indexed_images(opened.about, trust=trust)
    if chosen.images.paths != opened.images.paths:
        raise ValueError(
            "Expected the images of the index but its source has others now, so the found images cannot be shown. Make "
            "the index again with `memdml index`."
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
