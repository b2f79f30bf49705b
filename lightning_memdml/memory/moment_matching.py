"""A FIFO memory whose rows follow the distribution of the network's present embeddings."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memdml.memory.embedding_memory import EmbeddingMemory, TableMemory
from lightning_memdml.memory.gather import ranks
from lightning_memdml.memory.rows import NewRows, Storage

#: The smallest batch that is known to gain (experiments/results/study/README.md, A). Between it and 32, where trainings
#: were ruined (F), nothing was measured.
SMALLEST_BATCH = 64


class MomentMatchedMemory(EmbeddingMemory):
    r"""A FIFO memory whose rows are moved to the moments of each new batch (cross batch normalisation, XBN).

    $$
    \hat z_m = \sigma_b \odot (z_m - \mu_m) / \sigma_m + \mu_b, \qquad z_m \leftarrow \hat z_m / |\hat z_m|
    $$

    Means $\mu$ and standard deviations $\sigma$ are per dimension, over the stored rows $m$ and over the batch $b$. As
    the network changes, stored rows fall behind its embeddings. A shift and a scale per dimension correct a part of
    this drift without a second network: it is the cheapest rival of a `MomentumEncoder`. The moments of a small batch
    are noisy, so batches, over all ranks, should have 64 rows or more. With 16 and 32 they ruined trainings, and a
    smaller batch than 64 gives one warning.

    Rows are moved when a batch is stored, before its own rows are added. That reads and writes the memory three times
    per step. A batch of one row moves nothing.

    Args:
        size: Rows kept, at least 1. None: as many as there are training images, which `MemoryCallback` finds out.
        dtype: How embeddings are stored, see `EmbeddingMemory`. In 16 bits every step rounds the rows again.

    Raises:
        ValueError: If `size` is below 1.
        TypeError: If `size` is not a whole number, or `dtype` not floating point.

    References:
        Ajanthan et al. 2023, "Adaptive Cross Batch Normalization for Metric Learning".

    Example:
        >>> memory, labels = MomentMatchedMemory(size=128), torch.arange(64)
        >>> _ = memory.enqueue(torch.tensor([[1.0, 0.1], [1.0, -0.1]]).repeat(32, 1), labels)
        >>> _ = memory.enqueue(torch.tensor([[0.1, 1.0], [-0.1, 1.0]]).repeat(32, 1), labels)
        >>> memory.read().embeddings[:2].round(decimals=1)  # they follow the batch to the other axis
        tensor([[0., 1.],
                [0., 1.]])
    """

    size: int | None  # type: ignore[assignment]  # None until the callback knows the training set

    def __init__(self, size: int | None = None, dtype: Storage = torch.float32) -> None:
        TableMemory.__init__(self, size, dtype)  # an EmbeddingMemory needs its size at once
        self._has_warned = False

    def _slots_needed(self) -> int:
        if self.size is None:
            raise ValueError(
                "Expected MomentMatchedMemory to have a `size` but got None. Pass `size=`, a number of rows, which "
                "`MemoryCallback` sets only if the training set has a length."
            )
        return super()._slots_needed()

    def _store(self, new: NewRows) -> None:
        """Move the stored rows to the moments of the new ones, then store those."""
        self._warn_of_small_batch(len(new.embeddings))
        held = self._table.rows.embeddings
        if len(held) and len(new.embeddings) > 1:
            held.copy_(match_moments(held.float(), new.embeddings))
        super()._store(new)

    def _warn_of_small_batch(self, rows: int) -> None:
        if not 1 < rows < SMALLEST_BATCH or self._has_warned:
            return
        self._has_warned = True
        if ranks()[0] == 0:  # all ranks store the same rows
            warnings.warn(
                f"Expected batches of at least {SMALLEST_BATCH} rows, over all ranks, for MomentMatchedMemory but got "
                f"{rows}: the moments of a small batch are noisy. Against a plain queue it gained 1.0 points of MAP@R "
                "with batches of 64; it lost 7.0 with batches of 16, and 5.9 and 28.7 with batches of 32, which ruined "
                "these trainings. Pass a larger batch, or `MemoryCallback(encoder_momentum=0.99)` in place of this "
                "memory.",
                stacklevel=4,
            )


def match_moments(rows: Tensor, batch: Tensor) -> Tensor:
    """Give rows the mean and the standard deviation of a batch in each dimension, and then unit length.

    Args:
        rows: `(M, D)`.
        batch: `(B, D)`, at least two rows.

    Returns:
        `(M, D)`. A dimension in which all rows are equal is shifted, not scaled.
    """
    deviation, mean = torch.std_mean(rows, dim=0, correction=0)
    batch_deviation, batch_mean = torch.std_mean(batch, dim=0, correction=0)
    scale = batch_deviation / deviation.clamp_min(torch.finfo(rows.dtype).eps)
    return F.normalize((rows - mean).mul_(scale).add_(batch_mean), dim=1)
