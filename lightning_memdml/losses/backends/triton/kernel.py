"""Adds negatives by one Triton kernel in place of two matrix products and what is between them.

Each program takes some anchors and a share of the references. Tile by tile it computes the similarities, turns them
into weights by the loss's own lines (`lightning_memdml.losses.backends.triton.codegen`), and adds `weights @ tile` to a
gradient that it keeps in registers. A tile is read once for both products, and no similarity is written to memory. The
totals of the shares are then merged like those of several ranks.

The kernel runs once for the plain negatives, and once for those among the shared references, under their mask.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_memdml.losses.accumulators import NegativeAccumulator
from lightning_memdml.losses.backends.triton.codegen import Terms, UnsupportedOpError, generate_terms
from lightning_memdml.losses.backends.triton.merging import merge
from lightning_memdml.losses.definition import Context, LossDefinition, NegativeTotals

DTYPES = (torch.float16, torch.bfloat16)
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


@functools.lru_cache
def compile_terms(text: str, num_columns: int) -> triton.JITFunction:
    """Return the lines of a loss as a function that the kernel calls."""
    name = f"terms_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    loads = [
        f"column{k} = tl.load(columns + i * num_columns + {k}, mask=is_anchor)[:, None]" for k in range(num_columns)
    ]
    lines = [f"def {name}(similarity, columns, i, is_anchor, constants, num_columns: tl.constexpr):"]
    lines += [f"    {line}" for line in [*loads, *text.splitlines()]]
    file = f"<{name}>"
    # Triton reads the source of what it compiles; no file is needed for that.
    linecache.cache[file] = (0, None, [f"{line}\n" for line in lines], file)
    namespace = {"tl": tl, "__name__": __name__}
    exec(compile("\n".join(lines), file, "exec"), namespace)
    return triton.jit(namespace[name])


def reason_against(anchors: Tensor, references: Tensor) -> str | None:
    """Return what the kernel cannot serve, or `None` if it can serve both.

    Args:
        anchors: `(B, D)`.
        references: `(M, D)`.
    """
    generation = _device(references.device).generation
    if references.dtype not in DTYPES:
        return f"{references.dtype}".removeprefix("torch.")
    if anchors.dtype != torch.float32:
        return f"embeddings in {anchors.dtype}".replace("torch.", "")
    if references.shape[1] > max(TILES):
        return f"{references.shape[1]} numbers"
    if not references.is_contiguous():
        return "references that are not contiguous"
    return None if generation in GENERATIONS else f"a GPU of compute capability {generation}"


class SharedNegatives(NamedTuple):
    """The shared references, among which only some pairs are negatives.

    Attributes:
        columns: Their numbers, `(Q,)`, -1 where there is none.
        negative: Mask of the negative pairs, `(B, Q)`.
        number: How many of all references are negatives of each anchor, `(B,)`.
    """

    columns: Tensor
    negative: Tensor
    number: Tensor


def total_negatives(
    parts: Sequence[LossDefinition],
    contexts: Sequence[Context],
    anchors: Tensor,
    references: Tensor,
    is_shared: Tensor,
    shared: SharedNegatives,
) -> tuple[list[tuple[NegativeTotals, Tensor | None] | None], str | None]:
    """Return the totals over all negatives for each part of a loss, and for the first part their gradient.

    Args:
        parts: The parts of the loss.
        contexts: What their `context` returned.
        anchors: `(B, D)`.
        references: `(M, D)`.
        is_shared: True for the references that are not plain negatives, `(M,)`.
        shared: Which of the pairs with these are negatives.

    Returns:
        Totals and gradient of each part, `None` for a part for which there is no kernel, and why there is none.
    """
    found: list[tuple[NegativeTotals, Tensor | None] | None] = []
    reason, anchors = None, anchors.contiguous()
    for part, context in zip(parts, contexts, strict=True):
        with_gradient = part is parts[0]
        terms = _terms_or_reason(part, context, anchors.shape[0])
        if isinstance(terms, str):
            found.append(None)
            reason = terms
            continue
        states = _launch(part, terms, anchors, references, is_shared, with_gradient, shared)
        found.append(merge(part, states, anchors, shared.number, terms.num_sums, with_gradient))
    return found, reason


def add_plain_negatives(
    accumulators: list[NegativeAccumulator], references: Tensor, is_shared: Tensor
) -> tuple[list[NegativeAccumulator], str | None]:
    """Add every reference that is not shared.

    Args:
        accumulators: Of the parts of one loss, with the same anchors.
        references: `(M, D)`.
        is_shared: True for the references to leave out, `(M,)`.

    Returns:
        The accumulators for whose loss there is no kernel, and why.
    """
    left, reason = [], None
    for accumulator in accumulators:
        terms = _terms_or_reason(accumulator.loss, accumulator.context, accumulator.anchors.shape[0])
        if isinstance(terms, str):
            left.append(accumulator)
            reason = terms
        elif references.shape[0]:
            anchors, with_gradient = accumulator.anchors.contiguous(), accumulator.gradient is not None
            accumulator.merge(_launch(accumulator.loss, terms, anchors, references, is_shared, with_gradient))
    return left, reason


def _terms_or_reason(loss: LossDefinition, context: Context, rows: int) -> Terms | str:
    """Return the lines of a loss of one part, or why there are none."""
    try:
        return generate_terms(loss, context, rows)
    except UnsupportedOpError as error:
        return f"a loss whose weights need {error}"


def _launch(
    loss: LossDefinition,
    terms: Terms,
    anchors: Tensor,
    references: Tensor,
    is_shared: Tensor,
    with_gradient: bool,
    shared: SharedNegatives | None = None,
) -> Tensor:
    """Return the state of every share of the references, and of the `shared` ones, `(shares, B, 3 + D + S)`."""
    (rows, dim), device = anchors.shape, _device(references.device)
    padded_dim, tiles = choose_tiles(rows, dim, device.shared_memory)
    groups = triton.cdiv(rows, tiles.anchors)
    values = [column.to(anchors).expand(rows, 1) for column in terms.columns]
    columns = torch.cat(values, dim=1) if values else anchors
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
            dim=dim, padded_dim=padded_dim, num_columns=len(values), terms=compile_terms(terms.text, len(values)),
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


class _Device(NamedTuple):
    """Compute capability without the minor number, multiprocessors, and bytes of memory that a program may share."""

    generation: int
    processors: int
    shared_memory: int


def _device(device: torch.device) -> _Device:
    if device.type == "cpu":  # Triton's interpreter
        return _Device(generation=9, processors=4, shared_memory=1 << 17)
    properties = torch.cuda.get_device_properties(device)
    # Missing from torch's type annotations.
    shared_memory: int = getattr(properties, "shared_memory_per_block_optin")  # noqa: B009
    return _Device(properties.major, properties.multi_processor_count, shared_memory)
