"""Class-balanced batches: the same on any number of ranks, and resumable at any batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_memdml.checks import check_count, check_types

BATCH_SIZE = 64  # where none is set


class Draw(NamedTuple):
    """One image of a batch.

    Attributes:
        position: Its position in the data set.
        seed: Seed of its augmentation, different for every draw of a run.
    """

    position: int
    seed: int


class ClassBalancedSampler:
    """Draws batches of `batch_size / images_per_class` classes with `images_per_class` images each.

    One **pass** contains every image at least once. The images of a class are shuffled and split into groups of
    `images_per_class`. If the last group is too short, it is filled with other images of the class. A class with fewer
    images than a group repeats them evenly; the losses leave out pairs of equal indices. A batch takes its groups from
    different classes, each with a probability proportional to the groups that it has left. If one class has more groups
    than there are batches for the others, the others are drawn again. No class and no image is dropped.

    Batch `b` of epoch `e` depends on `(seed, e, b)` and the global batch size only. On `W` ranks the global batch of
    `W * batch_size` images is the batch that one rank would draw with that batch size, and rank `r` gets its `r`-th
    part. If the global batch has more groups than there are classes, classes repeat in it as little as possible.

    Args:
        labels: Class of each image `(N,)`.
        batch_size: Images per batch on each rank; a multiple of `images_per_class`.
        images_per_class: Images of each class in a batch.
        seed: Seed of all draws, 0 or more.
        batches_per_epoch: Length of an epoch; by default one pass. A pass continues in the next epoch, so short epochs
            contain every image too.
        rank: Rank to draw for. By default rank and world size are those of `torch.distributed` when a batch is drawn;
            before, there may be no process group.
        world_size: Number of ranks; goes with `rank`.
        same_every_epoch: Draw the batches of the first epoch in every epoch, with the same augmentation, to test
            whether a network can learn them (`Trainer(overfit_batches=)`).

    Raises:
        ValueError: If there is only one class, a batch needs more classes than there are, or `batch_size` is
            no multiple of `images_per_class`.

    Example:
        >>> sampler = ClassBalancedSampler(torch.tensor([0, 0, 0, 1, 1, 2]), batch_size=4, images_per_class=2)
        >>> len(sampler)  # two groups of class 0, one of each other class
        2
        >>> len(sampler.batch(0)), sampler.batch(0) == sampler.batch(0)
        (4, True)
    """

    def __init__(
        self,
        labels: Tensor,
        batch_size: int,
        images_per_class: int = 4,
        seed: int = 0,
        batches_per_epoch: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        same_every_epoch: bool = False,
    ) -> None:
        check_types(ClassBalancedSampler.__init__, locals())
        check_batch(batch_size, images_per_class, seed, batches_per_epoch)
        if (rank is None) != (world_size is None) or (rank is not None and not 0 <= rank < (world_size or 0)):
            raise ValueError(
                f"Expected 0 <= `rank` < `world_size`, or neither, but got {rank} and {world_size}. Leave both out."
            )
        _, sizes = torch.unique(labels, return_counts=True)
        check_classes(len(sizes), batch_size, images_per_class)
        self._images_of_class = [part.numpy() for part in torch.argsort(labels, stable=True).split(sizes.tolist())]
        self._groups = -(-sizes.numpy() // images_per_class)
        self.batch_size = batch_size
        self.images_per_class = images_per_class
        self.seed = seed
        self.batches_per_epoch = batches_per_epoch
        self.epoch = 0
        self.first_batch = 0
        self.same_every_epoch = same_every_epoch
        self._placement = None if rank is None or world_size is None else (rank, world_size)
        self._plan: tuple[tuple[int, int], np.ndarray] | None = None

    @property
    def rank(self) -> int:
        """The rank for which batches are drawn."""
        return self._placement[0] if self._placement else _distributed()[0]

    @property
    def global_batch_size(self) -> int:
        """Images per batch, over all ranks."""
        return self.batch_size * (self._placement[1] if self._placement else _distributed()[1])

    @property
    def batches_per_pass(self) -> int:
        """Batches of one pass."""
        slots = self.global_batch_size // self.images_per_class
        return count_batches(share_groups(self._groups, slots), slots)

    def __len__(self) -> int:
        return self.batches_per_pass if self.batches_per_epoch is None else self.batches_per_epoch

    def set_epoch(self, epoch: int) -> None:
        """Draw the batches of `epoch` from now on: a resumed epoch from `first_batch` on, any other from its start."""
        if epoch != self.epoch:
            self.epoch, self.first_batch = epoch, 0

    def batch(self, number: int) -> list[Draw]:
        """Return this rank's draws of batch `number` of the current epoch."""
        step = number if self.same_every_epoch else self.epoch * len(self) + number
        which_pass, row = divmod(step, self.batches_per_pass)
        positions = self._pass(which_pass)[row]
        seeds = np.random.default_rng((self.seed, step, 1)).integers(2**63 - 1, size=len(positions))
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        return [Draw(*draw) for draw in zip(positions[mine].tolist(), seeds[mine].tolist(), strict=True)]

    def __iter__(self) -> Iterator[list[Draw]]:
        first, self.first_batch = self.first_batch, 0
        for number in range(first, len(self)):
            yield self.batch(number)

    def _pass(self, number: int) -> np.ndarray:
        """Return the positions of the global batches of one pass. The last one is cached: drawing takes a while."""
        key = (number, self.global_batch_size)
        if self._plan is None or self._plan[0] != key:
            generator = np.random.default_rng((self.seed, number, 0))
            groups_per_batch = self.global_batch_size // self.images_per_class
            self._plan = key, plan_pass(self._images_of_class, groups_per_batch, self.images_per_class, generator)
        return self._plan[1]


