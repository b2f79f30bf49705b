"""What the memories over a table of rows share, and the FIFO memory of cross-batch training."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_memdml.memory.protocol import Memory
from lightning_memdml.memory.rows import COLUMNS, TENSORS, UNKNOWN_INDEX, MemoryRows, RowTable, as_rows, unit_rows
from lightning_memdml.memory.validation import check_size, check_state, check_storage


class TableMemory(Memory):
    """A memory over a `RowTable`. A subclass decides only in which slots rows are.

    It defines `_store`, `_slots_needed` and `_restore`.

    A deep copy of a module that holds the memory shares it: a queue of gigabytes is no part of a network's copy. To
    copy the rows, use `load_state_dict(memory.state_dict())`.

    Args:
        size: Rows kept at most.
        dtype: How embeddings are stored, a floating-point dtype. They are normalised in float32 whatever it is.

    Attributes:
        batches: Calls of `enqueue` so far.
        dropped: Rows refused so far because they had no direction (NaN, infinite or zero).

    Raises:
        TypeError: If `size` is not a whole number, or `dtype` not floating point.
        ValueError: If `size` is below 1.
    """

    #: What the state of this memory has: four tensors, then numbers.
    state_names: tuple[str, ...] = (*TENSORS, "batches", "dropped")

    def __init__(self, size: int | None, dtype: torch.dtype = torch.float32) -> None:
        if size is not None:
            check_size(size)
        check_storage(dtype)
        self.size = size
        self._table = RowTable(dtype)
        self.reset()

    # ---------------------------------------------------------------- what a subclass defines
    @abstractmethod
    def _slots_needed(self) -> int:
        """Return the number of slots to allocate."""

    def _allocate(self, dim: int) -> None:
        """Replace the table by an empty one for rows of `dim` numbers; for no rows if `dim` is 0."""
        self._table.allocate(self._slots_needed() if dim else 0, dim)

    @abstractmethod
    def _store(self, embeddings: Tensor, metadata: Tensor) -> None:
        """Write unit rows `(n, D)` with their metadata `(3, n)` into the table, and show which slots are valid then."""

    @abstractmethod
    def _restore(self, state: dict[str, Any], embeddings: Tensor, metadata: Tensor) -> None:
        """Replace the rows by those of a checked state."""

    # ---------------------------------------------------------------- writing and reading
    def enqueue(
        self, embeddings: Tensor, labels: Tensor, indices: Tensor | None = None, *, step: int | None = None
    ) -> int:
        """Store the rows of a batch, as `embeddings / |embeddings|`, computed in float32.

        What `read` returned before is overwritten sooner or later: enqueue after the backward pass that used it
        (autograd raises otherwise), and clone what is to be kept.

        Args:
            embeddings: `(B, D)` floating point.
            labels: `(B,)` integers.
            indices: `(B,)` integers, the data-set index of each row's image; -1, or None for all, is unknown and equals
                no other index.
            step: The time to note for these rows; by default the number of earlier calls.

        Returns:
            How many rows were dropped because they had no direction (NaN, infinite or zero).

        Raises:
            TypeError: If labels or indices are not integers, or embeddings are not floating point.
            ValueError: If shapes do not fit each other, or `D` is not that of the stored rows.
        """
        embeddings, labels, indices = as_rows(embeddings, labels, indices)
        held = self._table.embeddings
        if held.shape[1] not in (0, embeddings.shape[1]):
            raise ValueError(
                f"The memory holds embeddings of D={held.shape[1]}, but the batch has D={embeddings.shape[1]}. If the "
                "memory came from a checkpoint, it belongs to another embedding layer: restore the layer that it was "
                "trained with, or start without the memory's state. Otherwise call `memory.reset()` first."
            )
        # Rows enqueued under inference mode must be usable in a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            rows, usable = unit_rows(embeddings)
            metadata = torch.stack([labels, indices, torch.full_like(labels, self.batches if step is None else step)])
            dropped = len(usable) - int(usable.sum())
            if dropped:
                rows, metadata = rows[usable], metadata[:, usable]
            if held.device != rows.device:
                self.to(rows.device)
            self._store(rows, metadata)
        self.batches += 1
        self.dropped += dropped
        return dropped

    def read(self) -> MemoryRows:
        """Return the valid rows: contiguous views into the table, no copy.

        Returns:
            `embeddings (M, D)` of the storage dtype, `labels (M,)` int64 and `indices (M,)` int64 (-1 is unknown).
            Before the first rows `M` is 0, and `D` is 0 as well.
        """
        self.was_read = True
        return self._table.rows

    def reset(self) -> None:
        """Forget rows, counters and dimension; `read()` gives zero rows, on the device of before."""
        self.batches = 0
        self.dropped = 0
        self.was_read = False
        self._allocate(0)

    def __len__(self) -> int:
        """Return the number of valid rows."""
        return len(self._table.rows.labels)

    def __repr__(self) -> str:
        """Return size, fill, dimension and place."""
        return (
            f"{type(self).__name__}(size={self.size}, rows={len(self)}, dim={self.dim}, dtype={self.dtype}, "
            f"device={str(self.device)!r})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> TableMemory:
        """Return the same object, see the class docstring."""
        return self

    # ---------------------------------------------------------------- what the table holds
    @property
    def dtype(self) -> torch.dtype:
        """How embeddings are stored."""
        return self._table.dtype

    @property
    def steps(self) -> Tensor:
        """For each valid row the `step` given when it was enqueued, `(M,)`."""
        return self._table.steps

    @property
    def dim(self) -> int:
        """The `D` of the stored rows; 0 before the first."""
        return self._table.embeddings.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._table.embeddings.device

    @property
    def nbytes(self) -> int:
        """Bytes allocated, unused slots included."""
        return self._table.embeddings.nbytes + self._table.metadata.nbytes

    def to(self, device: torch.device | str) -> TableMemory:
        """Move the rows to a device; nothing happens if they are there."""
        device = torch.device(device)
        if device != self.device:
            self._table.to(device)
        return self

    # ---------------------------------------------------------------- checkpoints
    def state_dict(self) -> dict[str, Any]:
        """Return the valid rows as CPU copies, and the counters; only tensors and numbers, never empty."""
        return {**self._table.state(), "batches": self.batches, "dropped": self.dropped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace rows and counters.

        The device stays as it is: `to`, or the next `enqueue`, moves the rows.

        Args:
            state: What `state_dict` returned, from a memory of any size, dtype or device.

        Raises:
            ValueError: If entries are missing or do not fit each other, or an embedding is not finite.
        """
        check_state(type(self).__name__, state, self.state_names)
        self._restore(state, state["embeddings"], torch.stack([state[name] for name in COLUMNS]))
        self.batches, self.dropped = state["batches"], state["dropped"]


