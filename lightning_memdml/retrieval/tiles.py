"""How large similarity matrices are cut, and computed in full float32 precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def split_rows(total: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows that cover `total` rows."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def ramped_tiles(total: int, size: int) -> Iterator[slice]:
    """Slices that cover `total` rows and double from 256 up to `size`.

    Before the first tile every positive is alive and most references of a tile are hits; a few hundred
    references tell which positives are out of the running, which cuts the hits of a large set by 3 to 4.
    """
    start, step = 0, min(256, size)
    while start < total:
        yield slice(start, min(start + step, total))
        start, step = start + step, min(2 * step, size)


@contextmanager
def full_precision_products(device: torch.device) -> Iterator[None]:
    """Float32 matrix products in float32 while inside: no autocast, no TF32, no bfloat16 passes."""
    with torch.autocast(device.type, enabled=False):
        backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
        if not all(hasattr(backend, "fp32_precision") for backend in backends):  # torch 2.8
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)
            return
        previous = [backend.fp32_precision for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            for backend, precision in zip(backends, previous, strict=True):
                backend.fp32_precision = precision
