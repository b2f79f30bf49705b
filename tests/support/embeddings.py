"""Random embeddings in classes."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(count: int, classes: int, dim: int, seed: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, dim, generator=generator)
    return centres[labels] + noise * torch.randn(count, dim, generator=generator), labels
