"""Where bfloat16 products are fast, and how far their results may lie from the exact ones."""

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


def similarity_error(dim: int, longest: float = 1.0) -> float:
    r"""Return a bound of the error of similarities that are multiplied in bfloat16, summed in float32 and rounded.

    .. math:: 1.02 \, (3 \cdot 2^{-8} + D \, 2^{-23}) \max_i \|x_i\| \max_j \|r_j\|

    One :math:`2^{-8}` each for the rounding of x, of r and of the result; sums may truncate, which doubles their error;
    2 % are for products of two errors.

    Args:
        dim: Length D of the rows.
        longest: Product of the largest lengths of either side.

    Example:
        >>> round(similarity_error(128), 4)
        0.012
    """
    return 1.02 * (3 * ROUNDOFF + dim * 2.0**-23) * longest
