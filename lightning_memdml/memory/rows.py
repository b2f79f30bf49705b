"""Rows of a memory: how a batch becomes rows, the table that holds them, and what the memories over a table share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_memdml.checks import check_embeddings, check_labels
from lightning_memdml.compat import mark_dynamic
from lightning_memdml.memory.protocol import Memory, MemoryRows
from lightning_memdml.memory.validation import check_dim, check_size, check_state, check_storage

# Rows of the integer metadata.
LABEL, INDEX, STEP = range(3)
COLUMNS = ("labels", "indices", "steps")

UNKNOWN_INDEX = -1
"""Stored where the index of a row's image is not given. It names no image, so it equals no other index."""

#: Rows shorter than this are scaled up before they are normalised, as `F.normalize` would leave them too short.
_SHORTEST = 1e-12


def as_rows(embeddings: Tensor, labels: Tensor, indices: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Check a batch, and convert it to the form that memories take and ranks exchange.

    Args:
        embeddings: `(B, D)` floating point, of any precision, with or without a gradient.
        labels: `(B,)` integers; every value of int64 is a label, 0 and negative ones included.
        indices: `(B,)` integers, the data-set index of each row's image; None: unknown, stored as -1.

    Returns:
        `embeddings (B, D)` float32 without gradient, `labels (B,)` and `indices (B,)` int64, all on one device.

    Raises:
        TypeError: If an argument is not a tensor, or of a wrong dtype.
        ValueError: If an argument is of a wrong shape.

    Example:
        >>> as_rows(torch.ones(2, 3), torch.tensor([0, 4]))[1:]
        (tensor([0, 4]), tensor([-1, -1]))
    """
    check_embeddings("embeddings", embeddings)
    check_labels("labels", labels, rows=len(embeddings))
    if indices is None:
        indices = torch.full((len(embeddings),), UNKNOWN_INDEX)
    check_labels("indices", indices, rows=len(embeddings))
    labels, indices = (column.detach().to(embeddings.device, torch.int64) for column in (labels, indices))
    return embeddings.detach().float(), labels, indices


def unit_rows(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Scale rows to length 1, and find out which of them have a direction.

    A row with a NaN or an infinity has no direction, nor has a row of zeros. Any other finite row has one, however
    long or short it is.

    Args:
        embeddings: `(B, D)` float32.

    Returns:
        `(B, D)` rows, where they have a direction; and the `(B,)` mask of those that have one. Rows with a length
        from 1e-12 to 1e19 are bit for bit those of `torch.nn.functional.normalize`.

    Example:
        >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 1e30], [0.0, float("nan")], [0.0, 0.0]]))[1].tolist()
        [True, True, False, False]
    """
    lengths = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
    usable = (lengths > _SHORTEST) & lengths.isfinite()
    if not usable.all():
        # The square of a very long or very short row is outside of float32, so scale it first.
        largest = embeddings.abs().amax(dim=1, keepdim=True)
        embeddings = torch.where(usable, embeddings, embeddings / largest)
        lengths = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
        usable = (largest > 0) & largest.isfinite()
    return embeddings / lengths, usable.squeeze(1)


class RowTable:
    """Slots for rows, allocated once: an embedding, and the integers label, index and step.

    Args:
        dtype: How embeddings are stored.

    Attributes:
        embeddings: `(slots, D)` of `dtype`.
        metadata: `(3, slots)` int64: label, image index and step of each slot.
        valid: The slots that hold valid rows.
        rows: The valid rows, views into the table.
        steps: The step of each valid row, `(M,)`.

    Example:
        >>> table = RowTable(torch.float32)
        >>> table.allocate(slots=3, dim=2)
        >>> table.write(slice(0, 2), torch.eye(2), torch.tensor([[7, 8], [0, 1], [0, 0]]))
        >>> table.show(slice(0, 2))
        >>> table.rows.labels
        tensor([7, 8])
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.embeddings = torch.empty(0, 0, dtype=dtype)
        self.metadata = torch.empty(3, 0, dtype=torch.int64)
        self.show(slice(0, 0))

    def allocate(self, slots: int, dim: int) -> None:
        """Replace the table by an empty one, on the same device."""
        device = self.embeddings.device
        self.embeddings = torch.zeros(slots, dim, dtype=self.dtype, device=device)
        self.metadata = torch.zeros(3, slots, dtype=torch.int64, device=device)
        self.show(slice(0, 0))

    def write(self, slots: slice | Tensor, embeddings: Tensor, metadata: Tensor) -> None:
        """Write rows `(n, D)` with their metadata `(3, n)` into slots; a slice takes any device and dtype."""
        self.embeddings[slots] = embeddings
        self.metadata[:, slots] = metadata

    def move(self, start: int, stop: int) -> None:
        """Move the slots from `start`, at least 1, to `stop` to the front, without a second table.

        Source and target may overlap, so slots move in blocks no longer than `start`, the distance between them.
        """
        for first in range(start, stop, start):
            source = slice(first, min(first + start, stop))
            target = slice(source.start - start, source.stop - start)
            self.embeddings[target] = self.embeddings[source]
            self.metadata[:, target] = self.metadata[:, source]

    def show(self, slots: slice) -> None:
        """Make these slots the valid rows: contiguous views, no copy.

        Called after each write and not when rows are read, so that a compiled training step meets tensors of a dynamic
        length, and no Python numbers, for each of which it would compile again.
        """
        self.valid = slots
        self.rows = MemoryRows(self.embeddings[slots], self.metadata[LABEL, slots], self.metadata[INDEX, slots])
        self.steps = self.metadata[STEP, slots]
        for tensor in self.rows:
            mark_dynamic(tensor, 0)

    def to(self, device: torch.device) -> None:
        """Move the table to a device."""
        self.embeddings, self.metadata = self.embeddings.to(device), self.metadata.to(device)
        self.show(self.valid)

    def state(self) -> dict[str, Tensor]:
        """Return copies of the valid rows, on the CPU."""
        tensors = zip(("embeddings", *COLUMNS), (*self.rows, self.steps), strict=True)
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors}


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
    state_names: tuple[str, ...] = ("embeddings", *COLUMNS, "batches", "dropped")

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
            check_dim(held.shape[1], embeddings.shape[1])
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
