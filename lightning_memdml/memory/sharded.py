"""A FIFO memory of which every rank keeps a share."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_memdml.memory.embedding_memory import EmbeddingMemory
from lightning_memdml.memory.gather import RowGather, ranks
from lightning_memdml.memory.protocol import Memory
from lightning_memdml.memory.rows import TENSORS, MemoryRows, NewRows, Storage, as_rows
from lightning_memdml.memory.validation import check_state


class _Share(EmbeddingMemory):
    """The rows of one rank.

    Attributes:
        kept: Which of the rows that enter.
    """

    kept = slice(None)

    def _store(self, new: NewRows) -> None:
        super()._store(new.select(np.arange(len(new.embeddings))[self.kept]))


class ShardedMemory(Memory):
    """The rows of an `EmbeddingMemory`, distributed over the ranks: each of the W ranks keeps every W-th row.

    For memories that are too large for one device. The anchors of all ranks are compared with every share, and the
    partial sums combine to the loss against the whole memory, to rounding. The arithmetic per rank is the same for any
    number of ranks, the bytes are `1 / W`, and a step has three more collectives: for the anchors `(W B, D)`, for the
    few rows of their classes, and for the sums `(W B, D + 4)`. Losses whose negatives depend on the positives (mined
    multi-similarity, triplet) need two more small ones. On one rank, and outside of distributed training, it works as
    an `EmbeddingMemory`.

    The loss has to be called with `ranks`, as `MetricLearner` and `against_memory` do. In code of your own write:

        rows = memory.read()
        loss(z, y, rows.embeddings, rows.labels, ranks=rows.ranks)

    Args:
        size: Rows kept over all ranks, at least 1; rounded up to a multiple of the number of ranks.
        dtype: How embeddings are stored, see `EmbeddingMemory`.

    Attributes:
        share: The rows of this rank.
        rank: This rank.
        world_size: Number of ranks.

    Raises:
        ValueError: If `size` is below 1.
        TypeError: If `size` is not a whole number, or `dtype` not floating point.

    Example:
        >>> memory = ShardedMemory(size=3)
        >>> for label in range(5):
        ...     _ = memory.enqueue(torch.randn(1, 8), torch.tensor([label]))
        >>> memory.read().labels
        tensor([2, 3, 4])
    """

    def __init__(self, size: int, dtype: Storage = torch.float32) -> None:
        self.share = _Share(size, dtype)
        self._size = size
        self._gather, self._gather_contexts = RowGather(), RowGather()
        self.reset()

    # ---------------------------------------------------------------- the interface of every memory
    def reset(self) -> None:
        """Forget rows and counters."""
        self._entered = 0
        self.dropped = 0
        self._read_without_ranks = False
        self.rank, self.world_size = ranks()
        self.share.size = -(-self._size // self.world_size)
        self.share.reset()

    def enqueue(
        self, embeddings: Tensor, labels: Tensor, indices: Tensor | None = None, *, step: int | None = None
    ) -> int:
        """Append the rows of all ranks, the same on every rank, of which this rank keeps its share.

        Args:
            embeddings: `(B, D)` floating point.
            labels: `(B,)` integers.
            indices: `(B,)` integers, the data-set index of each row's image; -1 is unknown.
            step: The time to note for these rows; by default the number of earlier calls.

        Returns:
            How many rows were dropped because they had no direction.
        """
        if self._read_without_ranks and len(self):
            self._read_without_ranks = False
            warnings.warn(
                "A ShardedMemory was read, but the loss saw this rank's share only. Pass `ranks=memory` to the "
                "loss, or use `against_memory`.",
                stacklevel=2,
            )
        self.share.kept = slice((self.rank - self._entered) % self.world_size, None, self.world_size)
        dropped = self.share.enqueue(embeddings, labels, indices, step=step)
        self._entered += len(labels) - dropped
        self.dropped += dropped
        return dropped

    def read(self) -> MemoryRows:
        """Return this rank's share, oldest first, with `ranks`: `(m, D)`, `(m,)`, `(m,)`; no copy."""
        self._read_without_ranks = self.world_size > 1
        share = self.share.read()
        rows = MemoryRows(*share)
        rows.ranks, rows.rounded = self, share.rounded
        return rows

    def __len__(self) -> int:
        """Return the number of valid rows over all ranks."""
        return min(self._entered, self.size)

    def __repr__(self) -> str:
        """Return size, fill, ranks and the share."""
        return f"ShardedMemory(size={self.size}, rows={len(self)}, ranks={self.world_size}, share={self.share})"

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedMemory:
        """Return the same object, as `EmbeddingMemory` does."""
        return self

    @property
    def size(self) -> int:
        """Rows kept over all ranks."""
        return self.share.size * self.world_size

    @size.setter
    def size(self, size: int) -> None:
        self._size = size

    @property
    def steps(self) -> Tensor:
        """For each row of this rank's share the step at which it entered, `(m,)`."""
        return self.share.steps

    @property
    def batches(self) -> int:
        """Calls of `enqueue` so far."""
        return self.share.batches

    @property
    def was_read(self) -> bool:  # type: ignore[override]
        """Whether `read` was called since `reset`."""
        return self.share.was_read

    @property
    def dtype(self) -> torch.dtype:
        """How embeddings are stored."""
        return self.share.dtype

    @property
    def dim(self) -> int:
        """The `D` of the stored rows; 0 before the first of this share."""
        return self.share.dim

    @property
    def device(self) -> torch.device:
        """Where the share is."""
        return self.share.device

    @property
    def nbytes(self) -> int:
        """Bytes of this rank."""
        return self.share.nbytes

    def to(self, device: torch.device | str) -> ShardedMemory:
        """Move the share to a device."""
        self.share.to(device)
        return self

    # ---------------------------------------------------------------- how ranks reach each other, for the losses
    def gather(self, embeddings: Tensor, labels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Return the rows of all ranks in rank order, and how many are of each rank."""
        self._read_without_ranks = False
        rows = self._gather(*as_rows(embeddings, labels, indices))
        return (*rows, self._gather.counts)

    def gather_contexts(self, contexts: Tensor) -> Tensor:
        """Return the rows of all ranks in rank order."""
        unknown = torch.zeros(len(contexts), dtype=torch.int64, device=contexts.device)
        return self._gather_contexts(contexts, unknown, unknown)[0]

    def all_to_all(self, states: Tensor, counts: list[int]) -> Tensor:
        """Send each rank its rows of `(A, S)`, `counts` of each; return those of this rank, `(W, B, S)`."""
        if self.world_size == 1:
            return states[None]
        own = counts[self.rank]
        received = states.new_empty(self.world_size * own, states.shape[1])
        dist.all_to_all_single(received, states.contiguous(), [own] * self.world_size, counts)
        return received.view(self.world_size, own, states.shape[1])

    # ---------------------------------------------------------------- checkpoints
    def state_dict(self) -> dict[str, Any]:
        """Return the rows of all ranks, as an `EmbeddingMemory` of this size would save them.

        All ranks have to call it together; rank 0 has the result, the others return an empty dictionary. Shares are
        sent one after the other, and copied to the CPU of rank 0.
        """
        shares = [self.share.state_dict()]
        if self.world_size > 1:
            shares = self._collect_on_rank_0(shares[0])
        if self.rank:
            return {}
        # Row n of all that ever entered is row n // W of rank n % W.
        numbers = torch.cat([self._numbers(rank) for rank in range(self.world_size)])
        order = numbers.argsort()
        filled = [share for share in shares if len(share["labels"])] or shares[:1]
        rows = {name: torch.cat([share[name] for share in filled])[order] for name in TENSORS}
        offsets = [share["offset"] for share in shares]
        return {**shares[0], **rows, "offset": 0, "offsets": offsets, "entered": self._entered, "dropped": self.dropped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this rank's share of the rows of an `EmbeddingMemory`, or of a memory with any number of ranks.

        Raises:
            ValueError: If entries are missing or do not fit each other, or an embedding is not finite.
        """
        check_state("EmbeddingMemory", state, EmbeddingMemory.state_names)
        self.reset()
        self._entered = state.get("entered", len(state["labels"]))
        own = torch.arange(self._entered - len(state["labels"]), self._entered) % self.world_size == self.rank
        offsets = state.get("offsets", [])
        offset = offsets[self.rank] if len(offsets) == self.world_size else 0
        self.share.kept = slice(None)
        self.share.load_state_dict({**state, **{name: state[name][own] for name in TENSORS}, "offset": offset})
        self.dropped = state["dropped"]

    def _numbers(self, rank: int) -> Tensor:
        """Return which of all rows that ever entered are in the share of a rank."""
        end = -(-(self._entered - rank) // self.world_size)
        return torch.arange(max(0, end - self.share.size), end) * self.world_size + rank

    def _collect_on_rank_0(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the states of all shares on rank 0, nothing on the others."""
        offset = torch.tensor([own["offset"]], device=self.device)
        if self.rank:
            for part in (offset, *(own[name].to(self.device) for name in TENSORS)):
                dist.send(part.contiguous(), dst=0)
            return []
        shares = [own]
        for rank in range(1, self.world_size):
            dist.recv(offset, src=rank)
            rows = len(self._numbers(rank))
            share: dict[str, Any] = {"offset": int(offset)}
            for name in TENSORS:
                part = torch.empty(rows, *own[name].shape[1:], dtype=own[name].dtype, device=self.device)
                dist.recv(part, src=rank)
                share[name] = part.cpu()
            shares.append(share)
        return shares
