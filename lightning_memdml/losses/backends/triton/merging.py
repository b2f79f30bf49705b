"""Combines what the programs of the kernel wrote to the totals of all negatives, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_memdml.losses.definition import LossDefinition, NegativeTotals

NUMBERS_AT_ONCE = 16  # of each state, which a program adds up at once


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    states, anchors, each, gradient, sums, num_states, num_anchors,
    dim: tl.constexpr, num_sums: tl.constexpr, exponential: tl.constexpr, with_gradient: tl.constexpr,
    padded_states: tl.constexpr, at_once: tl.constexpr,
):  # fmt: skip
    """Merge the states of one anchor, as `NegativeAccumulator.merge` and `totals` do.

    Shapes: states `(num_states, B, 3 + dim + num_sums)`, without dim where there is no gradient; anchors and gradient
    `(B, dim)`; sums `(B, num_sums)`; each `(3, B)`, for total, weighted and hardest.
    """
    i = tl.program_id(0).to(tl.int64)
    width = 3 + (dim if with_gradient else 0) + num_sums
    w = tl.arange(0, padded_states)
    exists = w < num_states
    state = states + (w.to(tl.int64) * num_anchors + i) * width
    total = tl.load(state, mask=exists, other=0.0)
    hardest = tl.max(tl.load(state + 2, mask=exists, other=float("-inf")), 0)
    scale = tl.where(exists, 1.0, 0.0)
    norm = 1.0
    if exponential:
        shifts = tl.load(state + 1, mask=exists, other=-3.4028234663852886e38)
        shift = tl.max(shifts, 0)
        scale = tl.where(exists, tl.exp(shifts - shift), 0.0)
        total_of_all = tl.sum(total * scale, 0)
        norm = tl.maximum(total_of_all, 1.1754943508222875e-38)
        total_of_all = tl.where(total_of_all > 0, tl.log(norm) + shift, float("-inf"))
    else:
        total_of_all = tl.sum(total, 0)
    weighted = total_of_all * float("nan")
    if with_gradient:
        products = tl.zeros((at_once,), tl.float32)
        for first in tl.range(0, dim, at_once):
            d = first + tl.arange(0, at_once)
            places = state[:, None] + 3 + d[None, :]
            part = tl.load(places, mask=exists[:, None] & (d < dim)[None, :], other=0.0)
            row = tl.sum(part * scale[:, None], 0) / norm
            tl.store(gradient + i * dim + d, row, mask=d < dim)
            products += row * tl.load(anchors + i * dim + d, mask=d < dim, other=0.0)
        weighted = tl.sum(products, 0)
    tl.store(each + i, total_of_all)
    tl.store(each + num_anchors + i, weighted)
    tl.store(each + 2 * num_anchors + i, hardest)
    for first in tl.range(0, num_sums, at_once):
        s = first + tl.arange(0, at_once)
        places = state[:, None] + (width - num_sums) + s[None, :]
        part = tl.load(places, mask=exists[:, None] & (s < num_sums)[None, :], other=0.0)
        tl.store(sums + i * num_sums + s, tl.sum(part, 0), mask=s < num_sums)


def merge(
    loss: LossDefinition, states: Tensor, anchors: Tensor, number: Tensor, num_sums: int, with_gradient: bool
) -> tuple[NegativeTotals, Tensor | None]:
    """Return the totals over all negatives and, with a gradient, their gradient `(B, D)`.

    Args:
        loss: A loss of one part.
        states: What the kernel wrote, `(W, B, 3 + D + S)`.
        anchors: `(B, D)`.
        number: How many negatives each anchor has, `(B,)`.
        num_sums: How many further sums S the loss has.
        with_gradient: Whether the states contain a gradient.
    """
    rows, dim = anchors.shape
    each, sums = anchors.new_empty(3, rows), anchors.new_empty(rows, num_sums)
    gradient = torch.empty_like(anchors) if with_gradient else None
    _merge[(rows,)](
        states, anchors, each, each if gradient is None else gradient, sums if num_sums else each, len(states), rows,
        dim=dim, num_sums=num_sums, exponential=loss.exponential, with_gradient=with_gradient,
        padded_states=triton.next_power_of_2(len(states)), at_once=NUMBERS_AT_ONCE,
    )  # fmt: skip
    total, weighted, hardest = each
    return NegativeTotals(number, total, weighted, hardest, sums), gradient
