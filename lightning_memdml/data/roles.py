"""Which images train, validate and test, and how many there are of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_memdml.data.records import Record, Role


class Problem(NamedTuple):
    """An image that cannot be used, and why."""

    path: str
    reason: str


class Count(NamedTuple):
    """How many images of how many classes; `None` where that is not known."""

    images: int | None
    classes: int | None

    def in_words(self, role: str) -> str:
        """Return the numbers as a part of a sentence.

        Example:
            >>> Count(5864, 100).in_words("train"), Count(None, 800).in_words("test")
            ('5,864 train images of 100 classes', 'test images of 800 classes')
        """
        images, classes = ("" if number is None else f"{number:,} " for number in self)
        plural = "" if self.classes == 1 else "es"
        return f"{images}{role} images" + (f" of {classes}class{plural}" if classes else "")


def count_roles(records: Sequence[Record]) -> dict[Role, Count]:
    """Return the images and classes of each role that occurs.

    Example:
        >>> count_roles([Record("1", "a", "train"), Record("2", "a", "train"), Record("3", "b", "test")])
        {'train': Count(images=2, classes=1), 'test': Count(images=1, classes=1)}
    """
    labels: dict[Role, list[int | str]] = {}
    for record in records:
        labels.setdefault(record.role, []).append(record.label)
    return {role: Count(len(found), len(set(found))) for role, found in labels.items()}


class Rows(NamedTuple):
    """Which records each set is made of: their rows, in order."""

    train: Tensor
    val: Tensor
    query: Tensor
    gallery: Tensor


def split_rows(records: Sequence[Record], val_fraction: float) -> Rows:
    """Sort records by role, and hold out validation classes unless the data set has its own.

    Raises:
        ValueError: If a role is not one of `Role`, or too few training classes are left.

    Example:
        >>> split_rows([Record("1", "a", "train"), Record("2", "b", "test"), Record("3", "b", "test")], 0).gallery
        tensor([1, 2])
    """
    rows: dict[str, list[int]] = {role: [] for role in get_args(Role)}
    for row, record in enumerate(records):
        if record.role not in rows:
            raise ValueError(
                f"{record.path}: expected a role of {', '.join(rows)} but got {record.role!r}. Correct `records`."
            )
        rows[record.role].append(row)
    train, val = rows["train"], rows["val"]
    if not val:
        held_out = validation_classes([records[row].label for row in train], val_fraction)
        val = [row for row in train if records[row].label in held_out]
        train = [row for row in train if records[row].label not in held_out]
    query, gallery = sorted(rows["test"] + rows["query"]), sorted(rows["test"] + rows["gallery"])
    return Rows(*(torch.tensor(part, dtype=torch.long) for part in (train, val, query, gallery)))


def validation_classes(labels: Sequence[int | str], fraction: float) -> set[int | str]:
    """Return the share `fraction` of the classes, evenly spread over their order of appearance.

    No chance is in it: runs with different seeds are validated on the same classes.

    Raises:
        ValueError: If less than two classes would be left to train.

    Example:
        >>> sorted(validation_classes(range(10), 0.2))
        [2, 7]
    """
    classes = list(dict.fromkeys(labels))
    if len(classes) < 2 or not fraction:
        return set()  # the sampler refuses a single class
    count = max(2, round(fraction * len(classes)))  # with a single class, every neighbour would be right
    if len(classes) - count < 2:
        raise ValueError(
            f"Expected to keep at least 2 of the {len(classes)} training classes but val_fraction={fraction} holds out "
            f"{count} for validation; pass val_fraction=0 to train on all and validate on none."
        )
    return {classes[int((i + 0.5) * len(classes) / count)] for i in range(count)}


def require_classes(train: Tensor, others: Mapping[str, Tensor], batch_size: int, images_per_class: int) -> None:
    """Refuse a batch of more classes than are trained on, and warn of a batch that repeats the images of all.

    Args:
        train: Labels of the training images.
        others: Use of the other classes -> labels of their images.
        batch_size: Images in a batch.
        images_per_class: Of each class in a batch.

    Raises:
        ValueError: If there are too few classes.
    """
    sizes = train.unique(return_counts=True)[1]
    found, wanted, largest = len(sizes), batch_size // images_per_class, int(sizes.max())
    if largest < images_per_class:
        rank_zero_warn(
            f"Expected training classes of at least images_per_class={images_per_class} images but the largest has "
            f"{largest}: every batch repeats images. Pass images_per_class={largest} or less."
        )
    if not 2 <= found < wanted:
        return  # the sampler refuses a single class
    parts = [f"{found} train", *(f"{len(labels.unique())} {use}" for use, labels in others.items())]
    raise ValueError(
        f"Expected at most {found} classes per batch but got batch_size={batch_size} / "
        f"images_per_class={images_per_class} = {wanted}: of the classes {', '.join(parts[:-1])} and {parts[-1]}. Pass "
        f"batch_size={found * images_per_class} or less, or more images per class."
    )


def warn_of_classes(train: Tensor, query: Tensor) -> None:
    """Warn of classes that may surprise in the results.

    Args:
        train: Labels of the training images.
        query: Labels of the test images.
    """
    classes, sizes = train.unique(return_counts=True)
    if single := int((sizes == 1).sum()):
        rank_zero_warn(
            f"Training classes with one image only: {single} of {len(classes)}. The image fills all places of its "
            "class in a batch, and losses leave out pairs of an image with itself: no positive pair for these."
        )
    if shared := int(torch.isin(query.unique(), classes).sum()):
        rank_zero_warn(f"Test classes that are training classes too: {shared}. The test is not on unseen classes only.")
