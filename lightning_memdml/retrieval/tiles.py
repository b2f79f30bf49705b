"""Blocks of similarity matrices, and their computation in full float32 precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def row_slices(total: int, size: int) -> Iterator[slice]:
    """Return slices of at most `size` rows that cover `total` rows."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def ramped_tiles(total: int, size: int) -> Iterator[slice]:
    """Yield slices that cover `total` rows and double from 256 up to `size`.

    Before the first tile every positive can still change a score, and most references of a tile are hits. A few hundred
    references show which positives cannot, which divides the hits of a large set by 3 to 4.
    """
    start, step = 0, min(256, size)
    while start < total:
        yield slice(start, min(start + step, total))
        start, step = start + step, min(2 * step, size)


def unit_float32(rows: Tensor) -> Tensor:
    """Return rows `(N, D)` of norm 1 in float32, whatever their norm; a zero row stays zero."""
    exact = rows.double()
    return (exact / exact.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)).float()


@contextmanager
def full_precision_products(device: torch.device) -> Iterator[None]:
    """Compute float32 matrix products in float32 inside the block: no autocast, no TF32, no bfloat16 passes."""
    with torch.autocast(device.type, enabled=False):
        mkldnn: Any = torch.backends.mkldnn
        backends: list[Any] = [torch.backends.cuda.matmul, mkldnn.matmul]
        previous = [backend.fp32_precision for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            for backend, precision in zip(backends, previous, strict=True):
                backend.fp32_precision = precision
