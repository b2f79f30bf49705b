"""The cells of a retrieval gallery, before they become a figure or a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from lightning_memdml.retrieval.examples import Neighbour, RetrievalExample

ImageSource = Callable[[int], Any]
"""Returns a picture by its position: PIL, array `(H, W)` or `(H, W, C)`, tensor `(C, H, W)`; uint8 or in [0, 1]."""
ClassNames = Mapping[int, str] | Sequence[str] | None
Kind = Literal["query", "right", "wrong", "found"]
_MARKS: dict[bool | None, tuple[Kind, str]] = {True: ("right", "✓ "), False: ("wrong", "✗ "), None: ("found", "")}


@dataclass(frozen=True)
class Cell:
    """One picture of a gallery with its caption.

    Attributes:
        kind: A query, or a reference: right, wrong, or found for a query of unknown class.
        picture: RGB.
        name: Name of its class.
        facts: Of a reference: a tick or a cross, which mark right and wrong without colour, and the similarity. For a
            query of unknown class there is no mark.
        rank: Rank of the first right reference where no neighbour is right, such as "rank 57"; otherwise empty.
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
    """Return a row for each example: the query, its neighbours, and the first right reference if none of them is.

    Raises:
        ValueError: If there is no example.
    """
    if not examples:
        raise ValueError(
            "Expected at least one example to show but got none: no query has a match, or `count` is 0. Pass a larger "
            "`count`, or queries whose class is in the gallery."
        )
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
    """Return an RGB picture of an image in one of the forms of `ImageSource`.

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
        raise TypeError(f"Expected a PIL image, an array or a tensor but got {type(image).__name__}. Convert it.")
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.ndim != 2 and not (image.ndim == 3 and image.shape[2] in (3, 4)):
        raise ValueError(
            f"Expected a picture (H, W), (H, W, C) or tensor (C, H, W) but got shape {image.shape}. "
            "Pass one image of 1, 3 or 4 channels."
        )
    if image.dtype != np.uint8:
        image = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(image).convert("RGB")


def name_of(label: int | None, class_names: ClassNames) -> str:
    """Return the name of a label's class, or `class <label>` where there is no name."""
    if label is None:
        return "query"
    named = class_names if isinstance(class_names, Mapping) else dict(enumerate(class_names or ()))
    return named.get(label, f"class {label}")
