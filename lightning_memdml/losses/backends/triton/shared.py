"""The references that share a class or an image with the batch, found and compared with it in few launches.

With a small batch and a small memory, a GPU takes less time for a step than the host takes to launch it. The same in
torch is some 30 operations, here it is 8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_memdml.losses.definition import Pairs

FOUND_PER_PROGRAM = 1024  # references that a program looks up
COMPARED_AT_ONCE = 1024  # shared references that a program compares with its anchor at once
GATHERED_PER_PROGRAM = 32


@triton.jit
def _is_member(members, ids, number, bits: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return which ids are among ascending members: how many are smaller is found bit by bit, the highest first."""
    smaller = tl.zeros_like(ids).to(tl.int32)
    for bit in tl.static_range(bits):
        more = smaller + (1 << (bits - 1 - bit))
        last = tl.load(members + more - 1, mask=more <= number, other=0)
        smaller = tl.where((more <= number) & (last < ids), more, smaller)
    is_inside = smaller < number
    return (tl.load(members + smaller, mask=is_inside, other=0) == ids) & is_inside


@triton.jit
def _find(  # type: ignore[no-untyped-def]
    members, ref_labels, ref_indices, is_shared, number, num_references,
    bits: tl.constexpr, has_indices: tl.constexpr, references_per_program: tl.constexpr,
):  # fmt: skip
    """Write which references are shared. Shapes: members `(1 or 2, number)`, ascending; all others `(M,)`."""
    j = tl.program_id(0) * references_per_program + tl.arange(0, references_per_program)
    exists = j < num_references
    is_found = _is_member(members, tl.load(ref_labels + j, mask=exists, other=0), number, bits)
    if has_indices:
        images = tl.load(ref_indices + j, mask=exists, other=-1)
        is_found = is_found | (_is_member(members + number, images, number, bits) & (images >= 0))
    tl.store(is_shared + j, is_found.to(tl.uint8), mask=exists)


@triton.jit
def _compare(  # type: ignore[no-untyped-def]
    labels, indices, columns, ref_labels, ref_indices, positive, negative, number, num_columns, num_references,
    has_indices: tl.constexpr, columns_at_once: tl.constexpr,
):  # fmt: skip
    """Write the masks of one anchor, and how many of all references are its negatives.

    Shapes: columns `(Q,)`, -1 where there is no reference; positive and negative `(B, Q)`, bytes; number `(B,)`.
    """
    i = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + i)
    others = tl.zeros((columns_at_once,), tl.int32)
    for first in tl.range(0, num_columns, columns_at_once):
        q = first + tl.arange(0, columns_at_once)
        exists = q < num_columns
        column = tl.load(columns + q, mask=exists, other=-1)
        is_reference = column >= 0
        is_pair = is_reference
        if has_indices:
            index = tl.load(indices + i)
            is_other = tl.load(ref_indices + column, mask=is_reference, other=-1) != index
            is_pair = is_pair & (is_other | (index < 0))
        is_same = tl.load(ref_labels + column, mask=is_reference, other=0) == label
        is_positive, is_negative = is_pair & is_same, is_pair & (is_same == 0)
        tl.store(positive + i * num_columns + q, is_positive.to(tl.uint8), mask=exists)
        tl.store(negative + i * num_columns + q, is_negative.to(tl.uint8), mask=exists)
        others += (is_reference & (is_negative == 0)).to(tl.int32)
    tl.store(number + i, (num_references - tl.sum(others, 0)).to(tl.int64))


@triton.jit
def _gather(  # type: ignore[no-untyped-def]
    references, columns, rows, num_columns, dim: tl.constexpr, padded_dim: tl.constexpr, rows_per_program: tl.constexpr
):
    """Write the references of some columns, `(Q, dim)`, and zeros where the column is -1."""
    q = tl.program_id(0) * rows_per_program + tl.arange(0, rows_per_program)
    d = tl.arange(0, padded_dim)[None, :]
    column = tl.load(columns + q, mask=q < num_columns, other=-1).to(tl.int64)[:, None]
    row = tl.load(references + column * dim + d, mask=(column >= 0) & (d < dim), other=0.0)
    place = q.to(tl.int64)[:, None] * dim + d
    tl.store(rows + place, row.to(rows.dtype.element_ty), mask=(q < num_columns)[:, None] & (d < dim))


class ComparedRows(NamedTuple):
    """Anchors beside some references.

    Attributes:
        references: In float32, `(Q, D)`.
        positive: Mask of the positive pairs, `(B, Q)`.
        negative: Mask of the negative pairs, `(B, Q)`.
        number: How many of all references are negatives of each anchor, `(B,)`.
    """

    references: Tensor
    positive: Tensor
    negative: Tensor
    number: Tensor


def find_shared(pairs: Pairs) -> Tensor:
    """Return which references share a class or an image with the batch, `(M,)`."""
    members, ref_labels, ref_indices = [pairs.labels.long()], pairs.ref_labels.contiguous(), None
    if pairs.indices is not None and pairs.ref_indices is not None:
        members.append(pairs.indices.long())
        ref_indices = pairs.ref_indices.contiguous()
    number, num_references, has_indices = len(pairs.labels), len(ref_labels), ref_indices is not None
    is_shared = torch.empty(num_references, dtype=torch.bool, device=ref_labels.device)
    _find[(triton.cdiv(num_references, FOUND_PER_PROGRAM),)](
        torch.stack(members).sort(dim=1).values, ref_labels, is_shared if ref_indices is None else ref_indices,
        is_shared.view(torch.uint8), number, num_references,
        bits=number.bit_length(), has_indices=has_indices, references_per_program=FOUND_PER_PROGRAM,
    )  # fmt: skip
    return is_shared


def gather(references: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the references of some columns, `(Q, D)`, and zeros where the column is -1."""
    rows = references.new_empty(len(columns), references.shape[1], dtype=dtype)
    if len(columns):
        _gather[(triton.cdiv(len(columns), GATHERED_PER_PROGRAM),)](
            references, columns, rows, len(columns), dim=rows.shape[1],
            padded_dim=triton.next_power_of_2(rows.shape[1]), rows_per_program=GATHERED_PER_PROGRAM,
        )  # fmt: skip
    return rows


def compare(pairs: Pairs, columns: Tensor) -> ComparedRows:
    """Compare the anchors with some references.

    Args:
        pairs: The anchors, and all references.
        columns: The numbers of the references, `(Q,)`, -1 for none.
    """
    anchors, device = len(pairs.anchors), pairs.anchors.device
    columns, labels, ref_labels = columns.contiguous(), pairs.labels.contiguous(), pairs.ref_labels.contiguous()
    shape = anchors, len(columns)
    positive, negative = (torch.empty(shape, dtype=torch.bool, device=device) for _ in range(2))
    number = torch.empty(anchors, dtype=torch.int64, device=device)
    rows = gather(pairs.references, columns, torch.float32)
    indices = ref_indices = number  # in the place of images that are not known
    has_indices = pairs.indices is not None and pairs.ref_indices is not None
    if pairs.indices is not None and pairs.ref_indices is not None:
        indices, ref_indices = pairs.indices.contiguous(), pairs.ref_indices.contiguous()
    _compare[(anchors,)](
        labels, indices, columns, ref_labels, ref_indices, positive.view(torch.uint8), negative.view(torch.uint8),
        number, len(columns), len(ref_labels), has_indices=has_indices, columns_at_once=COMPARED_AT_ONCE,
    )  # fmt: skip
    return ComparedRows(rows, positive, negative, number)