class EmbeddingMemory(TableMemory):
    """The last `size` embeddings with their labels, first in, first out (Wang et al. 2020, arXiv 1912.06798).

    A plain object over tensors: no module, no loss, no ranks. Rows enter with `enqueue` and are read with `read`,
    oldest first. The first rows decide the dimension and the device, and allocate everything.

    `read()` costs nothing, even after the memory has wrapped around: the table has a quarter more slots than `size`,
    rows are appended, and the newest `size` of them are the memory. Only at the end of the table are the valid rows
    moved back to its front. That is on average less than 5 row copies for each row that enters, and in all
    `1.25 * size * (D * bytes_per_number + 24)` bytes.

    A deep copy of a module that holds a memory shares it. To copy the rows, use `load_state_dict(memory.state_dict())`.

    Args:
        size: Rows kept, at least 1. A batch of more rows leaves its last `size`.
        dtype: How embeddings are stored, a floating-point dtype. They are normalised in float32 whatever it is;
            float16 halves the bytes and rounds similarities by about 5e-4.

    Attributes:
        steps: `(M,)` int64, for each valid row the `step` given when it was enqueued.
        batches: Calls of `enqueue` so far.
        dropped: Rows refused so far because they had no direction (NaN, infinite or zero).
        was_read: Whether `read` was called since `reset`.

    Raises:
        ValueError: If `size` is below 1.
        TypeError: If `size` is not a whole number, or `dtype` not floating point.

    Example:
        >>> memory = EmbeddingMemory(size=3)
        >>> for label in range(5):
        ...     _ = memory.enqueue(torch.randn(1, 8), torch.tensor([label]))
        >>> embeddings, labels, indices = memory.read()
        >>> labels
        tensor([2, 3, 4])
    """

    state_names = (*TableMemory.state_names, "offset")

    size: int

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(size, dtype)

    def read_with(self, embeddings: Tensor, labels: Tensor, indices: Tensor | None) -> MemoryRows:
        """Return what `read` would return if these rows had been enqueued, without enqueueing them: copies.

        Args:
            embeddings: `(B, D)` of unit length.
            labels: `(B,)`.
            indices: `(B,)`. None: 0 to B - 1 for these rows, and -1 for all others.
        """
        old, classes, images = self.read()
        old = old.reshape(len(old), embeddings.shape[1])  # the width is not known before the first row
        if indices is None:
            images, indices = torch.full_like(images, UNKNOWN_INDEX), torch.arange(len(labels))
        pairs = (old, embeddings.detach()), (classes, labels), (images, indices)
        return MemoryRows(*(torch.cat([held, new.to(held)])[-self.size :] for held, new in pairs))

    def state_dict(self) -> dict[str, Any]:
        """Return the valid rows as CPU copies, their place in the table, and the counters."""
        return {**super().state_dict(), "offset": self._table.valid.start}

    def _slots_needed(self) -> int:
        return self.size + max(1, self.size // 4)

    def _store(self, embeddings: Tensor, metadata: Tensor) -> None:
        """Append rows; the oldest rows beyond `size` are forgotten."""
        table = self._table
        if table.embeddings.shape[1] == 0:
            self._allocate(embeddings.shape[1])
        embeddings, metadata = embeddings[-self.size :], metadata[:, -self.size :]
        start, end, new = table.valid.start, table.valid.stop, len(embeddings)
        kept = min(end - start, self.size - new)
        if end + new > len(table.embeddings):
            table.move(end - kept, end)
            end = kept
        table.embeddings[end : end + new], table.metadata[:, end : end + new] = embeddings, metadata
        table.show(slice(end - kept, end + new))
        if embeddings.device.type != "cpu":
            table.rows.bound = self._count_shared(new)

    def _count_shared(self, anchors: int) -> tuple[int, int]:
        """Bound the rows that share a class or an image with any so many anchors.

        Between two steps, where the host waits for the device anyway. A power of two, so that a compiled step does not
        meet a new number every time.
        """
        _, labels, indices = self._table.rows
        most = 0
        for ids in (labels, indices[indices >= 0]):
            counts = torch.unique(ids, return_counts=True)[1]
            most += int(counts.topk(min(anchors, len(counts))).values.sum())
        return anchors, 1 << max(0, most - 1).bit_length()

    def _restore(self, state: dict[str, Any], embeddings: Tensor, metadata: Tensor) -> None:
        """Take the newest `size` rows.

        Rows return to the slots in which they were, so that their alignment, and with it the last bit of a matrix
        product, is as it would have been without the interruption.
        """
        embeddings, metadata = embeddings[-self.size :], metadata[:, -self.size :]
        self.reset()
        self._allocate(embeddings.shape[1])
        last = len(self._table.embeddings) - len(embeddings)
        offset = state["offset"] if state["offset"] <= last else 0
        self._table.show(slice(offset, offset))
        self._store(embeddings, metadata)
