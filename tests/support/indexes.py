"""Rows of an index, and their names."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memdml.retrieval.index import IndexedImages


def clustered(count: int, dim: int, seed: int = 0, classes: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=generator)
    rows = centres[torch.arange(count) % classes] + 0.7 * torch.randn(count, dim, generator=generator)
    return rows / rows.norm(dim=1, keepdim=True)


def named(count: int) -> IndexedImages:
    return IndexedImages(
        [f"{row}.jpg" for row in range(count)],
        [row % 40 for row in range(count)],
        [f"class {row % 40}" for row in range(count)],
    )
