"""Reductions over the rows of a masked block that are defined for empty rows too."""

from __future__ import annotations

import torch
from torch import Tensor


def row_max(block: Tensor) -> Tensor:
    """Return the largest entry of each row, ``-inf`` for a row without any."""
    return block.amax(dim=1) if block.shape[1] else block.new_full(block.shape[:1], -torch.inf)


def masked_logsumexp(logits: Tensor, mask: Tensor) -> Tensor:
    """Return ``log sum exp`` of the masked entries of each row, ``-inf`` for a row without any."""
    return torch.logsumexp(logits.masked_fill(~mask, -torch.inf), dim=1)


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the softmax over the masked entries of each row, 0 elsewhere and in a row without any."""
    total = masked_logsumexp(logits, mask).clamp_min(torch.finfo(logits.dtype).min)
    return torch.where(mask, torch.exp(logits - total[:, None]), 0.0)


def softplus(x: Tensor) -> Tensor:
    """Return ``log(1 + exp(x))``; exact in float64, where the library's function turns linear above 20."""
    return torch.logaddexp(x, torch.zeros_like(x))
