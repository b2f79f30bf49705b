"""What the memories over a table of rows share, and the FIFO memory of cross-batch training."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_memdml.memory.protocol import Memory
from lightning_memdml.memory.rows import (
    COLUMNS,
    HOST_DEVICES,
    INDEX,
    LABEL,
    STEP,
    TENSORS,
    UNKNOWN_INDEX,
    MemoryRows,
    NewRows,
    RowTable,
    Storage,
    as_rows,
    unit_rows,
)
from lightning_memdml.memory.shared_rows import SharedRowCounts
from lightning_memdml.memory.validation import check_size, check_state, check_storage


class TableMemory(Memory):
    """A memory over a `RowTable`. A subclass decides only in which slots rows are.

    It defines `_store`, `_slots_needed` and `_restore`.

    A deep copy of a module that holds the memory shares it: a queue of gigabytes is no part of a network's copy. To
    copy the rows, use `load_state_dict(memory.state_dict())`.

    Args:
        size: Rows kept at most.
        dtype: How embeddings are stored: a floating-point dtype, or `auto` for float16 on a CUDA GPU and float32
            elsewhere. They are normalised in float32 whatever it is.

    Attributes:
        batches: Calls of `enqueue` so far.
        dropped: Rows refused so far because they had no direction (NaN, infinite or zero).

    Raises:
        TypeError: If `size` is not a whole number, or `dtype` not floating point.
        ValueError: If `size` is below 1.
    """

    #: What the state of this memory has: four tensors, then numbers.
    state_names: tuple[str, ...] = (*TENSORS, "batches", "dropped")

    def __init__(self, size: int | None, dtype: Storage = torch.float32) -> None:
        if size is not None:
            check_size(size)
        check_storage(dtype)
        self.size = size
        self._table = RowTable(dtype)
        self._counts: SharedRowCounts | None = None
        self.reset()

    # ---------------------------------------------------------------- what a subclass defines
    @abstractmethod
    def _slots_needed(self) -> int:
        """Return the number of slots to allocate."""

    def _allocate(self, dim: int) -> None:
        """Replace the table by an empty one for rows of `dim` numbers; for no rows if `dim` is 0."""
        self._table.allocate(self._slots_needed() if dim else 0, dim)
        self._count_again()

    def _count_again(self) -> None:
        """Count the rows of each class anew, after the whole table changed. On a CPU no loss needs a bound."""
        self._counts = self._table.bounds = None
        if self.device.type not in HOST_DEVICES:
            self._counts = SharedRowCounts(max(1, len(self._table.embeddings)))
            self._count(self._table.ids[:, self._table.valid])

    def _count(self, entering: np.ndarray, leaving: np.ndarray | None = None) -> None:
        """Count labels and indices `(2, n)` of rows that came and went, and bound what a batch may share."""
        if self._counts is not None:
            self._counts.update(entering, leaving)
            self._table.bounds = self._table.rows.bounds = self._counts.bounds()

    @abstractmethod
    def _store(self, new: NewRows) -> None:
        """Write rows into the table, show which slots are valid then, and count what came and went."""

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
            # All that the host has to know, so that it waits for a GPU once.
            on_host = torch.cat([metadata[:2], usable[None]]).cpu().numpy()
            new = NewRows(rows, metadata, on_host[:2], dropped=int((on_host[2] == 0).sum()))
            if new.dropped:
                new = new.select(on_host[2].nonzero()[0])
            if held.device != embeddings.device:
                self.to(embeddings.device)
            self._store(new)
        self.batches += 1
        self.dropped += new.dropped
        return new.dropped

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
        return self._table.embeddings.dtype

    @property
    def steps(self) -> Tensor:
        """For each valid row the `step` given when it was enqueued, `(M,)`."""
        return self._table.metadata[STEP, self._table.valid]

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
        return self._table.nbytes

    def to(self, device: torch.device | str) -> TableMemory:
        """Move the rows to a device; nothing happens if they are there."""
        device = torch.device(device)
        if device != self.device:
            self._table.to(device)
            self._count_again()
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
    r"""The last `size` embeddings with their labels, first in, first out (Wang et al. 2020, arXiv 1912.06798).

    A plain object over tensors: no module, no loss, no ranks. Rows enter with `enqueue` and are read with `read`,
    oldest first. The first rows decide the dimension and the device, and allocate everything.

    `read()` costs nothing, even after the memory has wrapped around: the table has a quarter more slots than `size`,
    rows are appended, and the newest `size` of them are the memory. Only at the end of the table are the valid rows
    moved back to its front. That is on average less than 5 row copies for each row that enters, and in all
    `1.25 * size * (D * bytes_per_number + 24)` bytes. On a CPU with bfloat16 instructions, losses with a threshold read
    rows in float32 from a copy in bfloat16 first, which takes `1.25 * size * D * 2` bytes more from then on.

    A deep copy of a module that holds a memory shares it. To copy the rows, use `load_state_dict(memory.state_dict())`.

    Args:
        size: Rows kept, at least 1. A batch of more rows leaves its last `size`.
        dtype: How embeddings are stored: a floating-point dtype, or `auto` for float16 on a CUDA GPU and float32
            elsewhere. They are normalised in float32 whatever it is. float16 halves the bytes and changes similarities
            by up to $2^{-11}$, 4.9e-4; bfloat16 by up to $2^{-8}$, 3.9e-3.

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

    def __init__(self, size: int, dtype: Storage = torch.float32) -> None:
        check_size(size)  # which a TableMemory may leave to the callback
        super().__init__(size, dtype)

    @torch.compiler.disable  # it writes into the table
    def read_with(self, embeddings: Tensor, labels: Tensor, indices: Tensor | None) -> MemoryRows:
        """Return what `read` would return if these rows had been enqueued, without enqueueing them.

        The batch is written behind the valid rows, where `enqueue` will write it again, and no other row is copied. A
        batch that is longer than the free slots, a quarter of `size`, costs a copy of the memory.

        Args:
            embeddings: `(B, D)` of unit length.
            labels: `(B,)`.
            indices: `(B,)`. None: 0 to B - 1 for these rows, and -1 for all others.
        """
        self.was_read = True
        table, new = self._table, len(labels)
        if len(self) + new > len(table.embeddings):
            held = table.rows.embeddings.reshape(len(self), embeddings.shape[1])  # of no width before the first row
            images = torch.full_like(labels, UNKNOWN_INDEX) if indices is None else indices
            pairs = zip((held, *table.rows[1:]), (embeddings.detach(), labels, images), strict=True)
            rows = MemoryRows(*(torch.cat([old, added.to(old)])[-self.size :] for old, added in pairs))
        else:
            if table.valid.stop + new > len(table.embeddings):
                table.move(table.valid.start, table.valid.stop)
                table.show(slice(0, len(self)))
            end = table.valid.stop + new
            slots = slice(table.valid.stop, end)
            with torch.inference_mode(False), torch.no_grad():
                table.put(slots, embeddings.to(table.embeddings.device))
                table.metadata[LABEL, slots] = labels
                table.metadata[INDEX, slots] = UNKNOWN_INDEX if indices is None else indices
            rows = table.view(slice(max(table.valid.start, end - self.size), end))
        if indices is None:  # the numbers of the batch's rows stand in for its images
            images = torch.full_like(rows.labels, UNKNOWN_INDEX)
            kept = min(new, self.size)
            images[len(images) - kept :] = torch.arange(new - kept, new, device=images.device)
            rows = MemoryRows(rows.embeddings, rows.labels, images)
        if table.bounds is not None:
            rows.bounds = tuple(bound + new for bound in table.bounds)
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Return the valid rows as CPU copies, their place in the table, and the counters."""
        return {**super().state_dict(), "offset": self._table.valid.start}

    def _slots_needed(self) -> int:
        return self.size + max(1, self.size // 4)

    def _store(self, new: NewRows) -> None:
        """Append rows; the oldest rows beyond `size` are forgotten."""
        table = self._table
        if table.embeddings.shape[1] == 0:
            self._allocate(new.embeddings.shape[1])
        if len(new.embeddings) > self.size:
            new = new.last(self.size)
        start, end, rows = table.valid.start, table.valid.stop, len(new.embeddings)
        kept = min(end - start, self.size - rows)
        leaving = table.ids[:, start : end - kept].copy()
        if end + rows > len(table.embeddings):
            table.move(end - kept, end)
            end = kept
        table.write(slice(end, end + rows), new, valid=slice(end - kept, end + rows))
        if self._counts is not None:
            self._count(new.ids, leaving)

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
        self._store(NewRows(embeddings, metadata, metadata[:2].cpu().numpy(), 0))
