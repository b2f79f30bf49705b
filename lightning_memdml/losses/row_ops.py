"""Reductions over the rows of a masked block, also of empty rows, and two functions that are faster than torch's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2_E = math.log2(math.e)
#: Types of devices from which the host reads a number at no cost. From others it would have to wait for it.
HOST_DEVICES = {"cpu"}
#: Types of devices on which torch multiplies 16-bit numbers with sums in float32, `torch.mm(out_dtype=)`. Elsewhere
#: (Apple's MPS, for example) references in 16 bits are widened before they are multiplied.
WIDENING_DEVICES = {"cuda"}


def row_max(block: Tensor) -> Tensor:
    """Return the largest entry of each row, `-inf` for a row without any."""
    return block.amax(dim=1) if block.shape[1] else block.new_full(block.shape[:1], -torch.inf)


def row_min(block: Tensor, empty: float = torch.inf) -> Tensor:
    """Return the smallest entry of each row, `empty` for a row without any."""
    return block.amin(dim=1) if block.shape[1] else block.new_full(block.shape[:1], empty)


def hardest(similarity: Tensor, mask: Tensor, number: int) -> Tensor:
    """Return the mask of the largest `number` masked entries of each row; of all, where there are fewer."""
    columns = similarity.masked_fill(~mask, -torch.inf).topk(min(number, similarity.shape[1]), dim=1).indices
    return torch.zeros_like(mask).scatter(1, columns, True) & mask


def masked_logsumexp(logits: Tensor, mask: Tensor) -> Tensor:
    """Return `log sum exp` of the masked entries of each row, `-inf` for a row without any."""
    return torch.logsumexp(logits.masked_fill(~mask, -torch.inf), dim=1)


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the softmax over the masked entries of each row, 0 elsewhere and in a row without any."""
    total = masked_logsumexp(logits, mask).clamp_min(torch.finfo(logits.dtype).min)
    return torch.where(mask, torch.exp(logits - total[:, None]), 0.0)


def softplus(x: Tensor) -> Tensor:
    """Return `log(1 + exp(x))`. Above 40 it is x, which is exact in float64 too; torch turns linear at 20."""
    return F.softplus(x, threshold=40.0)


def exp_(x: Tensor) -> Tensor:
    """Overwrite `x` with its exponential, through base 2: half the time, and `1e-7 |x|` from the exact one."""
    return x.mul_(LOG2_E).exp2_()
