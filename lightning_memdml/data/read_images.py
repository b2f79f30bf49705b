"""The images that a data module has read, which other modules of the same images can use."""

from __future__ import annotations

from typing import NamedTuple

from lightning_memdml.data.images import ImageDataset
from lightning_memdml.data.records import Role
from lightning_memdml.data.roles import Count, Rows


class ReadImages(NamedTuple):
    """The images of a data module, of all roles and before any transform.

    Nothing in it depends on the seed, the batches or the transforms of the module.

    Attributes:
        images: All images.
        cached: The same, through the pixel cache if there is one.
        rows: The images of each role.
        classes: What the data set calls the class of each label.
        counts: Images and classes of each role.
    """

    images: ImageDataset
    cached: ImageDataset
    rows: Rows
    classes: list[int | str]
    counts: dict[Role, Count]
