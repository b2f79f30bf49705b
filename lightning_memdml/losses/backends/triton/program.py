"""What one program of the Triton kernel does: it adds the negatives of some anchors among a share of the references.

Tile by tile it computes the similarities, turns them into weights by the loss's own lines
(`lightning_memdml.losses.backends.triton.codegen`), and adds `weights @ tile` to a gradient that it keeps in registers.
A tile is read once for both products, and no similarity is written to memory.

For a loss with a threshold there are two phases. The first one computes the first product only, and lists the
references that are above the threshold of any anchor of the program. The second one takes the listed references. With a
trained network these are a few percent. Where they are many, as before training, the first phase ends early, and all
references that it did not look at are listed.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The first phase ends early where more than one of so many references was listed.
FEWEST_PER_LISTED = tl.constexpr(4)
# After so many parts of a share this is decided. Each is twice as long as the one before it.
PARTS = tl.constexpr(5)
# Before each list stand the numbers of references on it: after each part, and in the end. The rest is for alignment.
COUNTS = tl.constexpr(8)
LISTED_AT_ONCE = tl.constexpr(1024)


@triton.jit
def add_negatives(  # type: ignore[no-untyped-def]
    anchors, references, marked, places_of_rows, columns, thresholds, lists, states, num_anchors, num_references, share,
    first_part, constants, threshold, fill_value, dim: tl.constexpr, padded_dim: tl.constexpr,
    num_columns: tl.constexpr, terms: tl.constexpr, exponential: tl.constexpr, has_values: tl.constexpr,
    needs_hardest: tl.constexpr, with_gradient: tl.constexpr, num_sums: tl.constexpr, padded_sums: tl.constexpr,
    gathered: tl.constexpr, listed: tl.constexpr, threshold_per_anchor: tl.constexpr,
    anchors_per_program: tl.constexpr, references_per_tile: tl.constexpr,
):  # fmt: skip
    """Write the state of some anchors over one share of the references.

    Shapes: anchors `(B, dim)` and references `(M, dim)` of one type; columns `(B, num_columns)`; states
    `(shares, B, 3 + dim + num_sums)`, without dim where there is no gradient, in the order of
    `NegativeAccumulator.state`. A share is a multiple of a tile.

    - Not `gathered`, the references are all M, and those with a byte of `marked`, `(M,)`, are left out.
    - `gathered`, they are those at `places_of_rows`, `(num_references,)`, and the bytes of `marked`,
      `(B, num_references)`, are the pairs to keep.
    - `listed`, a reference is left out too if it is not above the threshold of any anchor of the program: `threshold`,
      or with `threshold_per_anchor` those in `thresholds`, `(B,)`. The lists are `(programs, COUNTS + share)`, and
      `first_part` is a multiple of a tile, at least `share / (2**PARTS - 1)`.
    """
    i = tl.program_id(0) * anchors_per_program + tl.arange(0, anchors_per_program)
    j = tl.arange(0, references_per_tile)
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
    if listed:
        limit = tl.zeros((anchors_per_program,), tl.float32) + threshold
        if threshold_per_anchor:
            limit = tl.load(thresholds + i, mask=is_anchor, other=0.0)
        limit = tl.where(is_anchor, limit, float("inf"))
        program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        counts = lists + program.to(tl.int64) * (COUNTS + share)
        own_list = counts + COUNTS
        stop = _list_references(
            x, references, marked, limit, counts, own_list, start, stop, first_part, num_references,
            dim, padded_dim, references_per_tile,
        )  # fmt: skip
        start = stop * 0
    for first in tl.range(start, stop, references_per_tile):
        exists = first + j < stop
        if listed:
            drop = (exists == 0)[None, :]
            rows = tl.load(own_list + first + j, mask=exists, other=0).to(tl.int64)
            tile = _load_rows(references + rows[:, None] * dim, dim, padded_dim)
        elif gathered:
            pairs = i.to(tl.int64)[:, None] * num_references + (first + j)[None, :]
            drop = tl.load(marked + pairs, mask=is_anchor[:, None] & exists[None, :], other=0) == 0
            rows = tl.load(places_of_rows + first + j, mask=exists, other=0)
            tile = _load_rows(references + (tl.maximum(rows, 0) * dim)[:, None], dim, padded_dim)
        else:
            drop = (tl.load(marked + first + j, mask=exists, other=1) != 0)[None, :]
            tile = _load_tile(tile_start, first, num_references, dim, padded_dim, references_per_tile)
            tile_start += references_per_tile * dim
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


@triton.jit
def _list_references(  # type: ignore[no-untyped-def]
    x, references, marked, limit, counts, own_list, start, stop, first_part, num_references,
    dim: tl.constexpr, padded_dim: tl.constexpr, references_per_tile: tl.constexpr,
):  # fmt: skip
    """List the references of a share that are above the limit of any anchor, in order, and return their number."""
    number, looked, end = 0, start, stop
    for part in tl.range(0, PARTS):
        end_of_part = tl.minimum(looked + (first_part << part), end)
        tile_start = references + looked.to(tl.int64) * dim
        for first in tl.range(looked, end_of_part, references_per_tile):
            tile = _load_tile(tile_start, first, num_references, dim, padded_dim, references_per_tile)
            tile_start += references_per_tile * dim
            # With the anchors in this place their maximum needs few threads: no barrier with 128 references a tile.
            similarity = tl.dot(tile, tl.trans(x), input_precision="ieee")
            # NaN is not below the limit. It is listed, so that the result becomes NaN.
            is_above = tl.max(tl.where(similarity <= limit[None, :], 0, 1), 1)
            tl.store(own_list + (first - start) + tl.arange(0, references_per_tile), is_above)
        tl.debug_barrier()  # what other threads of the program wrote is read
        number = _append(own_list, marked, number, looked, end_of_part, start, False)
        looked = end_of_part
        end = tl.where(_same_in_all(counts + part, number) > (looked - start) // FEWEST_PER_LISTED, looked, stop)
    number = _append(own_list, marked, number, looked, stop, start, True)
    return _same_in_all(counts + PARTS, number)


@triton.jit
def _append(own_list, marked, number, looked, end, start, takes_all: tl.constexpr):  # type: ignore[no-untyped-def]
    """List the references of a part that are above the limit, or all, and return how many are listed then.

    A list is not longer than what was looked at, so it takes the place of the marks that `_list_references` wrote.
    """
    for first in tl.range(looked, end, LISTED_AT_ONCE):
        j = first + tl.arange(0, LISTED_AT_ONCE)
        exists = j < end
        is_listed = tl.where(tl.load(marked + j, mask=exists, other=1) != 0, 0, 1)
        if not takes_all:
            is_listed = is_listed * tl.load(own_list + (j - start), mask=exists, other=0)
        tl.debug_barrier()  # the marks were read
        tl.store(own_list + number + tl.cumsum(is_listed, 0) - 1, j, mask=is_listed != 0)
        number += tl.sum(is_listed, 0)
    return number


@triton.jit
def _same_in_all(place, number):  # type: ignore[no-untyped-def]
    """Write and read a number, with a barrier for what was written before it.

    So the compiler can tell that it is the same in all threads. Else loops up to it take more registers than there are:
    what all threads share, as the places of tiles, is then kept for each of them.
    """
    tl.store(place, number)
    tl.debug_barrier()
    return tl.load(place)


@triton.jit
def _load_tile(  # type: ignore[no-untyped-def]
    tile_start, first, num_references, dim: tl.constexpr, padded_dim: tl.constexpr, references_per_tile: tl.constexpr
):
    """Return the references from `first` on. Beyond the end it is the last one again: a mask would cost registers."""
    j = tl.minimum(tl.arange(0, references_per_tile), num_references - 1 - first)
    return _load_rows(tile_start + (j * dim)[:, None], dim, padded_dim)


@triton.jit
def _load_rows(rows, dim: tl.constexpr, padded_dim: tl.constexpr):  # type: ignore[no-untyped-def]
    d = tl.arange(0, padded_dim)[None, :]
    return tl.load(rows + d) if dim == padded_dim else tl.load(rows + d, mask=d < dim, other=0.0)
