"""Rows in bfloat16 beside those in float32, so that a loss need not round a memory anew in every step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_memdml import compat

#: No bound of a copy is below this. Unit rows are shorter, so the bound does not depend on which rows a table held
#: before: what a loss computes after a resume is bit for bit what it would have computed without.
LEAST_BOUND = 1.001


class RoundedRows(NamedTuple):
    """Rows in bfloat16, with a bound that their float32 originals keep.

    Attributes:
        rows: `(M, D)` bfloat16.
        longest: At least the Euclidean length of each of the originals; NaN or infinite if one of them is.
    """

    rows: Tensor
    longest: float


def round_rows(rows: Tensor) -> RoundedRows:
    """Round rows `(M, D)` to bfloat16, M at least 1.

    Example:
        >>> round_rows(torch.tensor([[3.0, 4.0], [0.6, 0.8]])).longest
        5.0
    """
    return RoundedRows(rows.bfloat16(), torch.linalg.vector_norm(rows, dim=1).max().item())


class BFloat16Copy:
    """A bfloat16 copy of a table, made when it is first read and kept equal to the table.

    It costs 2 bytes for each number of the table. torch counts the in-place changes of a tensor together with those of
    its views. If the table was changed and `update` was not called for it, the next `read` rounds the whole table. A
    change that torch does not count, through `.data` or numpy, is missed.

    Args:
        table: `(N, D)` float32.

    Attributes:
        is_made: Whether it was read.

    Example:
        >>> table = torch.ones(3, 2)
        >>> copy = BFloat16Copy(table)
        >>> _ = table[0].fill_(3.0)
        >>> copy.read(slice(0, 2)).rows
        tensor([[3., 3.],
                [1., 1.]], dtype=torch.bfloat16)
    """

    def __init__(self, table: Tensor) -> None:
        self._table = table
        self.is_made = False
        self._rows = table.new_empty(0, dtype=torch.bfloat16)
        self._longest = LEAST_BOUND
        self._changes: int | None = None  # of the table, when the copy was last equal to it

    @property
    def is_current(self) -> bool:
        """Whether the copy was made, and every change since then was passed to `update`."""
        return self._changes is not None and self._changes == compat.in_place_changes(self._table)

    @property
    def nbytes(self) -> int:
        """Bytes of the copy, 0 before it is first read."""
        return self._rows.nbytes

    def update(self, slots: slice | Tensor) -> None:
        """Round the rows of some slots, which were written while the copy was current."""
        rows = self._table[slots]
        if len(rows):
            self._rows[slots], longest = round_rows(rows)
            self._longest = max(longest, self._longest)  # a NaN stays, since it comes first
        self._note_changes()

    def read(self, slots: slice) -> RoundedRows:
        """Return the rows of some slots."""
        if not self.is_current:
            self.is_made = True
            with torch.inference_mode(False):  # so that a later step in training can update it
                self._rows, longest = round_rows(self._table)
            self._longest = max(longest, LEAST_BOUND)
            self._note_changes()
        return RoundedRows(self._rows[slots], self._longest)

    def _note_changes(self) -> None:
        # A length that is not finite would stay after its row was replaced, so the next `read` rounds all rows again.
        self._changes = compat.in_place_changes(self._table) if math.isfinite(self._longest) else None
