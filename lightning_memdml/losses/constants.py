"""Constants that are copied to a device once, since a CUDA graph cannot contain a copy from the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ON_DEVICE: dict[tuple[Any, torch.dtype, torch.device], Tensor] = {}


def constant_like(values: tuple[Any, ...], tensor: Tensor) -> Tensor:
    """Return numbers, or rows of them as tuples, in the dtype and on the device of a tensor. Do not change the result.

    Example:
        >>> constant_like((0.0, 0.5), torch.ones(3, dtype=torch.float64))
        tensor([0.0000, 0.5000], dtype=torch.float64)
    """
    key = values, tensor.dtype, tensor.device
    if torch.compiler.is_compiling() or key not in _ON_DEVICE:
        with torch.inference_mode(False):
            made = torch.tensor(values, dtype=tensor.dtype, device="cpu")
            made = made.to(tensor.device, non_blocking=True)  # else the host would wait for a GPU
        if torch.compiler.is_compiling():
            return made
        _ON_DEVICE[key] = made
    return _ON_DEVICE[key]
