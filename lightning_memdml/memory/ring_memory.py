"""A FIFO memory whose rows never move, for training steps that are captured as CUDA graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_memdml.memory.embedding_memory import EmbeddingMemory
from lightning_memdml.memory.rows import UNKNOWN_INDEX, MemoryRows, NewRows


class RingMemory(EmbeddingMemory):
    """The last `size` embeddings, as an `EmbeddingMemory`, in slots that never move.

    A CUDA graph reads the same addresses and shapes in every replay. The view of an `EmbeddingMemory` moves through its
    table with every batch. Here new rows overwrite the oldest ones. Once the memory is full, `read` returns tensors of
    one address and one shape. Until then they grow, so the step is captured when `len(memory) == memory.size`. A graph
    also holds the bound of the shared rows, `MemoryRows.bounds`: capture it again when `read().bounds` has changed.

    Rows are read in the order of their slots, not oldest first, so sums over them differ in their last bits from those
    over an `EmbeddingMemory`. It has no free slots, so `read_with` copies the memory when it is full.

    Args:
        size: Rows kept, at least 1. A batch of more rows leaves its last `size`.
        dtype: How embeddings are stored, see `EmbeddingMemory`.

    Raises:
        ValueError: If `size` is below 1.
        TypeError: If `size` is not a whole number, or `dtype` not floating point.

    Example:
        >>> memory = RingMemory(size=3)
        >>> for label in range(5):
        ...     _ = memory.enqueue(torch.randn(1, 8), torch.tensor([label]))
        >>> memory.read().labels
        tensor([3, 4, 2])
    """

    _next: int  # the slot that the next row enters

    def reset(self) -> None:
        """Forget rows, counters and dimension."""
        self._next = 0
        super().reset()

    def read_with(self, embeddings: Tensor, labels: Tensor, indices: Tensor | None) -> MemoryRows:
        """Return what `read` would return if these rows had been enqueued, oldest first, without enqueueing them.

        Args:
            embeddings: `(B, D)` of unit length.
            labels: `(B,)`.
            indices: `(B,)`. None: 0 to B - 1 for these rows, and -1 for all others.
        """
        self.was_read = True
        held, new = self._table.rows, len(labels)
        images = torch.full_like(labels, UNKNOWN_INDEX) if indices is None else indices
        of_held = (self._oldest_first(part) for part in held) if self.dim else (part[:0] for part in held)
        pairs = zip(of_held, (embeddings.detach(), labels, images), strict=True)
        table = [
            torch.cat([old.reshape(len(self), *added.shape[1:]), added.to(old)])[-self.size :] for old, added in pairs
        ]
        if indices is None:  # the numbers of the batch's rows stand in for its images
            kept = min(new, self.size)
            table[2] = torch.full_like(table[2], UNKNOWN_INDEX)
            table[2][len(table[2]) - kept :] = torch.arange(new - kept, new, device=labels.device)
        rows = MemoryRows(*table)
        if self._table.bounds is not None:
            rows.bounds = tuple(bound + new for bound in self._table.bounds)
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Return the rows as CPU copies, oldest first, the slot of the oldest, and the counters."""
        state = super().state_dict()
        rows = {name: self._oldest_first(value) for name, value in state.items() if isinstance(value, Tensor)}
        return {**state, **rows, "offset": self._oldest}

    @property
    def _oldest(self) -> int:
        """The slot of the oldest row."""
        return self._next if len(self) == self.size else 0

    def _oldest_first(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor[self._oldest :], tensor[: self._oldest]])

    def _slots_needed(self) -> int:
        return self.size

    def _store(self, new: NewRows) -> None:
        """Overwrite the oldest rows; at the end of the table go on at its front."""
        table = self._table
        if table.embeddings.shape[1] == 0:
            self._allocate(new.embeddings.shape[1])
        if len(new.embeddings) > self.size:
            new = new.last(self.size)
        filled, rows = table.valid.stop, len(new.embeddings)
        slots = (self._next + np.arange(rows)) % self.size
        leaving = table.ids[:, slots[slots < filled]].copy()
        at_end = min(rows, self.size - self._next)
        valid = slice(0, min(self.size, filled + rows))
        for part in (slice(0, at_end), slice(at_end, rows)):
            if part.stop > part.start:
                start = int(slots[part.start])
                some = NewRows(new.embeddings[part], new.metadata[:, part], new.ids[:, part], new.dropped)
                table.write(slice(start, start + part.stop - part.start), some, valid)
        self._next = (self._next + rows) % self.size
        if self._counts is not None:
            self._count(new.ids, leaving)

    def _restore(self, state: dict[str, Any], embeddings: Tensor, metadata: Tensor) -> None:
        """Take the newest `size` rows. Those of a full ring of this size return to their slots."""
        embeddings, metadata = embeddings[-self.size :], metadata[:, -self.size :]
        self.reset()
        self._allocate(embeddings.shape[1])
        self._next = state["offset"] % self.size if len(embeddings) == self.size else 0
        self._store(NewRows(embeddings, metadata, metadata[:2].cpu().numpy(), 0))
