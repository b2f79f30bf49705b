"""A memory with one row per image, which follows the image's embeddings with a momentum of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_memdml.memory.embedding_memory import TableMemory
from lightning_memdml.memory.momentum_encoder import check_momentum
from lightning_memdml.memory.rows import INDEX, UNKNOWN_INDEX, MemoryRows, unit_rows


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
        dtype: How embeddings are stored, a floating-point dtype. They are averaged and normalised in float32.

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

    _slot_of_image: Tensor

    def __init__(self, size: int | None = None, momentum: float = 0.5, dtype: torch.dtype = torch.float32) -> None:
        check_momentum("momentum", momentum)
        self.momentum = momentum
        super().__init__(size, dtype)

    def read_with(self, embeddings: Tensor, labels: Tensor, indices: Tensor | None) -> MemoryRows:
        """Return what `read` would return if these rows had been enqueued, without enqueueing them: copies.

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
        self.was_read = True
        other = InstanceMemory(self.size, self.momentum, self.dtype)
        other._table.embeddings = self._table.embeddings.clone()
        other._table.metadata = self._table.metadata.clone()
        other._slot_of_image = self._slot_of_image.clone()
        other._table.show(self._table.valid)
        other.enqueue(embeddings, labels, indices)
        return other.read()

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
        self._slot_of_image = self._slot_of_image.to(device)
        return super().to(device)

    def _slots_needed(self) -> int:
        return self.size or 0

    def _allocate(self, dim: int) -> None:
        super()._allocate(dim)
        self._slot_of_image = torch.full((len(self._table.embeddings),), -1, dtype=torch.int64, device=self.device)

    def _store(self, embeddings: Tensor, metadata: Tensor) -> None:
        """Update the rows of the images; an image that is there several times updates its row as often."""
        self._check_indices(metadata[INDEX])
        if self._table.embeddings.shape[1] == 0:
            self._allocate(embeddings.shape[1])
        for once in _without_repeats(metadata[INDEX]):
            self._update(embeddings[once], metadata[:, once])

    def _update(self, embeddings: Tensor, metadata: Tensor) -> None:
        """Update the rows of images that are all different."""
        slots = self._slot_of_image[metadata[INDEX]]
        seen = slots >= 0
        slots, known = slots[seen], embeddings[seen]
        mixed, usable = unit_rows(self.momentum * self._table.embeddings[slots].float() + (1 - self.momentum) * known)
        # Opposite rows may leave nothing; the newer one is the better guess.
        mixed = torch.where(usable[:, None], mixed, known)
        self._table.embeddings[slots], self._table.metadata[:, slots] = mixed.to(self.dtype), metadata[:, seen]
        self._append(embeddings[~seen], metadata[:, ~seen])

    def _append(self, embeddings: Tensor, metadata: Tensor) -> None:
        """Add the rows of images that have none."""
        new = slice(len(self), len(self) + len(embeddings))
        self._table.embeddings[new], self._table.metadata[:, new] = embeddings, metadata
        self._slot_of_image[metadata[INDEX].to(self.device)] = torch.arange(new.start, new.stop, device=self.device)
        self._table.show(slice(0, new.stop))

    def _check_indices(self, indices: Tensor) -> None:
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
        self._append(embeddings[inside], metadata[:, inside])


def _without_repeats(indices: Tensor) -> list[Tensor]:
    """Split positions into groups without a repeated index: the first of each index, the second, and so on."""
    order = torch.argsort(indices, stable=True)
    counts = torch.unique_consecutive(indices[order], return_counts=True)[1]
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    occurrence = torch.empty_like(order)
    occurrence[order] = torch.arange(len(order), device=order.device) - starts
    repeats = int(counts.max()) if len(counts) else 0
    return [(occurrence == repeat).nonzero().flatten() for repeat in range(repeats)]
