"""Reductions over the rows of a masked block, also of empty rows, and functions that are faster than torch's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

LOG2_E = math.log2(math.e)
FACTORS = 64  # numbers in [1/2, 1] whose product float32 can hold
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


def sum_negative_logs(block: Tensor) -> Tensor:
    """Return each row's sum of `-log` of its entries, which must lie in [1/2, 1].

    The logarithm of a product takes the place of the logarithms of its 64 factors, each of which costs as much as seven
    additions. A product of 64 such entries is at least 2^-64, and as exact as the sum.
    """
    if has_torch_function_unary(block):  # a loss that is translated for a GPU
        return handle_torch_function(sum_negative_logs, (block,), block)
    whole = block.shape[1] // FACTORS * FACTORS
    products = block[:, :whole].unflatten(1, (whole // FACTORS, FACTORS)).prod(dim=2)
    rest = block[:, whole:].prod(dim=1, keepdim=True)
    return torch.cat([products, rest], dim=1).log_().sum(dim=1).neg_()
