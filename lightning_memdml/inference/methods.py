"""What a trained learner does with images: embed, index, search, export. These functions are methods of the learner."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_memdml.inference.evaluation import embed_images

if TYPE_CHECKING:  # needed when a method is called, and not by a training script
    from PIL import Image

    from lightning_memdml.inference.export import Format
    from lightning_memdml.inference.sources import NamedImages
    from lightning_memdml.retrieval.index import EmbeddingIndex
    from lightning_memdml.retrieval.index_kinds import IndexKind
    from lightning_memdml.whitening import Whitening

    Images = Tensor | str | Path | Image.Image | Sequence[str | Path | Image.Image]
    Transform = Callable[[Any], Any]


def embed(
    learner: Any,
    images: Images,
    *,
    flip: bool = False,
    transform: Transform | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = True,
) -> Tensor:
    """Return the embeddings of images.

    Images are prepared as those that the learner was validated on: by the test transform of its data module, which the
    checkpoint holds, or by the preprocessing of a network of timm or Hugging Face.

    Args:
        learner: The learner; it runs where it is, in evaluation mode, and has its modes back afterwards.
        images: A folder, a table or an archive as `memdml index --source` reads them, an image file, a picture of
            Pillow, several files or pictures, uint8 pixels `(N, C, H, W)`, or prepared input as float32.
        flip: Average the embedding of each image with that of its mirrored copy, which takes twice the time.
        transform: Prepares a picture of Pillow, or pixels, in the place of the learner's own transform.
        batch_size: Images per batch.
        num_workers: Processes that open and prepare images.
        progress: Show a progress bar.

    Returns:
        `(N, D)` float32 on the CPU, of unit length. Those of a folder are in the order of their paths.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        OSError: If an image is damaged; the message names it.
        ValueError: If it is not known how images are prepared; pass `transform=`.

    Example:
        >>> from lightning_memdml import ContrastiveLoss, MetricLearner, SmallConvNet
        >>> learner = MetricLearner(SmallConvNet(), ContrastiveLoss(), embedding_dim=8)
        >>> learner.embed(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 8])
    """
    if isinstance(images, Tensor) and images.is_floating_point():
        return _embed_batches(learner, images.split(batch_size), len(images), flip, progress)
    return _embed_named(learner, _named(learner, images, transform), flip, batch_size, num_workers, progress)


def build_index(
    learner: Any,
    images: Images,
    *,
    kind: IndexKind | None = None,
    output: str | Path | None = None,
    flip: bool = False,
    whitening: Whitening | None = None,
    transform: Transform | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = True,
) -> EmbeddingIndex:
    """Embed images, and build an index of them.

    `memdml index` does the same for images that do not fit into memory or take hours: it resumes.

    Args:
        learner: The learner.
        images: As for `embed`, but not prepared. The classes of a folder or table are kept.
        kind: `Flat()` (the default, exact), `IVF()`, `HNSW()` or `PQ()` of `lightning_memdml.retrieval`.
        output: Folder to save the index to.
        flip: As for `embed`. The index records it, so that `search` treats its images in the same way.
        whitening: Whiten the embeddings and those of every search, by `Whitening.fit(learner.embed(training_images))`
            of `lightning_memdml.retrieval`, with the same `flip`.
        transform: As for `embed`.
        batch_size: Images per batch.
        num_workers: Processes that open and prepare images.
        progress: Show a progress bar.

    Raises:
        ImportError: If the kind needs faiss and it is not installed.
        ValueError: As for `embed`; or if `output` is something other than an index.
    """
    from lightning_memdml.retrieval.index import IndexedImages
    from lightning_memdml.retrieval.index import build_index as build

    named = _named(learner, images, transform)
    rows = _embed_named(learner, named, flip, batch_size, num_workers, progress)
    described = IndexedImages(named.images.paths, named.images.labels.tolist(), named.classes)
    index = build(rows, described, kind, about={"flip": True} if flip else None, whitening=whitening)
    if output is not None:
        index.save(output)
    return index


def search(
    learner: Any,
    images: Images,
    index: EmbeddingIndex | str | Path,
    k: int = 10,
    *,
    rerank: bool = False,
    transform: Transform | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Find the images of an index that are nearest to images.

    The images are averaged with their mirrored copies and whitened if those of the index were.

    Args:
        learner: The learner that the index was made with.
        images: As for `embed`.
        index: The index, or its folder.
        k: Number of neighbours.
        rerank: Order the nearest 200 images, or `k` if these are more, by k-reciprocal neighbours, with the defaults of
            `EmbeddingIndex.search_reranked`.
        transform: As for `embed`.
        progress: Show a progress bar.

    Returns:
        Cosine similarities and positions in the index, both `(Q, min(k, N))`, the nearest first. `index.images.paths`
        has the path at a position.

    Raises:
        ValueError: As for `embed`; or if the index is of another dimension.
    """
    from lightning_memdml.retrieval.index import CANDIDATES, EmbeddingIndex, load_index

    opened = index if isinstance(index, EmbeddingIndex) else load_index(index)
    flip = bool(opened.about.get("flip", False))
    queries = embed(learner, images, flip=flip, transform=transform, progress=progress)
    return opened.search_reranked(queries, k, max(k, CANDIDATES)) if rerank else opened.search(queries, k)


