"""Rows of a memory: what reading one returns, how a batch becomes rows, and the table that holds them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_memdml.bfloat16_copy import BFloat16Copy, RoundedRows
from lightning_memdml.checks import check_rows
from lightning_memdml.compat import mark_dynamic

# Rows of the integer metadata.
LABEL, INDEX, STEP = range(3)
COLUMNS = ("labels", "indices", "steps")
#: The tensors of a memory's state.
TENSORS = ("embeddings", *COLUMNS)

#: Types of devices from which the host reads a number at no cost. From others it would have to wait for it.
HOST_DEVICES = {"cpu"}

#: Types of devices on which `dtype="auto"` is float16: those that multiply it by tensor cores with sums in float32.
FLOAT16_DEVICES = {"cuda"}
Storage = torch.dtype | Literal["auto"]

UNKNOWN_INDEX = -1
"""Stored where the index of a row's image is not given. It names no image, so it equals no other index."""

#: Rows shorter than this are scaled up before they are normalised, as `F.normalize` would leave them too short.
_SHORTEST = 1e-12


class _Rows(NamedTuple):
    embeddings: Tensor
    labels: Tensor
    indices: Tensor


class MemoryRows(_Rows):
    """The rows of a memory, and what helps a loss to compare a batch with them.

    It unpacks as exactly three tensors, `embeddings, labels, indices = memory.read()`.

    Args:
        embeddings: `(M, D)`, of unit length.
        labels: `(M,)` int64.
        indices: `(M,)` int64, the data-set index of each row's image; -1 is unknown and equals no other index.

    Attributes:
        ranks: If these rows are only the share of this rank: the object by which ranks exchange rows, whose `len` is
            the number of rows on all ranks. Otherwise None.
        bounds: How many rows share a class or an image with any batch at most: for 1, 2, 4, ... anchors, the last one
            for any number of anchors. None if not counted.
        rounded: Returns the embeddings in bfloat16, with a bound of their lengths, which the memory keeps up to date
            from the first call on. None if no memory keeps them.

    Example:
        >>> rows = MemoryRows(torch.eye(2), torch.tensor([4, 4]), torch.tensor([0, 1]))
        >>> embeddings, labels, indices = rows
        >>> rows.bounds = (4, 8, 12)
        >>> rows.max_shared(2), rows.max_shared(3), rows.max_shared(100)
        (8, 12, 12)
    """

    ranks: Any
    bounds: tuple[int, ...] | None
    rounded: Callable[[], RoundedRows] | None

    def __new__(cls, embeddings: Tensor, labels: Tensor, indices: Tensor) -> MemoryRows:
        """Make the tuple, and set the attributes: torch 2.10 does not trace those of the class."""
        rows = super().__new__(cls, embeddings, labels, indices)
        rows.ranks = rows.bounds = rows.rounded = None
        return rows

    def max_shared(self, anchors: int) -> int | None:
        """Return an upper bound of the rows that share a class or an image with a batch.

        With it a loss on a GPU need not wait until the device has counted them.

        Args:
            anchors: Number of rows B of the batch.

        Returns:
            The bound, or None if it was not counted.
        """
        return None if self.bounds is None else self.bounds[min((anchors - 1).bit_length(), len(self.bounds) - 1)]


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
    check_rows("embeddings", embeddings, labels=labels, **({} if indices is None else {"indices": indices}))
    if indices is None:
        indices = torch.full((len(embeddings),), UNKNOWN_INDEX, device=embeddings.device)
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
    if embeddings.device.type not in HOST_DEVICES or not usable.all():  # others would have to be waited for
        # The square of a very long or very short row is outside of float32, so scale it first.
        largest = embeddings.abs().amax(dim=1, keepdim=True)
        embeddings = torch.where(usable, embeddings, embeddings / largest)
        lengths = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
        usable = (largest > 0) & largest.isfinite()
    return embeddings / lengths, usable.squeeze(1)


class NewRows(NamedTuple):
    """The rows of a batch that have a direction, ready to be stored.

    Attributes:
        embeddings: `(n, D)` float32, of unit length.
        metadata: `(3, n)` int64: label, index and step.
        ids: Labels and indices on the host, `(2, n)`.
        dropped: How many rows of the batch had no direction.
    """

    embeddings: Tensor
    metadata: Tensor
    ids: np.ndarray
    dropped: int

    def last(self, number: int) -> NewRows:
        """Return the last rows."""
        return NewRows(self.embeddings[-number:], self.metadata[:, -number:], self.ids[:, -number:], self.dropped)

    def select(self, places: np.ndarray) -> NewRows:
        """Return the rows at some places, without waiting for the device."""
        on_device = torch.from_numpy(places).to(self.metadata.device, non_blocking=True)
        return NewRows(self.embeddings[on_device], self.metadata[:, on_device], self.ids[:, places], self.dropped)


