"""Where bfloat16 products are fast, and what they lose: for deciding what has to be computed in full precision."""

from __future__ import annotations

import torch

#: Largest relative error of rounding to bfloat16, which keeps 8 binary digits.
ROUNDOFF = 2.0**-8
SMALLEST_DIM = 64  # of shorter rows, the passes over the similarities cost more than the product


def pays(device: torch.device, dim: int) -> bool:
    """Whether similarities of rows of length ``dim`` take half the time: on x86 with AVX512-BF16 (AMX implies it).

    CUDA devices are left out: there, what has to be looked at again would make the host wait.
    """
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # the public `get_capabilities` is newer than 2.8
    return dim >= SMALLEST_DIM and device.type == "cpu" and native is not None and native()
