"""The training loader: yields the batches of a sampler that Lightning does not replace, and resumes exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from lightning_memdml.data.images import draw_seeded
from lightning_memdml.data.sampler import ClassBalancedSampler, Draw


class ClassBalancedLoader:
    """Yields the batches `(images, labels, indices)` that a `ClassBalancedSampler` draws.

    The augmentation of every draw has its own seed (`seeded`), so a batch is a function of the sampler's seed, the
    epoch and its number: equal for any number of workers or ranks, and equal after a resume. Saved in the middle of an
    epoch (Lightning puts the state into its checkpoints), it goes on with the batch after the last one handed out.

    It is no `torch.utils.data.DataLoader` on purpose. Under DDP, Lightning 2.6 would replace the sampler of one, and
    never calls `set_epoch` of a batch sampler; another iterable it leaves alone. `__iter__` is a generator, so that
    workers start at the first batch: Lightning makes the iterator of a resumed run before it sets the epoch.

    Args:
        data_set: Map-style data set of `(image, label, index)`. If it has a method `draw(positions, seeds)` that makes
            a whole batch, as `ImageDataset` has, that is asked.
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
            _Drawn(data_set),
            batch_sampler=sampler,
            collate_fn=_as_it_is,
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

        At the end of a run Lightning stops them through it, as those of a `DataLoader`. The garbage collector would
        wait 5 s for each.
        """
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self._loader._iterator = iterator

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches handed out so far."""
        epoch, count = self._handed_out
        return {
            "epoch": self.sampler.epoch,
            "batch": count if epoch == self.sampler.epoch else self.sampler.first_batch,
            "global_batch_size": self.sampler.global_batch_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the last batch of a saved loader.

        With another global batch size the batches are others, so the new run goes on at the same share of the epoch.
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


class _Drawn(Dataset[Any]):
    """Lets torch's loader fetch a list of draws as one batch."""

    def __init__(self, data_set: Dataset[Any]) -> None:
        self.data_set = data_set

    def __getitems__(self, draws: Sequence[Draw]) -> Any:
        positions, seeds = zip(*draws, strict=True)
        if hasattr(self.data_set, "draw"):
            return self.data_set.draw(positions, seeds)
        return draw_seeded(self.data_set, positions, seeds)


def _as_it_is(batch: Any) -> Any:
    """Pass on what is a batch already (a lambda could not be sent to spawned workers)."""
    return batch