class RowTable:
    """Slots for rows, allocated once: an embedding, and the integers label, index and step.

    Args:
        storage: How embeddings are stored: a dtype, or `auto` for float16 on a CUDA GPU and float32 elsewhere.

    Attributes:
        embeddings: `(slots, D)`.
        metadata: `(3, slots)` int64: label, image index and step of each slot.
        ids: Label and image index of each slot on the host, `(2, slots)`; of a table on a CPU the numbers themselves.
        bounds: Those of `MemoryRows`, given to all rows that are shown.
        valid: The slots that hold valid rows.
        rows: The valid rows, views into the table.

    Example:
        >>> table = RowTable(torch.float32)
        >>> table.allocate(slots=3, dim=2)
        >>> metadata = torch.tensor([[7, 8], [0, 1], [0, 0]])
        >>> new = NewRows(torch.eye(2), metadata, metadata[:2].numpy(), dropped=0)
        >>> table.write(slice(0, 2), new, valid=slice(0, 2))
        >>> table.rows.labels
        tensor([7, 8])
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.bounds: tuple[int, ...] | None = None
        self.embeddings = torch.empty(0, 0, dtype=self.dtype_on(torch.device("cpu")))
        self.metadata = torch.empty(3, 0, dtype=torch.int64)
        self._mirror(np.zeros((2, 0), dtype=np.int64), slice(0, 0))

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """Return how embeddings are stored on a device."""
        if isinstance(self.storage, torch.dtype):
            return self.storage
        return torch.float16 if device.type in FLOAT16_DEVICES else torch.float32

    def allocate(self, slots: int, dim: int) -> None:
        """Replace the table by an empty one, on the same device."""
        device = self.embeddings.device
        self.embeddings = torch.zeros(slots, dim, dtype=self.dtype_on(device), device=device)
        self.metadata = torch.zeros(3, slots, dtype=torch.int64, device=device)
        self._mirror(np.zeros((2, slots), dtype=np.int64), slice(0, 0))

    def move(self, start: int, stop: int) -> None:
        """Move the slots from `start`, at least 1, to `stop` to the front, without a second table.

        Source and target may overlap, so slots move in blocks no longer than `start`, the distance between them.
        """
        for first in range(start, stop, start):
            source = slice(first, min(first + start, stop))
            target = slice(source.start - start, source.stop - start)
            self.put(target, self.embeddings[source])
            self.metadata[:, target] = self.metadata[:, source]
            if not self._on_host:
                self.ids[:, target] = self.ids[:, source]

    def write(self, slots: slice | np.ndarray, new: NewRows, valid: slice) -> None:
        """Write rows into slots, given as a range or by their numbers, and show the `valid` slots."""
        if not self._on_host:
            self.ids[:, slots] = new.ids
        places = slots if isinstance(slots, slice) else self.on_device(slots)
        if self._rounded.is_made:
            self.put(places, new.embeddings)
        else:
            self.embeddings[places] = new.embeddings.to(self.embeddings.dtype)
        self.metadata[:, places] = new.metadata
        self.valid, self.rows = valid, self.view(valid)

    def put(self, places: slice | Tensor, embeddings: Tensor) -> None:
        """Write embeddings into slots, and into the bfloat16 copy where there is one."""
        is_current = self._rounded.is_current
        self.embeddings[places] = embeddings.to(self.embeddings.dtype)
        if is_current:
            self._rounded.update(places)

    def on_device(self, slots: np.ndarray) -> Tensor:
        """Return the numbers of slots where the table is, without waiting for it."""
        return torch.from_numpy(slots).to(self.embeddings.device, non_blocking=True)

    def show(self, slots: slice) -> None:
        """Make these slots the valid rows: contiguous views, no copy."""
        self.valid, self.rows = slots, self.view(slots)

    def view(self, slots: slice) -> MemoryRows:
        """Return the rows in some slots.

        Called after each write and not when rows are read, so that a compiled training step meets tensors of a dynamic
        length, and no Python numbers, for each of which it would compile again.
        """
        rows = MemoryRows(self.embeddings[slots], self.metadata[LABEL, slots], self.metadata[INDEX, slots])
        rows.bounds, rows.rounded = self.bounds, functools.partial(self._rounded.read, slots)
        for tensor in rows:
            mark_dynamic(tensor, 0)
        return rows

    def to(self, device: torch.device) -> None:
        """Move the table to a device."""
        ids = self.ids.copy()
        self.embeddings, self.metadata = self.embeddings.to(device, self.dtype_on(device)), self.metadata.to(device)
        self._mirror(ids, self.valid)

    def _mirror(self, ids: np.ndarray, valid: slice) -> None:
        """Keep labels and indices on the host after the whole table changed, and show the valid rows."""
        self._on_host = self.metadata.device.type in HOST_DEVICES
        self.ids = self.metadata[:2].numpy() if self._on_host else ids
        self._rounded = BFloat16Copy(self.embeddings)
        self.show(valid)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, unused slots included."""
        return self.embeddings.nbytes + self.metadata.nbytes + self._rounded.nbytes

    def state(self) -> dict[str, Tensor]:
        """Return copies of the valid rows, on the CPU."""
        tensors = zip(TENSORS, (*self.rows, self.metadata[STEP, self.valid]), strict=True)
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors}
