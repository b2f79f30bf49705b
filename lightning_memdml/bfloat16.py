"""Where bfloat16 products are fast, and how much they lose. Used to decide what has to be computed in float32."""

from __future__ import annotations

import functools
import os

import torch

from lightning_memdml import compat

#: Largest relative error of rounding to bfloat16, which keeps 8 binary digits.
ROUNDOFF = 2.0**-8
#: Width of embeddings from which a bfloat16 product pays. Below it, the passes over the similarities cost more.
SMALLEST_DIM = 64


#: Values of `ONEDNN_MAX_CPU_ISA` without AVX512-BF16, ascending. All values above them have it. With the first five a
#: bfloat16 product takes 7 times as long as one in float32, with the last two as long.
ONEDNN_LIMITS_WITHOUT_BF16 = ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni")


def has_fast_bf16_matmul(device: torch.device) -> bool:
    """Whether a bfloat16 product takes at most half the time of a float32 one.

    It does on CPUs with AVX512-BF16 (AMX implies it), where torch multiplies by oneDNN and oneDNN may use these
    instructions. CUDA devices are left out: there the host would have to wait to learn what has to be computed again.

    Args:
        device: Where the embeddings are.
    """
    if device.type != "cpu" or not compat.has_avx512_bf16():
        return False
    by_onednn = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return by_onednn and not is_onednn_limited_below_bf16()


@functools.cache
def is_onednn_limited_below_bf16() -> bool:
    """Whether the environment keeps oneDNN from using AVX512-BF16 instructions.

    oneDNN reads `ONEDNN_MAX_CPU_ISA`, or where that is unset or empty the older `DNNL_MAX_CPU_ISA`, once in a process.
    It takes capitals and small letters, and an unknown value for no limit.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", "")
    return limit.lower() in ONEDNN_LIMITS_WITHOUT_BF16
