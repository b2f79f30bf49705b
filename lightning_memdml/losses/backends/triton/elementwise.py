"""Adds negatives block by block, with one Triton kernel for all that is between the two products.

1. A product of torch writes the similarities of all anchors and a block of references, in float32.
2. A program of the kernel takes a piece of one anchor's row. It reads the similarities once and keeps them in
   registers, turns them into weights by the loss's own lines (`lightning_memdml.losses.backends.triton.codegen`), and
   writes the weights in the references' type and the totals of its piece. So a maximum costs no second pass.
3. A batched product of torch gives the gradient of each piece.
4. A small kernel adds up the pieces to the state of the block.

The products are those of cuBLAS, so rows may have any number of elements. All blocks share their memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_memdml.losses.backends.triton import launching
from lightning_memdml.losses.backends.triton.codegen import Terms
from lightning_memdml.losses.backends.triton.launching import SharedNegatives, compile_terms
from lightning_memdml.losses.backends.triton.shared import gather
from lightning_memdml.losses.definition import LossDefinition
from lightning_memdml.losses.row_ops import WIDENING_DEVICES
from lightning_memdml.losses.shared_references import GPU_BLOCK_ELEMENTS

OLDEST_GENERATION = 8  # compute capability that Triton supports
SHORTEST_PIECE, LONGEST_PIECE = 512, 8192  # references of a piece: one program holds their similarities in registers
MOST_PIECES = 256  # of a block, which one program adds up
PRODUCT_TILE = 64, 128  # anchors and numbers of a row: how much of a product one processor is expected to compute
ADDED_AT_ONCE = 32  # numbers of a gradient that one program adds up


@triton.jit
def _weigh(  # type: ignore[no-untyped-def]
    similarities, weights_of_block, marked, columns, totals, num_anchors, width, marked_stride, constants, fill_value,
    piece: tl.constexpr, num_columns: tl.constexpr, terms: tl.constexpr, exponential: tl.constexpr,
    has_values: tl.constexpr, needs_hardest: tl.constexpr, with_gradient: tl.constexpr, scaled: tl.constexpr,
    gathered: tl.constexpr, num_sums: tl.constexpr, padded_sums: tl.constexpr,
):  # fmt: skip
    """Write the weights of one anchor over one piece of a block, and their totals.

    Shapes: similarities and weights `(B, pieces * width)`; columns `(B, num_columns)`; totals
    `(pieces, B, 4 + num_sums)`: total, shift, hardest, factor of the weights, sums. Not `gathered`, the references with
    a byte of `marked`, `(pieces * width,)`, are left out. `gathered`, the bytes of its rows are the pairs to keep.
    """
    i = tl.program_id(0) + tl.arange(0, 1)  # a row of one anchor: the lines of a loss take a block `(anchors, n)`
    is_anchor = i < num_anchors
    row = i.to(tl.int64)[:, None]
    j = tl.arange(0, piece)[None, :]
    exists = j < width
    j += tl.program_id(1) * width
    place = row * (tl.num_programs(1) * width) + j
    similarity = tl.load(similarities + place, mask=exists, other=0.0)
    mark = tl.load(marked + row * marked_stride + j, mask=exists, other=0)
    drop = (mark == 0) | (exists == 0) if gathered else (mark != 0) | (exists == 0)
    hardest = tl.full((1,), float("-inf"), tl.float32)
    if needs_hardest:
        hardest = tl.max(tl.where(drop, float("-inf"), similarity), 1)
    filled = tl.where(drop, fill_value, similarity)
    weights, values, sums = terms(filled, columns, i, is_anchor, constants, num_columns)
    total = tl.zeros((1,), tl.float32)
    shift = tl.full((1,), -3.4028234663852886e38, tl.float32)  # as in `NegativeAccumulator`
    if exponential:
        logits = tl.where(drop, float("-inf"), weights)
        shift = tl.maximum(shift, tl.max(logits, 1))
        weights = tl.exp(logits - shift[:, None])
        total = tl.sum(weights, 1)
        if has_values:
            weights = weights * values
    else:
        weights = tl.where(drop, 0.0, weights)
        if has_values:
            total = tl.sum(tl.where(drop, 0.0, values), 1)
    factor = tl.full((1,), 1.0, tl.float32)
    if scaled:  # float16 ends at 65,504 and at 6e-8
        factor = tl.maximum(tl.max(tl.abs(weights), 1), 1.1754943508222875e-38)
        weights = weights / factor[:, None]
    if with_gradient:
        tl.store(weights_of_block + place, weights.to(weights_of_block.dtype.element_ty), mask=exists)
    totals += (tl.program_id(1).to(tl.int64) * num_anchors + i) * (4 + num_sums)
    tl.store(totals, total)
    tl.store(totals + 1, shift)
    tl.store(totals + 2, hardest)
    tl.store(totals + 3, factor)
    if num_sums > 0:
        s = tl.arange(0, padded_sums)[None, :]
        tl.store(totals[:, None] + 4 + s, sums, mask=s < num_sums)


@triton.jit
def _add_pieces(  # type: ignore[no-untyped-def]
    totals, gradients, state, num_pieces, num_anchors, dim, padded_pieces: tl.constexpr, exponential: tl.constexpr,
    with_gradient: tl.constexpr, num_sums: tl.constexpr, padded_sums: tl.constexpr, at_once: tl.constexpr,
):  # fmt: skip
    """Write the state of one anchor over a block; each program some numbers of the gradient, the first one the totals.

    Shapes: totals as in `_weigh`; gradients `(pieces, B, dim)`; state `(B, 3 + dim + num_sums)`, without dim where
    there is no gradient, in the order of `NegativeAccumulator.state`.
    """
    i = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, padded_pieces)
    exists = p < num_pieces
    row = p.to(tl.int64) * num_anchors + i
    piece = totals + row * (4 + num_sums)
    scale = tl.where(exists, 1.0, 0.0)
    shifts = tl.load(piece + 1, mask=exists, other=-3.4028234663852886e38)
    shift = tl.max(shifts, 0)
    if exponential:
        scale = tl.where(exists, tl.exp(shifts - shift), 0.0)
    width = 3 + num_sums
    if with_gradient:
        width += dim
    state += i * width
    if with_gradient:
        d = tl.program_id(1) * at_once + tl.arange(0, at_once)[None, :]
        factor = scale * tl.load(piece + 3, mask=exists, other=0.0)
        rows = tl.load(gradients + row[:, None] * dim + d, mask=exists[:, None] & (d < dim), other=0.0)
        tl.store(state + 3 + d, tl.sum(rows * factor[:, None], 0)[None, :], mask=d < dim)
    if tl.program_id(1) == 0:
        tl.store(state, tl.sum(tl.load(piece, mask=exists, other=0.0) * scale, 0))
        tl.store(state + 1, shift)
        tl.store(state + 2, tl.max(tl.load(piece + 2, mask=exists, other=float("-inf")), 0))
        if num_sums > 0:
            s = tl.arange(0, padded_sums)[None, :]
            sums = tl.load(piece[:, None] + 4 + s, mask=exists[:, None] & (s < num_sums), other=0.0)
            tl.store(state + (width - num_sums) + s, tl.sum(sums, 0)[None, :], mask=s < num_sums)


def reason_against(anchors: Tensor, references: Tensor) -> str | None:
    """Return what these kernels cannot serve, or `None` if they can serve both.

    Args:
        anchors: `(B, D)`.
        references: `(M, D)`.
    """
    if (reason := launching.reason_against(anchors, references)) is not None:
        return reason
    generation = launching.device_of(references).generation
    return None if generation >= OLDEST_GENERATION else f"a GPU of compute capability {generation}"


class Pieces(NamedTuple):
    """How blocks are cut.

    Attributes:
        length: References of a piece.
        number: Pieces of a block.
    """

    length: int
    number: int

    def cut(self, references: int) -> list[tuple[slice, int]]:
        """Return which references each block has, and in how many equal pieces. What is left over is a block."""
        whole, size = references // self.length * self.length, self.length * self.number
        blocks = [slice(start, min(start + size, whole)) for start in range(0, whole, size)]
        found = [(block, (block.stop - block.start) // self.length) for block in blocks]
        return [*found, (slice(whole, references), 1)] if whole < references else found


def choose_pieces(rows: int, dim: int, references: int, processors: int) -> Pieces:
    """Return as many pieces as keep every processor busy in the second product, whose result is small."""
    block = min(references, max(SHORTEST_PIECE, GPU_BLOCK_ELEMENTS // rows))
    at_once = triton.cdiv(rows, PRODUCT_TILE[0]) * triton.cdiv(dim, PRODUCT_TILE[1])
    length = triton.next_power_of_2(triton.cdiv(block, max(1, processors // at_once)))
    length = min(max(length, SHORTEST_PIECE), LONGEST_PIECE)
    return Pieces(length, min(max(1, block // length), MOST_PIECES))


def launch(
    loss: LossDefinition,
    terms: Terms,
    anchors: Tensor,
    references: Tensor,
    is_shared: Tensor,
    with_gradient: bool,
    shared: SharedNegatives | None = None,
) -> Tensor:
    """Return the state of every block of the references, and of the `shared` ones, `(blocks, B, 3 + D + S)`."""
    (rows, dim), sums, dtype = anchors.shape, terms.num_sums, references.dtype
    pieces = choose_pieces(rows, dim, len(references), launching.device_of(references).processors)
    sources = [(references, is_shared.view(torch.uint8), False)]
    if shared is not None and len(shared.columns):
        sources.append((gather(references, shared.columns, dtype), shared.negative.view(torch.uint8), True))
    blocks = [(*source, *block) for source in sources for block in pieces.cut(len(source[0]))]
    states = anchors.new_empty(len(blocks), rows, 3 + (dim if with_gradient else 0) + sums)
    similarities, weights, totals, gradients = _reserve(pieces, anchors, references, sums, with_gradient)
    columns, rounded = launching.stack_columns(terms, anchors), anchors.to(dtype)
    function = compile_terms(terms.text, len(terms.columns))
    options = {
        "exponential": loss.exponential, "with_gradient": with_gradient, "num_sums": sums,
        "padded_sums": terms.padded_sums,
    }  # fmt: skip
    for state, (source, marked, gathered, block, number) in zip(states, blocks, strict=True):
        part, marked = source[block], marked[..., block]
        size, width = rows * len(part), len(part) // number
        similarity, halves = similarities[:size].view(rows, -1), weights[: size if with_gradient else 1]
        _multiply(rounded, part.T, similarity)
        _weigh[(rows, number)](
            similarity, halves, marked, columns, totals[:number], rows, width,
            marked.stride(0) if gathered else 0, terms.constants or (0.0,), float(loss.fill_value),
            piece=pieces.length, num_columns=len(terms.columns), terms=function,
            has_values=terms.has_values, needs_hardest=loss.needs_hardest, gathered=gathered,
            scaled=with_gradient and dtype == torch.float16 and (terms.has_values or not loss.exponential),
            num_warps=8 if pieces.length > 2048 else 4, **options,
        )  # fmt: skip
        if with_gradient:
            halves = halves.view(rows, number, width).transpose(0, 1)
            _multiply(halves, part.view(number, width, dim), gradients[:number])
        _add_pieces[(rows, triton.cdiv(dim, ADDED_AT_ONCE) if with_gradient else 1)](
            totals[:number], gradients[:number], state, number, rows, dim,
            padded_pieces=triton.next_power_of_2(pieces.number), at_once=ADDED_AT_ONCE, **options,
        )  # fmt: skip
    return states


def _reserve(
    pieces: Pieces, anchors: Tensor, references: Tensor, num_sums: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the memory that all blocks share: similarities, weights, totals and gradients of pieces."""
    rows, dim = anchors.shape
    size = rows * min(pieces.length * pieces.number, len(references))
    return (
        anchors.new_empty(size),
        references.new_empty(size if with_gradient else 1),
        anchors.new_empty(pieces.number, rows, 4 + num_sums),
        anchors.new_empty((pieces.number, rows, dim) if with_gradient else 1),
    )


def _multiply(left: Tensor, right: Tensor, product: Tensor) -> None:
    """Write a product, or one for each entry of a batch. It is in float32, whatever the factors are."""
    multiply = torch.mm if left.ndim == 2 else torch.bmm
    if left.device.type in WIDENING_DEVICES:
        multiply(left, right, out_dtype=product.dtype, out=product)
    else:  # Triton's interpreter
        multiply(left.to(product.dtype), right.to(product.dtype), out=product)