def export(
    learner: Any,
    output: str | Path = "runs/export",
    formats: Sequence[Format] = ("onnx", "torch"),
    *,
    transform: Transform | None = None,
) -> dict[str, float]:
    """Write the network for use without this package, as ONNX and as a program of `torch.export`.

    Args:
        learner: The learner.
        output: Folder of the files. `preprocessing.json` describes how an image becomes the network's input.
        formats: What to write: `onnx` (extra `export`), `torch`.
        transform: As for `embed`.

    Returns:
        File name -> largest difference from the network in the entries of unit embeddings.

    Raises:
        ImportError: If the extra is missing.
        ValueError: If the transform is not known or cannot be described, or an exported model differs from the network.
    """
    from lightning_memdml.inference.export import export_network

    model = copy.deepcopy(learner.model).cpu().eval()
    return export_network(model, _transform_of(learner, transform), output, formats)


def _named(learner: Any, images: Images, transform: Transform | None) -> NamedImages:
    """Return images as a data set with the transform, and the names of their classes."""
    from PIL import Image

    from lightning_memdml.data.images import ImageDataset
    from lightning_memdml.data.pictures import SUFFIXES
    from lightning_memdml.inference.sources import NamedImages, image_files, images_at

    prepare = _transform_of(learner, transform)
    if isinstance(images, str | Path):
        if Path(images).suffix.lower() not in SUFFIXES or Path(images).is_dir():
            return images_at(images, prepare)
        images = [images]
    items: Any = [images] if isinstance(images, Image.Image) else images
    if not isinstance(items, Tensor) and all(isinstance(item, str | Path) for item in items):
        files = image_files([str(item) for item in items], prepare)
        return NamedImages(files, [""] * len(files))
    fits = items.dtype == torch.uint8 if isinstance(items, Tensor) else all(isinstance(i, Image.Image) for i in items)
    if not fits:
        raise TypeError(
            "Expected a folder, image files, pictures of Pillow, uint8 pixels or prepared float images but got "
            f"{f'a tensor of {items.dtype}' if isinstance(items, Tensor) else f'a {type(items).__name__} of others'}. "
            "Pass one of these."
        )
    names = [str(row) for row in range(len(items))]
    opened = ImageDataset(items.__getitem__, names, torch.zeros(len(items), dtype=torch.long), prepare)
    return NamedImages(opened, [""] * len(items))


def _transform_of(learner: Any, transform: Transform | None) -> Any:
    """Return what turns an image file into the input of a learner."""
    from lightning_memdml.data.transforms import EvaluationTransform
    from lightning_memdml.inference.sources import FromFile, data_of, input_transform, tensor_shape

    if transform is not None:
        return FromFile(transform, None)
    if learner.data_config is not None:
        config, source, trust = learner.data_config
        data = data_of(config, source, trust=trust)
        return FromFile(input_transform(data), tensor_shape(data))
    if wanted := learner.preprocessing:
        return FromFile(EvaluationTransform(**wanted), None)
    raise ValueError(
        "Expected a learner that was trained with a data module of this package, or `transform=`, but got neither. "
        "Pass `transform=`, such as `EvaluationTransform(224)` of `lightning_memdml.data.transforms`."
    )


def _embed_named(
    learner: Any, named: NamedImages, flip: bool, batch_size: int, num_workers: int, progress: bool
) -> Tensor:
    from torch.utils.data import DataLoader

    loader = DataLoader(named.images, batch_size=batch_size, num_workers=num_workers)
    return _embed_batches(learner, (batch[0] for batch in loader), len(named.images), flip, progress)


def _embed_batches(learner: Any, batches: Any, count: int, flip: bool, progress: bool) -> Tensor:
    from tqdm import tqdm

    rows = []
    with _evaluating(learner), tqdm(total=count, desc="embedding", unit="image", disable=not progress) as bar:
        for batch in batches:
            rows.append(embed_images(learner, batch.to(learner.device, learner.dtype), flip).float().cpu())
            bar.update(len(batch))
    if not rows:
        raise ValueError("Expected at least one image to embed but got none. Pass images.")
    return torch.cat(rows)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluate inside the block; every part has its mode back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for part, mode in modes:
            part.training = mode
