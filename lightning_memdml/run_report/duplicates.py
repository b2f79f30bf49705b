"""Pictures of a data set that look the same, found by their pixels and not by a trained network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 16  # of the thumbnails that are compared, in pixels
ALIKE = 0.99  # smallest correlation of two thumbnails that are reported
MOST_PICTURES = 3000  # that are opened for it


class Pair(NamedTuple):
    """Two pictures that look the same.

    Attributes:
        first: Number of the set and position in it.
        second: The other picture.
        correlation: Of their thumbnails, at most 1.
    """

    first: tuple[int, int]
    second: tuple[int, int]
    correlation: float


def near_duplicates(sets: Sequence[Any]) -> tuple[list[Pair], int]:
    """Return pairs of pictures whose grey thumbnails of 16 x 16 pixels correlate by at least 0.99, most alike first.

    Args:
        sets: Data sets with `picture(position)`. Of more than 3,000 pictures, evenly spaced ones are opened.

    Returns:
        The pairs, and the number of pictures that were compared.
    """
    places = [(number, position) for number, images in enumerate(sets) for position in range(len(images))]
    if len(places) > MOST_PICTURES:
        places = [places[int(row)] for row in np.linspace(0, len(places) - 1, MOST_PICTURES)]
    if not places:
        return [], 0
    rows = torch.stack([_thumbnail(sets[number].picture(position)) for number, position in places])
    similarity = torch.triu(rows @ rows.T, diagonal=1)
    first, second = (similarity >= ALIKE).nonzero(as_tuple=True)
    pairs = [
        Pair(places[a], places[b], float(similarity[a, b]))
        for a, b in zip(first.tolist(), second.tolist(), strict=True)
    ]
    return sorted(pairs, key=lambda pair: -pair.correlation), len(places)


def _thumbnail(picture: Any) -> Tensor:
    """Return centred grey pixels of length 1; zeros for a picture of one colour, which equals no other."""
    pixels = np.asarray(picture.convert("L").resize((SIDE, SIDE)), dtype=np.float32).ravel()
    return F.normalize(torch.from_numpy(pixels - pixels.mean()), dim=0)
