"""Where tests run the kernels of Triton: on a GPU if there is one, and in Triton's interpreter otherwise."""

from __future__ import annotations

import functools

import pytest
import torch
import triton
import triton.language as tl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter shows what the kernel computes but for rounding. Tensor cores have no float32.
DTYPE, TOLERANCE = (torch.float32, 1e-5) if DEVICE == "cpu" else (torch.float16, 2e-3)


@triton.jit
def _count(numbers, stop):
    for k in tl.range(0, stop):
        tl.store(numbers + k, k)


@functools.cache
def loops() -> bool:
    """Whether the interpreter can run a loop: older versions of Triton cannot with newer versions of NumPy."""
    try:
        _count[(1,)](torch.zeros(3, dtype=torch.int32, device=DEVICE), 3)
    except Exception as error:
        if "0-dimensional arrays" not in str(error) and "an array with ndim > 0 to a scalar" not in str(error):
            raise
        return False
    return True


def skip_without_loops() -> None:
    if not loops():
        pytest.skip(f"Triton {triton.__version__} cannot loop in its interpreter with this NumPy")
