"""Where bfloat16 products are fast, and how much they lose. Used to decide what has to be computed in float32."""

from __future__ import annotations

import torch

from lightning_memdml import compat

#: Largest relative error of rounding to bfloat16, which keeps 8 binary digits.
ROUNDOFF = 2.0**-8
#: Width of embeddings from which a bfloat16 product pays. Below it, the passes over the similarities cost more.
SMALLEST_DIM = 64


def has_fast_bf16_matmul(device: torch.device) -> bool:
    """Whether a bfloat16 product takes half the time of a float32 one: on CPUs with AVX512-BF16 (AMX implies it).

    CUDA devices are left out: there the host would have to wait to learn what has to be computed again.

    Args:
        device: Where the embeddings are.
    """
    return device.type == "cpu" and compat.has_avx512_bf16()
