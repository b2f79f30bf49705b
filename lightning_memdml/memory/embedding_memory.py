"""The FIFO memory of cross-batch training: the newest embeddings of earlier batches, with their labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_memdml.memory.rows import as_rows, check_dim, check_state, unit_rows

# Rows of the integer table: what is known of each stored embedding.
_LABEL, _INDEX, _STEP = range(3)
STATE = ("embeddings", "labels", "indices", "steps", "offset", "batches", "dropped")


class EmbeddingMemory:
    """The last `size` embeddings with their labels, first in, first out (Wang et al. 2020, arXiv 1912.06798).

    A plain object over tensors: no module, no loss, no ranks. Rows enter with `enqueue` and are read with
    `read`, oldest first. The first rows decide the dimension and the device, and allocate everything.

    `read()` costs nothing, also after the memory has gone round: rows are appended to a buffer of a quarter
    more than `size` rows, of which the newest `size` are the memory, and only when the end of the buffer is
    reached are the rows still valid moved back to its front. That is on average less than 5 row copies for
    each row that enters, and in all `1.25 * size * (D * bytes_per_number + 24)` bytes.

    A deep copy of a module that holds a memory shares it (a queue of gigabytes is no part of a network's
    copy); to copy the rows, use `load_state_dict(memory.state_dict())`.

    Args:
        size: Rows kept, at least 1. A batch of more rows leaves its last `size`.
        dtype: How embeddings are stored, a floating point dtype. They are normalised in float32 whatever it
            is; float16 halves the bytes and rounds similarities by about 5e-4.

    Attributes:
        steps: `(M,)` int64, for each valid row the `step` given when it was enqueued.
        batches: Calls of `enqueue` so far.
        dropped: Rows refused so far because they had no direction (NaN, infinite, or zero).
        was_read: Whether `read` was ever called.

    Raises:
        ValueError: If `size` is below 1.
        TypeError: If `dtype` is not floating point.

    Example:
        >>> memory = EmbeddingMemory(size=3)
        >>> for label in range(5):
        ...     _ = memory.enqueue(torch.randn(1, 8), torch.tensor([label]))
        >>> memory.read()[1]
        tensor([2, 3, 4])
    """

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        if size < 1:
            raise ValueError(f"Expected `size` of at least 1 row but got {size}; a memory without rows is no memory.")
        if not dtype.is_floating_point:
            raise TypeError(f"Expected a floating point `dtype` such as torch.float32 but got {dtype}.")
        self.size = size
        self.dtype = dtype
        self._rows, self._facts = torch.empty(0, 0), torch.empty(3, 0)
        self.reset()

    def reset(self) -> None:
        """Forget rows, counters and dimension; `read()` gives zero rows, on the device of before."""
        self.batches = 0
        self.dropped = 0
        self.was_read = False
        self._most_anchors, self._max_shared = 0, 0
        self._end = 0
        self._count = 0
        self._allocate(0)
        self._expose()

    def enqueue(
        self, embeddings: Tensor, labels: Tensor, indices: Tensor | None = None, *, step: int | None = None
    ) -> int:
        """Append a batch; the oldest rows beyond `size` are forgotten.

        Rows are stored as `embeddings / |embeddings|`, computed in float32. What `read` returned before
        shares its storage with the buffer and is overwritten sooner or later: enqueue after the backward pass
        that used it (autograd raises otherwise), and clone what is to be kept.

        Args:
            embeddings: `(B, D)` floating point.
            labels: `(B,)` integers.
            indices: `(B,)` integers, which image each row is of. Without them -1 is stored, which means
                unknown and must never be taken for equal to another -1.
            step: The time to note for these rows; by default the number of earlier calls.

        Returns:
            How many rows were dropped because they had no direction: a NaN, an infinity, or length 0.

        Raises:
            TypeError: For labels or indices that are no integers, or embeddings that are no floating point
                numbers.
            ValueError: For shapes that do not fit each other, or another `D` than that of the stored rows.
        """
        rows, labels, indices = as_rows(embeddings, labels, indices)
        check_dim(self.dim, rows.shape[1])
        step = self.batches if step is None else step
        # Rows enqueued under inference mode must still be usable in a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            rows, usable = unit_rows(rows)
            facts = torch.stack([labels, indices, torch.full_like(labels, step)])
            dropped = int((~usable).sum())
            if dropped:
                rows, facts = rows[usable], facts[:, usable]
            self.to(rows.device)
            if self.dim == 0:
                self._allocate(rows.shape[1])
            self._append(rows, facts)
            if rows.device.type != "cpu":
                self._count_shared(len(labels))
        self.batches += 1
        self.dropped += dropped
        return dropped

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """The valid rows, oldest first: contiguous views into the buffer, no copy.

        Returns:
            `embeddings (M, D)` of the storage dtype, `labels (M,)` int64 and `indices (M,)` int64 (-1 means
            unknown). Before the first rows `M` is 0, and `D` is 0 as well.
        """
        self.was_read = True
        return self._view

    def read_with(self, embeddings: Tensor, labels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `read` would return if these rows had entered, which they do not: copies.

        Args:
            embeddings: `(B, D)` of unit length.
            labels: `(B,)`.
            indices: `(B,)`.
        """
        pairs = zip(self.read(), (embeddings.detach(), labels, indices), strict=True)
        stored, classes, images = (torch.cat([old, new.to(old)])[-self.size :] for old, new in pairs)
        return stored, classes, images

    def loss_options(self, anchors: int) -> dict[str, Any]:
        """What to tell a `PairLoss` beside the rows: on a GPU a number it would otherwise have to wait for.

        Args:
            anchors: Rows of the batch that is compared with the memory.
        """
        return {"max_shared": self._max_shared} if anchors <= self._most_anchors else {}

    def __len__(self) -> int:
        """The number of valid rows."""
        return self._count

    def __repr__(self) -> str:
        """Size, fill, dimension and place."""
        return (
            f"EmbeddingMemory(size={self.size}, rows={len(self)}, dim={self.dim}, dtype={self.dtype}, "
            f"device={str(self.device)!r})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> EmbeddingMemory:
        """The same object: see the class docstring."""
        return self

    @property
    def dim(self) -> int:
        """The `D` of the stored rows; 0 before the first."""
        return self._rows.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._rows.device

    @property
    def nbytes(self) -> int:
        """Bytes allocated, slack included."""
        return self._rows.nbytes + self._facts.nbytes

    def to(self, device: torch.device | str) -> EmbeddingMemory:
        """Move the rows to a device; nothing happens if they are there."""
        device = torch.device(device)
        if device != self.device:
            self._rows = self._rows.to(device)
            self._facts = self._facts.to(device)
            self._expose()
        return self

    def state_dict(self) -> dict[str, Any]:
        """The valid rows as CPU copies, and the counters; only tensors and numbers, never empty."""
        embeddings, labels, indices = (tensor.detach().to("cpu", copy=True) for tensor in self._view)
        return {
            "embeddings": embeddings,
            "labels": labels,
            "indices": indices,
            "steps": self.steps.to("cpu", copy=True),
            "offset": self._end - self._count,
            "batches": self.batches,
            "dropped": self.dropped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over rows and counters, replacing whatever is here.

        Rows are put at the place in the buffer at which they were, so that their alignment, and with it the
        last bit of a matrix product, is as it would have been without the interruption. A state of a larger
        memory leaves its newest `size` rows. The device stays as it is: `to`, or the next `enqueue`, moves
        the rows.

        Args:
            state: What `state_dict` returned, from a memory of any size, dtype or device.

        Raises:
            ValueError: If entries are missing or do not fit each other.
        """
        check_state("EmbeddingMemory", state, STATE)
        rows = state["embeddings"][-self.size :]
        facts = torch.stack([state[name] for name in ("labels", "indices", "steps")])[:, -self.size :]
        self.reset()
        self._allocate(rows.shape[1])
        fits = 0 <= state["offset"] <= len(self._rows) - len(rows)
        self._end = state["offset"] if fits else 0
        self._append(rows, facts)
        self.batches = state["batches"]
        self.dropped = state["dropped"]

    def _allocate(self, dim: int) -> None:
        slots = self.size + max(1, self.size // 4) if dim else 0
        self._facts = torch.zeros(3, slots, dtype=torch.int64, device=self.device)
        self._rows = torch.zeros(slots, dim, dtype=self.dtype, device=self.device)

    def _append(self, rows: Tensor, facts: Tensor) -> None:
        rows, facts = rows[-self.size :], facts[:, -self.size :]
        kept = min(self._count, self.size - len(rows))
        if self._end + len(rows) > len(self._rows):
            self._move_to_front(kept)
        start, self._end = self._end, self._end + len(rows)
        self._rows[start : self._end] = rows
        self._facts[:, start : self._end] = facts
        self._count = kept + len(rows)
        self._expose()

    def _count_shared(self, anchors: int) -> None:
        """Bound the rows that share a class or an image with any so many anchors.

        Between two steps, where the host waits for the device anyway. A power of two, so that a compiled step does not
        meet a new number every time.
        """
        _, labels, indices = self._view
        most = 0
        for ids in (labels, indices[indices >= 0]):
            sizes = torch.unique(ids, return_counts=True)[1]
            most += int(sizes.topk(min(anchors, len(sizes))).values.sum())
        self._most_anchors, self._max_shared = anchors, 1 << max(0, most - 1).bit_length()

    def _move_to_front(self, kept: int) -> None:
        """Move the newest `kept` rows to the start of the buffer.

        Source and target overlap, so they move in blocks no longer than the distance between them, which is
        more than the slack: at most 4 blocks (for `size >= 4`), and no second buffer.
        """
        distance = self._end - kept
        for block in range(0, kept, distance):
            target = slice(block, min(block + distance, kept))
            source = slice(target.start + distance, target.stop + distance)
            self._rows[target] = self._rows[source]
            self._facts[:, target] = self._facts[:, source]
        self._end = kept

    def _expose(self) -> None:
        """Prepare what `read` returns.

        Here and not in `read`, so that a compiled training step meets tensors of a dynamic length and not
        Python numbers, on each of which it would compile anew.
        """
        start = self._end - self._count
        rows, facts = self._rows[start : self._end], self._facts[:, start : self._end]
        self.steps = facts[_STEP]
        self._view = (rows, facts[_LABEL], facts[_INDEX])
        for tensor in self._view:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
