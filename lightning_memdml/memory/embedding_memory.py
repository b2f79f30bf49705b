"""The FIFO memory of cross-batch training: the newest embeddings of earlier batches, with their labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_memdml.memory.protocol import MemoryRows
from lightning_memdml.memory.rows import TableMemory


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
        was_read: Whether `read` was ever called.

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

    def read_with(self, embeddings: Tensor, labels: Tensor, indices: Tensor) -> MemoryRows:
        """Return what `read` would return if these rows had been enqueued, without enqueueing them: copies.

        Args:
            embeddings: `(B, D)` of unit length.
            labels: `(B,)`.
            indices: `(B,)`.
        """
        pairs = zip(self.read(), (embeddings.detach(), labels, indices), strict=True)
        stored, classes, images = (torch.cat([old, new.to(old)])[-self.size :] for old, new in pairs)
        return MemoryRows(stored, classes, images)

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
        table.write(slice(end, end + new), embeddings, metadata)
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
