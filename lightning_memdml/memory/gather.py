"""The rows of all ranks, in rank order, with one collective per step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_memdml.compat import all_gather_single

# A message is an int32 matrix: a header row, then one row per image: its embedding (the bits of D float32), its label
# and its index (the bits of one int64 each, two int32 wide).
_HEADER = 4

Batch = tuple[Tensor, Tensor, Tensor]
"""Embeddings, labels and indices."""


def ranks() -> tuple[int, int]:
    """Return this process's rank and the number of ranks: `(0, 1)` outside of distributed training."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class RowGather:
    """Concatenates the batches of all ranks, rank 0 first, for any number of rows on each rank.

    All ranks send a message of the same shape: a header (rows, D), and as many slots as any rank ever needed. All ranks
    gather a second time only if a header asks for more slots, or for another D. Every rank decides from the same
    headers, so none waits in a collective that another does not enter. Usually a step has one collective, of
    `W * (slots + 1) * (D + 4) * 4` bytes, and on a GPU the host waits once, for the headers.

    Without a process group of more than one rank, the batch is returned as it is.

    Attributes:
        counts: Rows of each rank in the last call.

    Example:
        >>> gather = RowGather()
        >>> gather(torch.ones(1, 2), torch.tensor([3]), torch.tensor([-1]))
        (tensor([[1., 1.]]), tensor([3]), tensor([-1]))
    """

    def __init__(self) -> None:
        self.counts: list[int] = []
        self._slots = 0
        self._dim = 0
        self._started: tuple[Batch, Tensor, dist.Work] | None = None

    def start(self, embeddings: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Send a batch, without waiting for those of the other ranks; `finish` waits. Every rank has to do both.

        The arguments are those of `__call__`.
        """
        batch = embeddings, labels, indices
        message = self._pack(*batch)
        received = message.new_empty(dist.get_world_size(), *message.shape)
        self._started = batch, received, all_gather_single(received.flatten(0, 1), message, async_op=True)

    @property
    def is_started(self) -> bool:
        """Whether a batch was sent that is not finished."""
        return self._started is not None

    def finish(self) -> Batch:
        """Return the batches of all ranks, in rank order, after `start`."""
        assert self._started is not None
        batch, received, work = self._started
        self._started = None
        work.wait()
        return self._combine(batch, received)

    def __call__(self, embeddings: Tensor, labels: Tensor, indices: Tensor) -> Batch:
        """Gather a batch whose tensors went through `as_rows`.

        Args:
            embeddings: `(b, D)` float32, `b` may differ between ranks and be 0.
            labels: `(b,)` int64.
            indices: `(b,)` int64.

        Returns:
            The same three of all ranks, bit for bit, in rank order.

        Raises:
            ValueError: On every rank, if the ranks' `D` differ.
        """
        if ranks()[1] == 1:
            self.counts = [len(labels)]
            return embeddings, labels, indices
        batch = embeddings, labels, indices
        return self._combine(batch, self._exchange(self._pack(*batch)))

    def _combine(self, batch: Batch, received: Tensor) -> Batch:
        """Return the rows in the messages of all ranks, which are exchanged again if they did not fit."""
        rows, dims = received[:, 0, :_HEADER].contiguous().view(torch.int64).T.tolist()
        self.counts = rows
        if len(set(dims)) > 1:
            raise ValueError(
                f"Expected embeddings of one D on all ranks but got D={dims} on ranks 0, 1, ... Build the same network "
                "on every rank."
            )
        if max(rows) > self._slots or dims[0] != self._dim:
            self._slots, self._dim = max(rows), dims[0]
            received = self._exchange(self._pack(*batch))
        return self._unpack(torch.cat([message[1 : 1 + count] for message, count in zip(received, rows, strict=True)]))

    def _pack(self, embeddings: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        rows, dim = embeddings.shape
        header = torch.tensor([rows, dim], dtype=torch.int64).view(torch.int32)
        message = torch.zeros(1 + self._slots, self._dim + _HEADER, dtype=torch.int32, device=embeddings.device)
        message[0, :_HEADER] = header
        # If they do not fit, the header alone is enough for every rank to see it.
        if rows <= self._slots and dim == self._dim:
            message[1 : 1 + rows, :dim] = embeddings.contiguous().view(torch.int32)
            message[1 : 1 + rows, dim:] = torch.stack([labels, indices], dim=1).view(torch.int32)
        return message

    def _exchange(self, message: Tensor) -> Tensor:
        received = message.new_empty(dist.get_world_size(), *message.shape)
        all_gather_single(received.flatten(0, 1), message)
        return received

    def _unpack(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # A copy in any case: an int64 may not start in the middle of one, which a slice of a single row can.
        metadata = rows[:, self._dim :].clone(memory_format=torch.contiguous_format).view(torch.int64)
        labels, indices = metadata.unbind(dim=1)
        return rows[:, : self._dim].contiguous().view(torch.float32), labels, indices
