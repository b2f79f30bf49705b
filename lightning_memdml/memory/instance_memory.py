"""A memory with one row per image, which follows the image's embeddings with a momentum of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_memdml.checks import check_types
from lightning_memdml.memory.embedding_memory import TableMemory
from lightning_memdml.memory.momentum_encoder import check_momentum
from lightning_memdml.memory.rows import INDEX, UNKNOWN_INDEX, MemoryRows, NewRows, Storage, unit_rows


class InstanceMemory(TableMemory):
    r"""One row per image of the data set, updated in place (Wu et al. 2018, arXiv 1805.01978).

    $$
    r \leftarrow \frac{m r + (1 - m) x}{|m r + (1 - m) x|}
    $$

    Here the rows have the momentum; with a `MomentumEncoder` the network that writes them has it. No image has two
    rows, however long the memory. A row is as old as the last visit to its image, about an epoch at most.

    It has the interface of `EmbeddingMemory`, except that `enqueue` needs indices, and rows are read in the order in
    which their images were first seen. `read()` costs nothing: rows stand one after the other in that order, and a
    table of `size` integers holds the slot of each image. In all `size * (D * bytes_per_number + 32)` bytes.

    Args:
        size: Images of the data set; indices are in `[0, size)`. None: those of the training set, which
            `MemoryCallback` finds out.
        momentum: The $m$ of the formula, in [0, 1). At 0 a row is the image's latest embedding.
        dtype: How embeddings are stored, see `EmbeddingMemory`. They are averaged and normalised in float32.

    Attributes:
        steps: `(M,)` int64, for each row the `step` given when it was last updated.
        batches: Calls of `enqueue` so far.
        dropped: Rows refused so far because they had no direction (NaN, infinite or zero).
        was_read: Whether `read` was called since `reset`.

    Raises:
        ValueError: If `size` is below 1 or `momentum` out of range.
        TypeError: If `size` is not a whole number, or `dtype` not floating point.

    Example:
        >>> memory = InstanceMemory(size=10, momentum=0.5)
        >>> for embedding in ([[1.0, 0.0]], [[0.0, 1.0]]):
        ...     _ = memory.enqueue(torch.tensor(embedding), torch.tensor([3]), torch.tensor([7]))
        >>> embeddings, labels, indices = memory.read()
        >>> embeddings
        tensor([[0.7071, 0.7071]])
    """

    _slot_of_image: np.ndarray  # on the host, which decides where rows go
    #: What `read_with` replaced: slots, their rows before, and the images that had no row.
    _replaced: tuple[np.ndarray, NewRows, np.ndarray] | None

    def __init__(self, size: int | None = None, momentum: float = 0.5, dtype: Storage = torch.float32) -> None:
        check_types(InstanceMemory.__init__, locals())
        check_momentum("momentum", momentum)
        self.momentum = momentum
        super().__init__(size, dtype)

    @torch.compiler.disable  # it writes into the table
    def read_with(self, embeddings: Tensor, labels: Tensor, indices: Tensor | None) -> MemoryRows:
        """Return what `read` would return if these rows had been enqueued, without enqueueing them.

        The rows of the batch's images are replaced in the table, and put back before anything else is done with it: no
        other row is copied.

        Args:
            embeddings: `(B, D)` of unit length.
            labels: `(B,)`.
            indices: `(B,)`.

        Raises:
            ValueError: If there are no indices.
        """
        if indices is None:
            raise ValueError(
                "Expected the index of each image to read an InstanceMemory with the batch in it but got none. Its one "
                "row per image is the image's own: leave `memory_excludes_own_image=False` out, and let the data set "
                "return (image, label, index)."
            )
        self._put_back()
        self.was_read = True
        if len(self) == 0:
            other = InstanceMemory(self.size, self.momentum, self._table.storage)
            other.enqueue(embeddings, labels, indices)
            return other.read()
        with torch.inference_mode(False), torch.no_grad():
            metadata = torch.stack([labels, indices, torch.full_like(labels, self.batches)])
            new = NewRows(embeddings.detach().float(), metadata, metadata[:2].cpu().numpy(), dropped=0)
            self._check_indices(new.ids[INDEX])
            images, valid, table = np.unique(new.ids[INDEX]), self._table.valid, self._table
            places = self._slot_of_image[images]
            slots = places[places >= 0]
            on_device = table.on_device(slots)
            before = NewRows(table.embeddings[on_device], table.metadata[:, on_device], table.ids[:, slots].copy(), 0)
            counts, self._counts = self._counts, None
            self._store(new)
            rows, self._counts = table.rows, counts
            table.show(valid)
            self._replaced = slots, before, images[places < 0]
        if rows.bounds is not None:
            rows.bounds = tuple(bound + len(labels) for bound in rows.bounds)
        return rows

    def _put_back(self) -> None:
        """Undo what `read_with` did to the table."""
        if self._replaced is not None:
            slots, before, new_images = self._replaced
            self._replaced = None
            self._table.write(slots, before, self._table.valid)
            self._slot_of_image[new_images] = -1

    def read(self) -> MemoryRows:
        """Return the rows, as `TableMemory.read`."""
        self._put_back()
        return super().read()

    def state_dict(self) -> dict[str, Any]:
        """Return rows and counters, as `TableMemory.state_dict`."""
        self._put_back()
        return super().state_dict()

    def __repr__(self) -> str:
        """Return size, fill, momentum, dimension and place."""
        return (
            f"InstanceMemory(size={self.size}, rows={len(self)}, momentum={self.momentum}, dim={self.dim}, "
            f"dtype={self.dtype}, device={str(self.device)!r})"
        )

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return super().nbytes + self._slot_of_image.nbytes

    def to(self, device: torch.device | str) -> TableMemory:
        """Move the rows to a device; nothing happens if they are there."""
        self._put_back()
        return super().to(device)

    def _slots_needed(self) -> int:
        return self.size or 0

    def _allocate(self, dim: int) -> None:
        self._replaced = None
        super()._allocate(dim)
        self._slot_of_image = np.full(len(self._table.embeddings), -1)

    def _store(self, new: NewRows) -> None:
        """Update the rows of the images; an image that is there several times updates its row as often."""
        self._put_back()
        self._check_indices(new.ids[INDEX])
        if self._table.embeddings.shape[1] == 0:
            self._allocate(new.embeddings.shape[1])
        for once in _without_repeats(new.ids[INDEX]):
            self._update(new.select(once))

    def _update(self, new: NewRows) -> None:
        """Update the rows of images that are all different."""
        places = self._slot_of_image[new.ids[INDEX]]
        known, slots = new.select((places >= 0).nonzero()[0]), places[places >= 0]
        rows = self._table.embeddings[self._table.on_device(slots)].float()
        mixed, usable = unit_rows(self.momentum * rows + (1 - self.momentum) * known.embeddings)
        # Opposite rows may leave nothing; the newer one is the better guess.
        mixed = torch.where(usable[:, None], mixed, known.embeddings)
        leaving = self._table.ids[:, slots].copy()
        self._table.write(slots, known._replace(embeddings=mixed), self._table.valid)
        self._count(known.ids, leaving)
        self._append(new.select((places < 0).nonzero()[0]))

    def _append(self, new: NewRows) -> None:
        """Add the rows of images that have none."""
        slots = slice(len(self), len(self) + len(new.embeddings))
        self._slot_of_image[new.ids[INDEX]] = np.arange(slots.start, slots.stop)
        self._table.write(slots, new, slice(0, slots.stop))
        self._count(new.ids)

    def _check_indices(self, indices: np.ndarray) -> None:
        """Raise a `ValueError` unless every row is of one of the images."""
        if self.size is None:
            raise ValueError(
                "Expected InstanceMemory to have a `size` but got None: it is not known how many images there are. "
                "Pass `size=`, the length of the training set, which `MemoryCallback` finds only if the set has one."
            )
        if len(indices) == 0 or (indices.min() >= 0 and indices.max() < self.size):
            return
        if (indices == UNKNOWN_INDEX).all():
            raise ValueError(
                "Expected `indices`, which image each row is of, for InstanceMemory but got none. Let the data set "
                'return the index of each image, and end `training_step` with `return {"loss": loss, "embeddings": z, '
                '"labels": y, "indices": indices}`.'
            )
        raise ValueError(
            f"Expected `indices` in [0, {self.size}), one for each image of the training set, but got "
            f"{int(indices.min())} to {int(indices.max())}. Pass `size=`, one more than the largest index, and give "
            "the index of every image on every rank."
        )

    def _restore(self, state: dict[str, Any], embeddings: Tensor, metadata: Tensor) -> None:
        """Take the rows of images below `size`."""
        indices = metadata[INDEX]
        if "offset" in state or (indices < 0).any() or len(indices.unique()) < len(indices):
            raise ValueError(
                "Expected the state of an InstanceMemory, with one row per image, but got that of another memory. "
                "Resume with the memory that the checkpoint was written with, or start without its state."
            )
        if self.size is None and len(indices):
            self.size = int(indices.max()) + 1
        inside = indices < (self.size or 0)
        self.reset()
        self._allocate(embeddings.shape[1])
        metadata = metadata[:, inside]
        self._append(NewRows(embeddings[inside], metadata, metadata[:2].cpu().numpy(), 0))


def _without_repeats(indices: np.ndarray) -> list[np.ndarray]:
    """Split positions into groups without a repeated index: the first of each index, the second, and so on."""
    order = np.argsort(indices, kind="stable")
    _, starts, counts = np.unique(indices[order], return_index=True, return_counts=True)
    occurrence = np.empty_like(order)
    occurrence[order] = np.arange(len(order)) - np.repeat(starts, counts)
    return [(occurrence == repeat).nonzero()[0] for repeat in range(counts.max(initial=0))]