def check_batch(batch_size: int, images_per_class: int, seed: int, batches_per_epoch: int | None) -> None:
    """Raise a `ValueError` unless a batch can be split into groups of `images_per_class`."""
    check_count("images_per_class", images_per_class)
    if batch_size < 1 or batch_size % images_per_class:
        below = batch_size // images_per_class * images_per_class
        near = " or ".join(str(size) for size in (below, below + images_per_class) if size > 0)
        raise ValueError(
            "Expected `batch_size` to be a multiple of `images_per_class`, both positive, but got "
            f"batch_size={batch_size} and images_per_class={images_per_class}. Pass batch_size={near}."
        )
    if seed < 0:
        raise ValueError(f"Expected `seed` of at least 0 but got {seed}. Pass 0, for example.")
    if batches_per_epoch is not None and batches_per_epoch < 1:
        raise ValueError(
            f"Expected `batches_per_epoch` of at least 1, or None for one pass, but got {batches_per_epoch}. Leave it "
            "out."
        )


def feasible_batch(batch_size: int, images_per_class: int, classes: int) -> int:
    """Return the largest batch of at most `batch_size` that can be made of whole groups of distinct classes.

    Example:
        >>> feasible_batch(30, images_per_class=4, classes=10), feasible_batch(64, 4, classes=10)
        (28, 40)
    """
    return images_per_class * min(max(1, batch_size // images_per_class), classes)


def check_classes(classes: int, batch_size: int, images_per_class: int) -> None:
    """Raise a `ValueError` unless there are enough classes for one batch of distinct ones."""
    if classes < 2:
        raise ValueError(
            f"Expected at least 2 training classes but got {classes}: without another class there is no negative. Add "
            "images of other classes."
        )
    if batch_size // images_per_class > classes:
        raise ValueError(
            f"Expected at most {classes} classes per batch, the number of training classes, but got "
            f"batch_size={batch_size} / images_per_class={images_per_class} = {batch_size // images_per_class}. "
            f"Pass batch_size={classes * images_per_class} or less, or more images per class."
        )


def share_groups(groups: np.ndarray, slots: int) -> np.ndarray:
    """Divide the groups of each class among its lanes, and return the number of groups of every lane.

    A batch takes at most one group of a lane. With one lane per class, the classes of a batch are different. Only if a
    batch has more slots than there are classes, each class has several lanes.
    """
    lanes = -(-slots // len(groups))
    return ((groups[:, None] + np.arange(lanes)) // lanes).ravel()


def count_batches(groups: np.ndarray, slots: int) -> int:
    """Return the number of batches, each of `slots` different lanes, that contain `groups` groups of each lane."""
    return max(-(-int(groups.sum()) // slots), int(groups.max()))


def plan_pass(
    images_of_class: Sequence[np.ndarray], slots: int, images_per_class: int, generator: np.random.Generator
) -> np.ndarray:
    """Return the batches of one pass, `(batches, slots * images_per_class)`: positions of images, group by group."""
    needed = np.array([-(-len(images) // images_per_class) for images in images_of_class])
    left = share_groups(needed, slots)
    batches = count_batches(left, slots)
    left = _fill(left, batches, batches * slots, generator)
    drawn = left.reshape(len(needed), -1).sum(axis=1)
    groups = np.concatenate(
        [
            _cut(images, count, extra, images_per_class, generator)
            for images, count, extra in zip(images_of_class, needed, drawn - needed, strict=True)
        ]
    )
    next_group = np.cumsum(left) - left
    plan = np.empty((batches, slots), dtype=np.int64)
    for batch in range(batches):
        lanes = _choose(left, batches - batch, slots, generator)
        plan[batch] = next_group[lanes]
        next_group[lanes] += 1
        left[lanes] -= 1
    return groups[plan].reshape(batches, -1)


def _fill(groups: np.ndarray, batches: int, total: int, generator: np.random.Generator) -> np.ndarray:
    """Add groups to random lanes, evenly and none above `batches`, until their sum is `total`."""
    groups = groups.copy()
    while (missing := total - int(groups.sum())) > 0:
        groups[generator.permutation(np.flatnonzero(groups < batches))[:missing]] += 1
    return groups


def _cut(images: np.ndarray, count: int, extra: int, size: int, generator: np.random.Generator) -> np.ndarray:
    """Return `count` groups that contain all `images`, and `extra` further groups, `(count + extra, size)`.

    Groups are consecutive parts of a repeated random order of the images. So a group repeats an image only if the class
    has fewer than `size` images, and then evenly.
    """
    cycles = [np.resize(generator.permutation(images), number * size) for number in (count, extra)]
    return np.concatenate(cycles).reshape(-1, size)


def _choose(left: np.ndarray, batches: int, slots: int, generator: np.random.Generator) -> np.ndarray:
    """Draw `slots` different lanes for the next of `batches` batches, in proportion to the groups they have `left`.

    A lane with as many groups left as there are batches left is always chosen. So no lane ever has more groups than
    batches, and since `left` sums to `batches * slots`, there are always enough lanes.
    """
    with np.errstate(divide="ignore"):  # log(0): an empty lane is never chosen
        # Gumbel keys: the lanes with the largest keys are a weighted sample without replacement.
        keys = np.log(left) + generator.gumbel(size=len(left))
    keys[left == batches] = np.inf
    return generator.permutation(np.argpartition(-keys, slots - 1)[:slots])


def _distributed() -> tuple[int, int]:
    """Return rank and world size of the process group, or those of a single process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
