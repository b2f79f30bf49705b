"""The training loader: yields the batches of a sampler that Lightning does not replace, and resumes exactly."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from lightning_memdml.compat import loader_iterator, set_loader_iterator
from lightning_memdml.data.images import draw_seeded
from lightning_memdml.data.sampler import ClassBalancedSampler, Draw

MAX_WORKERS = 16  # beyond, batches in preparation fill the memory rather than the GPU


def default_workers(ranks: int) -> int:
    """Return how many worker processes a loader has on each of the ranks of this machine: one for each CPU core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, cores // ranks))


class ClassBalancedLoader:
    """Yields the batches `(images, labels, indices)` that a `ClassBalancedSampler` draws.

    The augmentation of every draw has its own seed (`seeded`), so a batch is a function of the sampler's seed, the
    epoch and its number: equal for any number of workers or ranks, and equal after a resume. Saved in the middle of an
    epoch (Lightning puts the state into its checkpoints), it continues with the batch after the last one. A
    checkpoint written after a fit that `max_steps` ended is an exception: Lightning then asks for the next epoch.

    It is not a `torch.utils.data.DataLoader`: under DDP, Lightning 2.6 would replace the sampler of a `DataLoader`, and
    it never calls `set_epoch` of a batch sampler. `__iter__` is a generator, so that workers start at the first batch:
    Lightning makes the iterator of a resumed run before it sets the epoch.

    Args:
        data_set: Map-style data set of `(image, label, index)`. If it has a method `get_batch(positions, seeds)`, as
            `ImageDataset` has, it makes a whole batch at once.
        sampler: Draws the batches. Lightning calls its `set_epoch`.
        num_workers: Worker processes that open and transform images; 0 does it in the training process.
        pin_memory: Whether batches go to page-locked memory, from where a GPU copies them faster.

    Example:
        >>> from lightning_memdml.data.images import TensorImageDataset
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> blank = TensorImageDataset(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), list("abcd"), labels, None)
        >>> loader = ClassBalancedLoader(blank, ClassBalancedSampler(labels, batch_size=4, images_per_class=2))
        >>> [(tuple(images.shape), sorted(indices.tolist())) for images, labels, indices in loader]
        [((4, 1, 8, 8), [0, 1, 2, 3])]
    """

    def __init__(
        self,
        data_set: Dataset[Any],
        sampler: ClassBalancedSampler,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.data_set = data_set  # were it `dataset`, Lightning's `overfit_batches` would take this for a `DataLoader`
        self.sampler = sampler
        self._handed_out = (0, 0)
        self._loader: DataLoader[Any] = DataLoader(
            _BatchDataset(data_set),
            batch_sampler=sampler,
            collate_fn=_unchanged,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # it would draw the workers' seeds from the global one
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        first = self.sampler.first_batch + 1
        for count, batch in enumerate(self._loader, first):
            self._handed_out = (self.sampler.epoch, count)
            yield batch

    @property
    def _iterator(self) -> Any:
        """The iterator that owns the workers.

        At the end of a run Lightning stops the workers through it, as those of a `DataLoader`. The garbage collector
        would wait 5 s for each.
        """
        return loader_iterator(self._loader)

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        set_loader_iterator(self._loader, iterator)

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches handed out so far."""
        epoch, count = self._handed_out
        return {
            "epoch": self.sampler.epoch,
            "batch": count if epoch == self.sampler.epoch else self.sampler.first_batch,
            "global_batch_size": self.sampler.global_batch_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the last batch of a saved loader.

        With another global batch size the batches differ, so the new run continues at the same share of the epoch.
        """
        batch, saved, now = state["batch"], state["global_batch_size"], self.sampler.global_batch_size
        if saved != now:
            rank_zero_warn(
                f"The checkpoint was written with a global batch of {saved} images and is resumed with {now}: "
                "the rest of this epoch is approximate."
            )
            batch = batch * saved // now
        self.sampler.epoch = state["epoch"]
        self.sampler.first_batch = min(batch, len(self.sampler))
        self._handed_out = (state["epoch"], self.sampler.first_batch)


class _BatchDataset(Dataset[Any]):
    """Gives torch's loader a whole batch for a list of draws."""

    def __init__(self, data_set: Dataset[Any]) -> None:
        self.data_set = data_set

    def __getitems__(self, draws: Sequence[Draw]) -> Any:
        positions, seeds = zip(*draws, strict=True)
        get_batch = getattr(self.data_set, "get_batch", None)
        if get_batch is not None:
            return get_batch(positions, seeds)
        return draw_seeded(self.data_set, positions, seeds)


def _unchanged(batch: Any) -> Any:
    """Return a batch as it is (spawned workers cannot receive a lambda)."""
    return batch
