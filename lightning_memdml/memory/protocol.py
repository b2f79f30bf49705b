"""What the callback, the learner and the losses need of a memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lightning_memdml.memory.rows import MemoryRows


class Memory(ABC):
    """The interface of every memory: what `MemoryCallback`, `MetricLearner` and the losses use, and no more.

    A class that derives from it works in `MemoryCallback(memory=...)`, in Python and by its name in YAML. An abstract
    class and not a `typing.Protocol`, because the command line accepts a structural type only if all annotations are
    equal. `TableMemory` has all but the placement of rows; `EmbeddingMemory` and `InstanceMemory` stand on it.

    A memory is a plain object, no module: DDP does not broadcast it, and no checkpoint of the module contains it.
    Under DDP every rank calls `enqueue` with the same rows in the same order, so equal memories stay equal.

    Attributes:
        size: Rows kept at most. None: as many as there are training images, which the callback then sets.
        was_read: Whether `read` was called since `reset`. The callback warns while it is False; True for a memory that
            does not count.
        stores_batch: Whether the batch of the current step will be stored after it; the callback sets it.
        given: Embeddings, labels and, if known, indices of the current step, as far as `training_step` gave them before
            its end. The callback sends them to the other ranks while gradients are computed.
    """

    size: int | None
    was_read: bool = True
    stores_batch: bool = False
    given: Mapping[str, Tensor] = MappingProxyType({})

    @abstractmethod
    def enqueue(
        self, embeddings: Tensor, labels: Tensor, indices: Tensor | None = None, *, step: int | None = None
    ) -> int:
        """Store the rows of a batch.

        Args:
            embeddings: `(B, D)` floating point.
            labels: `(B,)` integers.
            indices: `(B,)` integers, the data-set index of each row's image; -1, or None for all, is unknown.
            step: Optimiser steps that the weights had taken which made these rows.

        Returns:
            How many rows were dropped because they had no direction (NaN, infinite or zero).
        """

    @abstractmethod
    def read(self) -> MemoryRows:
        """Return the valid rows; before the first, tensors of zero rows."""

    def read_with(self, embeddings: Tensor, labels: Tensor, indices: Tensor | None) -> MemoryRows:
        """Return what `read` would return if these rows had been enqueued, without enqueueing them.

        Needed for `MetricLearner(memory_includes_batch=True)` only.

        Args:
            embeddings: `(B, D)` of unit length.
            labels: `(B,)`.
            indices: `(B,)`, the data-set index of each row's image. None: by position; these rows have the indices 0 to
                B - 1 in what is returned, and all others -1, so that a loss can leave out each row's own entry alone.

        Raises:
            ValueError: If the memory cannot do that.
        """
        raise ValueError(
            f"Expected a memory that can be read with the batch in it but got {type(self).__name__}. Leave "
            "`memory_includes_batch` out."
        )

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of valid rows, over all ranks."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes allocated on this rank."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all rows and counters."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Memory:
        """Move the rows to a device, and return the memory itself."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the rows and counters: tensors and numbers only, and never an empty dictionary on rank 0."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace rows and counters by those of `state_dict`."""
