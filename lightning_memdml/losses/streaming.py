"""Evaluates a pair loss against a memory of any size: the gradient is formed block by block, and nothing is `B x M`.

Two observations make this as fast as the two matrix products alone:

- Few references share a class or an image with the batch. These *shared* references are found through a table of
  hashes and compared under masks, since there are positives, negatives and pairs to leave out among them. All others
  are *plain* negatives, which need no mask.
- A loss that has a threshold below which a negative has no weight lets the plain negatives below it skip the second
  product and all element-wise work. With a trained network these are nearly all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_memdml import bfloat16, compat
from lightning_memdml.bfloat16_copy import RoundedRows
from lightning_memdml.losses.accumulators import SAMPLE, NegativeAccumulator, add_block, make_accumulators
from lightning_memdml.losses.backends import AUTO, Backend
from lightning_memdml.losses.backends.bfloat16_prefilter import BFloat16Prefilter
from lightning_memdml.losses.definition import Context, LossDefinition, NegativeTotals, Pairs, pair_masks
from lightning_memdml.losses.row_ops import HOST_DEVICES

BLOCK_ELEMENTS = 1 << 19  # for each thread, of a block and of its similarities on a CPU: 2 MiB each stay in its cache
MOST_THREADS = 16  # that blocks grow with: beyond, their memory would be more than 32 MiB each
GPU_BLOCK_ELEMENTS = 1 << 24  # similarities of a block on a GPU, where a block costs a dozen kernel launches
MAX_PAIRS_PER_CHUNK = 1 << 19  # pairs of anchors and shared references that are held at once; on a GPU a block of them
HASH_SIZE = 1 << 16
TRITON_DEVICES = {"cuda"}


class SharedReferences(NamedTuple):
    """The references that share a class or an image with the batch.

    Attributes:
        mask: Which they are, `(M,)`. With a few others, whose hash is the same.
        columns: Their numbers, ascending, `(Q,)`. For the kernels of Triton the last ones may be -1, for none.
        valid: False where `columns` is padding, `(Q,)`; `None` where there is no padding other than -1.
    """

    mask: Tensor
    columns: Tensor
    valid: Tensor | None


class SharedBlock(NamedTuple):
    """Anchors beside their shared references.

    Attributes:
        rows: The number of each anchor in the batch, `(B,)`, or all of them as a slice.
        anchors: `(B, D)`.
        shared: Which references are shared, Q of them.
        references: These, `(Q, D)`.
        similarity: `(B, Q)`.
        positive: Mask of the positive pairs, `(B, Q)`.
        negative: Mask of the negative pairs, `(B, Q)`.
        number: How many negatives each anchor has among all references, `(B,)`.
        contexts: The statistics of the positives, one entry for each part of the loss.
    """

    rows: Tensor | slice
    anchors: Tensor
    shared: SharedReferences
    references: Tensor
    similarity: Tensor
    positive: Tensor
    negative: Tensor
    number: Tensor
    contexts: list[Context]


def evaluate(loss: LossDefinition, pairs: Pairs) -> tuple[Tensor, Tensor]:
    r"""Return the value of each anchor, `(B,)`, and its gradient $\partial l_i / \partial x_i$, `(B, D)`."""
    value, gradient = torch.empty_like(pairs.anchors[:, 0]), torch.empty_like(pairs.anchors)
    by_triton = (AUTO if loss.backend == "auto" else loss.backend) == "triton" and len(pairs.references) > 0
    if by_triton and (reason := _reason_against_triton(pairs.anchors, pairs.references)) is not None:
        _warn_of_blocks(reason)
        by_triton = False
    parts = loss.parts or (loss,)
    for block in shared_blocks(loss, pairs, by_triton):
        # Of each part: the totals of all negatives, and their gradient; `None` where Triton has no kernel for it.
        found: list[tuple[NegativeTotals, Tensor | None] | None] = [None] * len(parts)
        if by_triton:
            found = _total_by_triton(parts, block, pairs.references)
        left = [k for k, totals in enumerate(found) if totals is None]
        if left:
            made = make_accumulators(loss, block.contexts, block.anchors, pairs.references)
            accumulators = [made[k] for k in left]
            for accumulator in accumulators:
                accumulator.add(block.similarity.clone(), block.references, block.shared.columns, ~block.negative)
            add_plain_negatives(accumulators, pairs.references, block.shared.mask, "blocks", pairs.read_rounded)
            for k, accumulator in zip(left, accumulators, strict=True):
                totals = accumulator.totals(block.number)  # which completes the gradient
                found[k] = totals, accumulator.gradient
        complete = [pair for pair in found if pair is not None]
        of_negatives = complete[0][1]
        assert of_negatives is not None
        finished = finish(loss, block, [totals for totals, _ in complete], of_negatives)
        if isinstance(block.rows, slice):
            return finished
        value[block.rows], gradient[block.rows] = finished
    return value, gradient


def _total_by_triton(
    parts: Sequence[LossDefinition], block: SharedBlock, references: Tensor
) -> list[tuple[NegativeTotals, Tensor | None] | None]:
    """Return the totals of all negatives and their gradient, for each part of a loss that has a kernel."""
    from lightning_memdml.losses.backends.triton import kernel

    shared = kernel.SharedNegatives(block.shared.columns, block.negative, block.number)
    found, reason = kernel.total_negatives(parts, block.contexts, block.anchors, references, block.shared.mask, shared)
    if reason is not None:
        _warn_of_blocks(reason)
    return found


def shared_blocks(loss: LossDefinition, pairs: Pairs, by_triton: bool = False) -> Iterator[SharedBlock]:
    """Compare the anchors with the references that share a class or an image with them.

    Usually all anchors at once. Where these are too many pairs, the anchors are compared in halves, ordered by class so
    that each half has fewer classes: with few classes, a large share of a memory has a class of the batch.
    """
    shared = find_shared(pairs, by_triton)
    anchors, labels = pairs.anchors, pairs.labels
    most = MAX_PAIRS_PER_CHUNK if anchors.device.type in HOST_DEVICES else GPU_BLOCK_ELEMENTS
    if anchors.shape[0] > 1 and anchors.shape[0] * shared.columns.shape[0] > most:
        for half in labels.argsort().tensor_split(2):
            of_half = shared_blocks(loss, pairs.select(half), by_triton)
            yield from (block._replace(rows=half[block.rows]) for block in of_half)
        return
    if by_triton:
        from lightning_memdml.losses.backends.triton.shared import compare

        references, positive, negative, number = compare(pairs, shared.columns)
    else:
        references = pairs.references.index_select(0, shared.columns).to(anchors.dtype)
        indices, ref_indices = pairs.indices, pairs.ref_indices
        if indices is not None and ref_indices is not None:
            ref_indices = ref_indices[shared.columns]
        positive, negative = pair_masks(labels, pairs.ref_labels[shared.columns], indices, ref_indices)
        total: Tensor | int = len(shared.columns)
        if shared.valid is not None:
            positive, negative, total = positive & shared.valid, negative & shared.valid, shared.valid.sum()
        number = negative.sum(dim=1) + (pairs.references.shape[0] - total)
    parts = loss.parts or (loss,)
    rows: Tensor | slice = slice(None)
    if any(part.wants_most_positives_first for part in parts):
        rows = positive.sum(dim=1).argsort(descending=True)
        anchors, positive, negative, number = (tensor[rows] for tensor in (anchors, positive, negative, number))
    similarity = anchors @ references.T
    contexts = [part.context(similarity, positive) for part in parts]
    yield SharedBlock(rows, anchors, shared, references, similarity, positive, negative, number, contexts)


def find_shared(pairs: Pairs, by_triton: bool = False) -> SharedReferences:
    """Find the references that share a class or an image with the batch.

    With `pairs.max_shared` on a GPU, the columns are padded to this number and the host does not wait for it.

    Args:
        pairs: The anchors and the references.
        by_triton: Whether the kernels of the Triton backend find them. The padding is then -1.
    """
    bound = None
    if pairs.max_shared is not None:  # the bound for this number of anchors
        level = min((len(pairs.labels) - 1).bit_length(), len(pairs.max_shared) - 1)
        bound = min(pairs.max_shared[level], len(pairs.ref_labels))
    if by_triton:
        from lightning_memdml.losses.backends.triton import shared

        is_shared = shared.find_shared(pairs)
        if bound is None:
            return SharedReferences(is_shared, is_shared.nonzero().squeeze(1), None)
        columns = torch.nonzero_static(is_shared, size=bound + 1).squeeze(1)  # one more, to see whether there are more
        _check_bound(columns[-1] < 0, bound)
        return SharedReferences(is_shared, columns[:bound], None)
    on_host = pairs.labels.device.type in HOST_DEVICES
    mask = None
    for ids, members, may_be_negative in (
        (pairs.ref_labels, pairs.labels, True),
        (pairs.ref_indices, pairs.indices, False),  # a negative index is unknown and equals none
    ):
        if ids is None or members is None:
            continue
        if on_host:
            # A wrong hit only moves a reference to the masked block, so hashes are exact enough, and cost one gather.
            # Brackets cost 4 times as much, `torch.isin` 20 times, comparing with every member 60 times.
            table = torch.zeros(HASH_SIZE, dtype=torch.bool, device=ids.device)
            table[members.long() & (HASH_SIZE - 1)] = True
            found = table.index_select(0, ids.long() & (HASH_SIZE - 1))
        else:
            ordered = members.long().sort().values
            found = ordered[torch.searchsorted(ordered, ids.long()).clamp_max_(len(ordered) - 1)] == ids
        found = found if may_be_negative else found & (ids >= 0)
        mask = found if mask is None else mask | found
    assert mask is not None
    if on_host or bound is None:
        return SharedReferences(mask, mask.nonzero().squeeze(1), None)
    return _padded_columns(mask, bound)


def _check_bound(holds: Tensor, most: int) -> None:
    compat.assert_async(
        holds,
        f"Expected at most `max_shared={most}` references that share a class or an image with the batch but got more. "
        "Pass a higher bound, or leave `max_shared` out.",
    )


def _padded_columns(mask: Tensor, most: int) -> SharedReferences:
    """Find the columns without asking the device how many there are."""
    places = mask.cumsum(dim=0)
    _check_bound(places[-1] <= most, most)
    # The first column is where the number of those so far rises to 1, the second where it rises to 2, and so on.
    columns = torch.searchsorted(places, torch.arange(1, most + 1, device=mask.device))
    valid = columns < len(mask)
    return SharedReferences(mask, columns.clamp_max_(len(mask) - 1), valid)


def add_plain_negatives(
    accumulators: list[NegativeAccumulator],
    references: Tensor,
    is_shared: Tensor,
    backend: Backend,
    read_rounded: Callable[[], RoundedRows] | None = None,
) -> None:
    """Add every reference that is not shared, by the chosen backend, and block by block where it does not apply.

    Where a block has few references above a threshold, the next one goes through the prefilter. Where the prefilter
    keeps too many, the block is added as a whole.

    Args:
        accumulators: Of the parts of one loss, with the same anchors.
        references: `(M, D)`.
        is_shared: True for the references to leave out, `(M,)`.
        backend: That of the loss.
        read_rounded: Returns the references in bfloat16, if a memory keeps them.
    """
    anchors = accumulators[0].anchors
    if (AUTO if backend == "auto" else backend) == "triton":
        accumulators = _add_by_triton(accumulators, references, is_shared)
        if not accumulators:
            return
    prefilter = active = None
    in_float32 = anchors.dtype == references.dtype == torch.float32
    if in_float32 and anchors.shape[1] >= bfloat16.SMALLEST_DIM and bfloat16.has_fast_bf16_matmul(anchors.device):
        prefilter = BFloat16Prefilter(anchors, read_rounded)
    on_host = anchors.device.type in HOST_DEVICES
    # Torch gives a thread 32,768 elements at least, so a block for one thread would leave others without work.
    on_threads = BLOCK_ELEMENTS * min(torch.get_num_threads(), MOST_THREADS)
    most = on_threads // max(anchors.shape) if on_host else GPU_BLOCK_ELEMENTS // anchors.shape[0]
    width = max(256, most)
    first = largest = width
    if prefilter is not None:
        # A block of the prefilter has 16 bits for a number, so it may be twice as long. What a memory has rounded is
        # read once only, so just the similarities have to stay in the cache.
        first, largest = SAMPLE, 2 * (width if read_rounded is None else max(256, on_threads // anchors.shape[0]))
    # All blocks share this memory: new memory for each would cost time.
    scratch = anchors.new_empty(anchors.shape[0] * min(largest, references.shape[0]))
    columns = slice(0, first)
    while columns.start < references.shape[0]:
        if active is None or not active.add_block(accumulators, references, is_shared, columns):
            few = add_block(accumulators, references, is_shared, columns, scratch)
            active = prefilter if few and active is None else None  # not again at once where it kept too many
        columns = slice(columns.stop, columns.stop + (width if active is None else largest))


def _add_by_triton(
    accumulators: list[NegativeAccumulator], references: Tensor, is_shared: Tensor
) -> list[NegativeAccumulator]:
    """Add every reference that is not shared by the kernel, and return the accumulators it cannot serve."""
    reason = _reason_against_triton(accumulators[0].anchors, references)
    if reason is None:
        from lightning_memdml.losses.backends.triton import kernel

        accumulators, reason = kernel.add_plain_negatives(accumulators, references, is_shared)
    if reason is not None:
        _warn_of_blocks(reason)
    return accumulators


def _reason_against_triton(anchors: Tensor, references: Tensor) -> str | None:
    """Return what the Triton backend cannot serve, or `None` if it can serve both."""
    if references.device.type not in TRITON_DEVICES:
        return f"references on {references.device}"
    from lightning_memdml.losses.backends.triton import kernel  # Triton is not everywhere

    return kernel.reason_against(anchors, references)


def _warn_of_blocks(reason: str) -> None:
    warnings.warn(
        "Expected contiguous references in float16 or bfloat16 of at most 512 numbers on an NVIDIA GPU, and a loss "
        f'with element-wise weights, for `backend="triton"` but got {reason}. Blocks are used instead: leave '
        "`backend` out, or store the memory in 16 bits.",
        stacklevel=3,
    )


def finish(
    loss: LossDefinition, block: SharedBlock, totals: list[NegativeTotals], gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Combine the totals of all negatives with the positives, which are in the shared block.

    Args:
        loss: The loss.
        block: The anchors beside the shared references.
        totals: Over the negatives, of each part of the loss.
        gradient: Of the negatives of the first part, up to the anchor's factor, `(B, D)`. It is overwritten.

    Returns:
        Value `(B,)` and gradient `(B, D)` of the anchors, in the order of the block.
    """
    given: Any = (block.contexts, totals) if loss.parts else (block.contexts[0], totals[0])
    terms = loss.combine(block.similarity, block.positive, *given)
    positive_weights = torch.where(block.positive, terms.positive_weights, 0.0)
    scale = terms.negative_weight_scale[:, None]
    return terms.value, gradient.mul_(scale).addmm_(positive_weights, block.references, alpha=-1.0)
