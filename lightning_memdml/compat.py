"""Differences between versions of torch and Lightning, and private names of third parties, all in this one file.

Each entry gives its reason and the versions it was tested with. `tests/test_compat.py` fails when upstream changes.
"""

from __future__ import annotations

import functools

import torch
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


@functools.cache
def has_avx512_bf16() -> bool:
    """Whether the processor has AVX512-BF16 instructions.

    `torch.cpu.get_capabilities` is public but newer than torch 2.10, which has the private
    `torch.cpu._is_avx512_bf16_supported`. Tested with torch 2.10 and 2.14.
    """
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if get_capabilities is not None:
        return bool(get_capabilities().get("avx512_bf16", False))
    return bool(torch.cpu._is_avx512_bf16_supported())
