"""What a retrieval gallery shows, cell by cell, before it becomes a figure or a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from lightning_memdml.retrieval.examples import Neighbour, RetrievalExample

ImageSource = Callable[[int], Any]
"""Gives a picture by its position: PIL, array `(H, W)` or `(H, W, C)`, tensor `(C, H, W)`; uint8 or in [0, 1]."""
ClassNames = Mapping[int, str] | Sequence[str] | None
Kind = Literal["query", "right", "wrong", "found"]
_MARKS: dict[bool | None, tuple[Kind, str]] = {True: ("right", "✓ "), False: ("wrong", "✗ "), None: ("found", "")}


@dataclass(frozen=True)
class Cell:
    """One picture of a gallery with its words.

    Attributes:
        kind: A query, or a reference: right, wrong, or found for a query whose class nobody knows.
        picture: RGB.
        name: Of its class.
        facts: Of a reference: a tick or a cross, which tell right from wrong without colour, and the similarity.
            A query of unknown class has neither.
        rank: Of the first right reference where no neighbour is right, such as "rank 57"; otherwise empty.
    """

    kind: Kind
    picture: Image.Image
    name: str
    facts: str = ""
    rank: str = ""


def gallery_rows(
    examples: Sequence[RetrievalExample],
    image: ImageSource,
    gallery_image: ImageSource | None,
    class_names: ClassNames,
) -> list[list[Cell]]:
    """A row for each example: the query, its neighbours, and the first right reference if none of them is.

    Raises:
        ValueError: If there is no example.
    """
    if not examples:
        raise ValueError("There is nothing to show: no query has a match, or `count` is 0.")
    return [list(_cells(example, image, gallery_image or image, class_names)) for example in examples]


def _cells(
    example: RetrievalExample, image: ImageSource, gallery_image: ImageSource, class_names: ClassNames
) -> Iterator[Cell]:
    def reference(neighbour: Neighbour, rank: str = "") -> Cell:
        kind, mark = _MARKS[neighbour.right]
        picture, name = as_picture(gallery_image(neighbour.position)), name_of(neighbour.label, class_names)
        return Cell(kind, picture, name, f"{mark}{neighbour.similarity:.2f}", rank)

    yield Cell("query", as_picture(image(example.position)), example.name or name_of(example.label, class_names))
    yield from map(reference, example.neighbours)
    if example.best_match is not None and not any(neighbour.right for neighbour in example.neighbours):
        beyond = example.best_rank > example.depth
        yield reference(example.best_match, f"rank > {example.depth}" if beyond else f"rank {example.best_rank}")


def as_picture(image: Any) -> Image.Image:
    """An RGB picture from what data sets give: see `ImageSource`.

    Raises:
        TypeError: If it is neither a PIL image nor an array or tensor.
        ValueError: If the shape is not that of a picture.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, Tensor):
        image = image.detach().cpu().float().numpy() if image.is_floating_point() else image.cpu().numpy()
        image = np.moveaxis(image, 0, -1) if image.ndim == 3 else image
    if not isinstance(image, np.ndarray):
        raise TypeError(f"Expected a PIL image, an array or a tensor, got {type(image).__name__}.")
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.ndim != 2 and not (image.ndim == 3 and image.shape[2] in (3, 4)):
        raise ValueError(f"Expected a picture (H, W), (H, W, C) or tensor (C, H, W), got shape {image.shape}.")
    if image.dtype != np.uint8:
        image = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(image).convert("RGB")


def name_of(label: int | None, class_names: ClassNames) -> str:
    """Name of a label's class, as far as there is one."""
    if label is None:
        return "query"
    named = class_names if isinstance(class_names, Mapping) else dict(enumerate(class_names or ()))
    return named.get(label, f"class {label}")
