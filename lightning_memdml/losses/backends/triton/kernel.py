"""Adds negatives by one Triton kernel in place of two matrix products and what is between them.

Each program takes some anchors and a share of the references. Tile by tile it computes the similarities, turns them
into weights by the loss's own lines (`lightning_memdml.losses.backends.triton.codegen`), and adds `weights @ tile` to a
gradient that it keeps in registers. A tile is read once for both products, and no similarity is written to memory. The
totals of the shares are then merged like those of several ranks.

The kernel runs once for the plain negatives, and once for those among the shared references, under their mask.
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
from lightning_memdml.losses.definition import LossDefinition

# Compute capabilities. Triton does not use older tensor cores; newer ones keep the sums elsewhere and need other tiles.
GENERATIONS = (8, 9)


class Tiles(NamedTuple):
    """How much work one program does.

    Attributes:
        anchors: Anchors per program.
        references: References per tile.
        warps: Warps per program.
        stages: Tiles that are loaded at once.
    """

    anchors: int
    references: int
    warps: int
    stages: int

    def shared_memory(self, dim: int) -> int:
        """Return the bytes that the anchors, the tiles being loaded and the weights of one tile take."""
        return 2 * ((self.anchors + self.stages * self.references) * dim + self.anchors * self.references)


# Per width of rows, the first that fits. With more warps per anchor, reading the anchors takes longer than multiplying.
TILES = {
    128: [Tiles(128, 128, 8, 3), Tiles(64, 64, 4, 3)],
    256: [Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 3), Tiles(64, 32, 8, 2)],
    512: [Tiles(64, 64, 8, 2), Tiles(32, 32, 8, 2)],
}


@triton.jit
def _add_negatives(  # type: ignore[no-untyped-def]
    anchors, references, marked, places_of_rows, columns, states, num_anchors, num_references, share, constants,
    fill_value, dim: tl.constexpr, padded_dim: tl.constexpr, num_columns: tl.constexpr, terms: tl.constexpr,
    exponential: tl.constexpr, has_values: tl.constexpr, needs_hardest: tl.constexpr, with_gradient: tl.constexpr,
    num_sums: tl.constexpr, padded_sums: tl.constexpr, gathered: tl.constexpr,
    anchors_per_program: tl.constexpr, references_per_tile: tl.constexpr,
):  # fmt: skip
    """Write the state of some anchors over one share of the references.

    Shapes: anchors `(B, dim)` and references `(M, dim)` of one type; columns `(B, num_columns)`; states
    `(shares, B, 3 + dim + num_sums)`, without dim where there is no gradient, in the order of
    `NegativeAccumulator.state`. Not `gathered`, the references are all M, and those with a byte of `marked`, `(M,)`,
    are left out. `gathered`, they are those at `places_of_rows`, `(num_references,)`, and the bytes of `marked`,
    `(B, num_references)`, are the pairs to keep. A share is a multiple of a tile.
    """
    i = tl.program_id(0) * anchors_per_program + tl.arange(0, anchors_per_program)
    d = tl.arange(0, padded_dim)
    is_anchor = i < num_anchors
    x = tl.load(anchors + i[:, None] * dim + d[None, :], mask=is_anchor[:, None] & (d < dim)[None, :], other=0.0)
    gradient = tl.zeros((anchors_per_program, padded_dim), tl.float32)
    total = tl.zeros((anchors_per_program,), tl.float32)
    shift = tl.full((anchors_per_program,), -3.4028234663852886e38, tl.float32)  # as in `NegativeAccumulator`
    hardest = tl.full((anchors_per_program,), float("-inf"), tl.float32)
    peak = tl.full((anchors_per_program,), 1.1754943508222875e-38, tl.float32)  # largest absolute weight so far
    sums = tl.zeros((anchors_per_program, padded_sums), tl.float32)
    start = tl.program_id(1) * share
    stop = tl.minimum(start + share, num_references)
    tile_start = references + start.to(tl.int64) * dim  # moves from tile to tile: offsets into a tile fit 32 bits
    for first in tl.range(start, stop, references_per_tile):
        j = tl.arange(0, references_per_tile)
        if gathered:
            exists = first + j < stop
            pairs = i.to(tl.int64)[:, None] * num_references + (first + j)[None, :]
            drop = tl.load(marked + pairs, mask=is_anchor[:, None] & exists[None, :], other=0) == 0
            rows = tl.load(places_of_rows + first + j, mask=exists, other=0)
            places = references + (tl.maximum(rows, 0) * dim)[:, None] + d[None, :]
        else:
            drop = (tl.load(marked + first + j, mask=first + j < stop, other=1) != 0)[None, :]
            # Beyond the end the last row is read again and dropped: a mask would cost registers.
            j = tl.minimum(j, num_references - 1 - first)
            places = tile_start + (j * dim)[:, None] + d[None, :]
            tile_start += references_per_tile * dim
        tile = tl.load(places) if dim == padded_dim else tl.load(places, mask=(d < dim)[None, :], other=0.0)
        similarity = tl.dot(x, tl.trans(tile), input_precision="ieee")
        if needs_hardest:
            hardest = tl.maximum(hardest, tl.max(tl.where(drop, float("-inf"), similarity), 1))
        filled = tl.where(drop, fill_value, similarity)
        weights, values, sums_of_tile = terms(filled, columns, i, is_anchor, constants, num_columns)
        if num_sums > 0:
            sums += sums_of_tile
        if exponential:
            logits = tl.where(drop, float("-inf"), weights)
            shift_before = shift
            shift = tl.maximum(shift, tl.max(logits, 1))
            rescale = tl.exp(shift_before - shift)
            weights = tl.exp(logits - shift[:, None])
            total = total * rescale + tl.sum(weights, 1)
            if with_gradient:
                gradient = gradient * rescale[:, None]
                if has_values:
                    weights = weights * values
        else:
            weights = tl.where(drop, 0.0, weights)
            if has_values:
                total += tl.sum(tl.where(drop, 0.0, values), 1)
            if with_gradient and tile.dtype == tl.float16:  # which ends at 65,504 and at 6e-8
                peak_before = peak
                peak = tl.maximum(peak, tl.max(tl.abs(weights), 1))
                gradient = gradient * (peak_before / peak)[:, None]
                weights = weights / peak[:, None]
        if with_gradient:
            gradient = tl.dot(weights.to(tile.dtype), tile, gradient, input_precision="ieee")
    if not exponential and references.dtype.element_ty == tl.float16:
        gradient = gradient * peak[:, None]
    width = 3 + (dim if with_gradient else 0) + num_sums
    state = states + (tl.program_id(1).to(tl.int64) * num_anchors + i) * width
    tl.store(state, total, mask=is_anchor)
    tl.store(state + 1, shift, mask=is_anchor)
    tl.store(state + 2, hardest, mask=is_anchor)
    if with_gradient:
        tl.store(state[:, None] + 3 + d[None, :], gradient, mask=is_anchor[:, None] & (d < dim)[None, :])
    if num_sums > 0:
        s = tl.arange(0, padded_sums)
        places = state[:, None] + (width - num_sums) + s[None, :]
        tl.store(places, sums, mask=is_anchor[:, None] & (s < num_sums)[None, :])


def reason_against(anchors: Tensor, references: Tensor) -> str | None:
    """Return what the kernel cannot serve, or `None` if it can serve both.

    Args:
        anchors: `(B, D)`.
        references: `(M, D)`.
    """
    if (reason := launching.reason_against(anchors, references)) is not None:
        return reason
    if references.shape[1] > max(TILES):
        return f"{references.shape[1]} numbers"
    generation = launching.device_of(references).generation
    return None if generation in GENERATIONS else f"a GPU of compute capability {generation}"


def launch(
    loss: LossDefinition,
    terms: Terms,
    anchors: Tensor,
    references: Tensor,
    is_shared: Tensor,
    with_gradient: bool,
    shared: SharedNegatives | None = None,
) -> Tensor:
    """Return the state of every share of the references, and of the `shared` ones, `(shares, B, 3 + D + S)`."""
    (rows, dim), device = anchors.shape, launching.device_of(references)
    padded_dim, tiles = choose_tiles(rows, dim, device.shared_memory)
    groups = triton.cdiv(rows, tiles.anchors)
    columns, num_columns = launching.stack_columns(terms, anchors), len(terms.columns)
    rounded = anchors.to(references.dtype)  # in the kernel it would cost registers, of which it has none left

    def share_of(references: int) -> tuple[int, int]:
        """Return how many references a program takes, one program for every processor, and the number of shares."""
        share = triton.cdiv(references, max(1, device.processors // groups))
        share = triton.cdiv(share, tiles.references) * tiles.references
        return share, triton.cdiv(references, share)

    runs = [(references.shape[0], is_shared, is_shared, False)]
    if shared is not None and len(shared.columns):
        runs.append((len(shared.columns), shared.negative, shared.columns, True))
    shares = [share_of(number)[1] for number, *_ in runs]
    width = 3 + (dim if with_gradient else 0) + terms.num_sums
    states = anchors.new_empty(sum(shares), rows, width)
    for (number, marked, places, gathered), part in zip(runs, states.split(shares), strict=True):
        _add_negatives[(groups, len(part))](
            rounded, references, marked.view(torch.uint8), places, columns, part,
            rows, number, share_of(number)[0], terms.constants or (0.0,), float(loss.fill_value),
            dim=dim, padded_dim=padded_dim, num_columns=num_columns, terms=compile_terms(terms.text, num_columns),
            exponential=loss.exponential, has_values=terms.has_values, needs_hardest=loss.needs_hardest,
            with_gradient=with_gradient, num_sums=terms.num_sums, padded_sums=terms.padded_sums, gathered=gathered,
            anchors_per_program=tiles.anchors, references_per_tile=tiles.references,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return states


def choose_tiles(rows: int, dim: int, shared_memory: int) -> tuple[int, Tiles]:
    """Return the padded width of rows, and the largest tiles that fit and are not mostly padding."""
    padded_dim = next(size for size in TILES if size >= dim)
    fitting = [
        tiles
        for tiles in TILES[padded_dim]
        if tiles.shared_memory(padded_dim) <= shared_memory and tiles.anchors <= max(rows, 64)
    ]
    return padded_dim, (fitting or TILES[padded_dim][-1:])[0]
