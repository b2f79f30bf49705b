"""Lists some of the pairs of anchors and references, so that only these are computed. On a CPU.

Where 7 % of the pairs have a weight, to find them, to multiply them one by one and to add them up takes a seventh less
time than two products of whole matrices. Masks are read by numpy, whose functions take half of the time of torch's, or
less. A GPU would have to wait for the number of pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def flatnonzero(mask: Tensor) -> Tensor:
    """Return the numbers of the true entries of a mask on a CPU, flattened. `Tensor.nonzero` takes 6 times as long."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


class ListedPairs(NamedTuple):
    """N pairs of B anchors and n references, anchor after anchor.

    Attributes:
        rows: The anchor of each pair, `(N,)`.
        columns: The reference of each pair, `(N,)`.
        starts: How many pairs the anchors before have, `(B + 1,)`.
        exists: As many true entries in each row as the anchor has pairs, all on the left, `(B, P)`.
    """

    rows: Tensor
    columns: Tensor
    starts: Tensor
    exists: Tensor

    def pad(self, values: Tensor) -> Tensor:
        """Return a value of each pair, `(N,)`, as rows `(B, P)` that are padded with 0."""
        padded = values.new_zeros(self.exists.shape)
        padded.numpy()[self.exists.numpy()] = values.numpy()
        return padded

    def weigh(self, weights: Tensor, references: Tensor) -> Tensor:
        """Return the sum of weight times reference over the pairs of each anchor, `(B, D)`.

        Args:
            weights: `(B, P)`, read only where there is a pair.
            references: `(n, D)`.
        """
        of_pairs = torch.from_numpy(weights.to(references.dtype).numpy()[self.exists.numpy()])
        return F.embedding_bag(self.columns, references, self.starts[:-1], mode="sum", per_sample_weights=of_pairs)


def list_pairs(mask: Tensor) -> ListedPairs:
    """List the pairs of a mask `(B, n)`."""
    anchors, width = mask.shape
    numbers = np.flatnonzero(mask.numpy())
    starts = np.searchsorted(numbers, np.arange(anchors + 1) * width)
    number = np.diff(starts)
    exists = np.arange(number.max(initial=0)) < number[:, None]
    rows = torch.from_numpy(np.arange(anchors).repeat(number))
    columns = torch.from_numpy(numbers).sub_(rows, alpha=width)
    return ListedPairs(rows, columns, torch.from_numpy(starts), torch.from_numpy(exists))
