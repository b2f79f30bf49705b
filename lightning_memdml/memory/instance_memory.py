"""A memory with one row per image, which follows the image's embeddings with a momentum of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_memdml.memory.momentum_encoder import check_momentum
from lightning_memdml.memory.rows import as_rows, check_dim, check_state, unit_rows

# Rows of the integer table: what is known of each stored embedding.
_LABEL, _INDEX, _STEP = range(3)
_STATE = ("embeddings", "labels", "indices", "steps", "batches", "dropped")


class InstanceMemory:
    r"""One row per image of the data set, updated in place (Wu et al. 2018, arXiv 1805.01978).

    .. math:: r \leftarrow \frac{m r + (1 - m) x}{|m r + (1 - m) x|}

    The other reading of a momentum-updated memory: here the rows have the momentum, with a `MomentumEncoder` the
    network that writes them. No image is there twice, however long the memory. A row is as old as the last visit to
    its image, about an epoch at most.

    It has the interface of `EmbeddingMemory`, except that `enqueue` needs indices, and rows are read in the order in
    which their images were first seen. `read()` costs nothing: rows stand one after the other in that order, and a
    table of `size` integers says where each image's row is. In all `size * (D * bytes_per_number + 32)` bytes.

    Args:
        size: Images of the data set; indices are in `[0, size)`. None: those of the training set, which
            `MemoryCallback` finds out.
        momentum: The :math:`m` of the formula, in [0, 1). At 0 a row is the image's latest embedding.
        dtype: How embeddings are stored, a floating point dtype. They are averaged and normalised in float32.

    Attributes:
        steps: `(M,)` int64, for each row the `step` given when it was last updated.
        batches: Calls of `enqueue` so far.
        dropped: Rows refused so far because they had no direction (NaN, infinite, or zero).
        was_read: Whether `read` was ever called.

    Raises:
        ValueError: If `size` is below 1 or `momentum` out of range.
        TypeError: If `dtype` is not floating point.

    Example:
        >>> memory = InstanceMemory(size=10, momentum=0.5)
        >>> for embedding in ([[1.0, 0.0]], [[0.0, 1.0]]):
        ...     _ = memory.enqueue(torch.tensor(embedding), torch.tensor([3]), torch.tensor([7]))
        >>> memory.read()
        (tensor([[0.7071, 0.7071]]), tensor([3]), tensor([7]))
    """

    def __init__(self, size: int | None = None, momentum: float = 0.5, dtype: torch.dtype = torch.float32) -> None:
        if size is not None and size < 1:
            raise ValueError(f"Expected `size` of at least 1 image but got {size}; a memory without rows is no memory.")
        check_momentum("momentum", momentum)
        if not dtype.is_floating_point:
            raise TypeError(f"Expected a floating point `dtype` such as torch.float32 but got {dtype}.")
        self.size = size
        self.momentum = momentum
        self.dtype = dtype
        self._rows, self._facts, self._slots = torch.empty(0, 0), torch.empty(3, 0), torch.empty(0)
        self.reset()

    def reset(self) -> None:
        """Forget rows, counters and dimension; `read()` gives zero rows, on the device of before."""
        self.batches = 0
        self.dropped = 0
        self.was_read = False
        self._count = 0
        self._allocate(0)
        self._expose()

    def enqueue(
        self, embeddings: Tensor, labels: Tensor, indices: Tensor | None = None, *, step: int | None = None
    ) -> int:
        """Update the rows of a batch of images; an image that is there several times updates its row as often.

        What `read` returned before is overwritten: enqueue after the backward pass that used it (autograd raises
        otherwise), and clone what is to be kept.

        Args:
            embeddings: `(B, D)` floating point.
            labels: `(B,)` integers; the row takes over the latest.
            indices: `(B,)` integers in `[0, size)`, which image each row is of.
            step: The time to note for these rows; by default the number of earlier calls.

        Returns:
            How many rows were dropped because they had no direction: a NaN, an infinity, or length 0.

        Raises:
            TypeError: For labels or indices that are no integers, or embeddings that are no floating point numbers.
            ValueError: For shapes that do not fit each other, another `D` than that of the stored rows, or indices
                that are not there or out of range.
        """
        rows, labels, known = as_rows(embeddings, labels, indices)
        check_dim(self.dim, rows.shape[1])
        self._check_indices(indices, known)
        step = self.batches if step is None else step
        # Rows stored under inference mode must still be usable in a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            rows, usable = unit_rows(rows)
            facts = torch.stack([labels, known, torch.full_like(labels, step)])
            dropped = int((~usable).sum())
            if dropped:
                rows, facts = rows[usable], facts[:, usable]
            self.to(rows.device)
            if self.dim == 0:
                self._allocate(rows.shape[1])
            for turn in _turns(facts[_INDEX]):
                self._update(rows[turn], facts[:, turn])
            self._expose()
        self.batches += 1
        self.dropped += dropped
        return dropped

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rows, in the order in which their images were first seen: contiguous views, no copy.

        Returns:
            `embeddings (M, D)` of the storage dtype, `labels (M,)` int64 and `indices (M,)` int64. Before the first
            rows `M` is 0, and `D` is 0 as well.
        """
        self.was_read = True
        return self._view

    def read_with(self, embeddings: Tensor, labels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `read` would return if these rows had been enqueued, which they are not: copies.

        Args:
            embeddings: `(B, D)` of unit length.
            labels: `(B,)`.
            indices: `(B,)`.
        """
        self.was_read = True
        other = InstanceMemory(self.size, self.momentum, self.dtype)
        other._rows, other._facts, other._slots = self._rows.clone(), self._facts.clone(), self._slots.clone()
        other._count = self._count
        other.enqueue(embeddings, labels, indices)
        return other.read()

    def loss_options(self, anchors: int) -> dict[str, Any]:
        """What to tell a `PairLoss` beside the rows: nothing."""
        return {}

    def __len__(self) -> int:
        """The number of images seen so far."""
        return self._count

    def __repr__(self) -> str:
        """Size, fill, momentum, dimension and place."""
        return (
            f"InstanceMemory(size={self.size}, rows={len(self)}, momentum={self.momentum}, dim={self.dim}, "
            f"dtype={self.dtype}, device={str(self.device)!r})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> InstanceMemory:
        """The same object: a table of gigabytes is no part of a network's copy."""
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
        """Bytes allocated."""
        return self._rows.nbytes + self._facts.nbytes + self._slots.nbytes

    def to(self, device: torch.device | str) -> InstanceMemory:
        """Move the rows to a device; nothing happens if they are there."""
        device = torch.device(device)
        if device != self.device:
            self._rows, self._facts = self._rows.to(device), self._facts.to(device)
            self._slots = self._slots.to(device)
            self._expose()
        return self

    def state_dict(self) -> dict[str, Any]:
        """The rows as CPU copies, and the counters; only tensors and numbers, never empty."""
        embeddings, labels, indices = (tensor.detach().to("cpu", copy=True) for tensor in self._view)
        return {
            "embeddings": embeddings,
            "labels": labels,
            "indices": indices,
            "steps": self.steps.to("cpu", copy=True),
            "batches": self.batches,
            "dropped": self.dropped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over rows and counters, replacing whatever is here.

        A state of a larger memory leaves the rows of images below `size`. The device stays as it is: `to`, or the next
        `enqueue`, moves the rows.

        Args:
            state: What `state_dict` returned, from a memory of any size, momentum, dtype or device.

        Raises:
            ValueError: If entries are missing or do not fit each other, an index is negative or there twice, or the
                state is that of another kind of memory.
        """
        check_state("InstanceMemory", state, _STATE)
        rows, indices = state["embeddings"], state["indices"]
        if "offset" in state or (indices < 0).any() or len(indices.unique()) < len(indices):
            raise ValueError(
                "Expected the state of an InstanceMemory, with one row per image, but got that of another memory: "
                "resume with the memory the checkpoint was written with, or start without its state."
            )
        facts = torch.stack([state[name] for name in ("labels", "indices", "steps")])
        if self.size is not None:
            inside = indices < self.size
            rows, facts = rows[inside], facts[:, inside]
        elif len(indices):
            self.size = int(indices.max()) + 1
        self.reset()
        self._allocate(rows.shape[1])
        self._append(rows, facts)
        self._expose()
        self.batches = state["batches"]
        self.dropped = state["dropped"]

    def _allocate(self, dim: int) -> None:
        images = (self.size or 0) if dim else 0
        self._facts = torch.zeros(3, images, dtype=torch.int64, device=self.device)
        self._slots = torch.full((images,), -1, dtype=torch.int64, device=self.device)
        self._rows = torch.zeros(images, dim, dtype=self.dtype, device=self.device)

    def _update(self, rows: Tensor, facts: Tensor) -> None:
        """Update the rows of images that are all different."""
        slots = self._slots[facts[_INDEX]]
        seen = slots >= 0
        slots, known = slots[seen], rows[seen]
        mixed, usable = unit_rows(self.momentum * self._rows[slots].float() + (1 - self.momentum) * known)
        # Opposite rows may leave nothing; the newer one is the better guess.
        self._rows[slots] = torch.where(usable[:, None], mixed, known).to(self.dtype)
        self._facts[:, slots] = facts[:, seen]
        self._append(rows[~seen], facts[:, ~seen])

    def _append(self, rows: Tensor, facts: Tensor) -> None:
        new = slice(self._count, self._count + len(rows))
        self._rows[new] = rows.to(self._rows)
        self._facts[:, new] = facts.to(self._facts)
        self._slots[facts[_INDEX].to(self.device)] = torch.arange(new.start, new.stop, device=self.device)
        self._count = new.stop

    def _expose(self) -> None:
        """Prepare what `read` returns: of a dynamic length for a compiled training step, see `EmbeddingMemory`."""
        rows, facts = self._rows[: self._count], self._facts[:, : self._count]
        self.steps = facts[_STEP]
        self._view = (rows, facts[_LABEL], facts[_INDEX])
        for tensor in self._view:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)

    def _check_indices(self, given: Tensor | None, indices: Tensor) -> None:
        if self.size is None:
            raise ValueError(
                "InstanceMemory does not know how many images there are: pass `size=`, the length of the training "
                "set, which `MemoryCallback` finds out by itself only where the training set has a length."
            )
        if given is None and len(indices):
            raise ValueError(
                "InstanceMemory needs to know which image each row is of, but got no `indices`. Let the data set "
                'return the index of each image, and end `training_step` with `return {"loss": loss, "embeddings": z, '
                '"labels": y, "indices": indices}`.'
            )
        if len(indices) and (indices.min() < 0 or indices.max() >= self.size):
            raise ValueError(
                f"Expected `indices` in [0, {self.size}), one for each image of the training set, but got "
                f"{int(indices.min())} to {int(indices.max())}; pass `size=`, one more than the largest index."
            )


def _turns(indices: Tensor) -> list[Tensor]:
    """Split positions into turns in which no index is twice: the first of each index, the second, and so on."""
    order = torch.argsort(indices, stable=True)
    counts = torch.unique_consecutive(indices[order], return_counts=True)[1]
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    occurrence = torch.empty_like(order)
    occurrence[order] = torch.arange(len(order), device=order.device) - starts
    turns = int(counts.max()) if len(counts) else 0
    return [(occurrence == turn).nonzero().flatten() for turn in range(turns)]
