"""Differences between versions of torch and Lightning, and private names of third parties, all in this one file.

Each entry gives its reason and the versions it was tested with. `tests/test_compat.py` fails when upstream changes.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def all_gather_single(output: Tensor, input: Tensor) -> None:
    """Gather one tensor of the same shape from every rank into one tensor, rank 0 first.

    torch 2.14 deprecates `all_gather_into_tensor` in favour of `all_gather_single`, which torch 2.10 does not have.
    Tested with torch 2.10 and 2.14.

    Args:
        output: `(W * N, ...)`, overwritten.
        input: `(N, ...)`, of the same shape on every rank.
    """
    # Looked up at each call, so that a test can count the calls.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(output, input)
