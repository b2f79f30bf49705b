"""Evaluates a pair loss against a memory of any size: the gradient is formed block by block, and nothing is `B x M`.

Two observations make this as fast as the two matrix products alone:

- Few references share a class or an image with the batch. Among these *shared* references are the positives and the
  pairs to leave out (see `shared_references`). With all others every pair is a negative, which needs no mask.
- A loss that has a threshold below which a negative has no weight lets the pairs below it skip the second product and
  all element-wise work. With a trained network these are nearly all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_memdml import bfloat16
from lightning_memdml.bfloat16_copy import RoundedRows
from lightning_memdml.losses.accumulators import SAMPLE, NegativeAccumulator, add_block, make_accumulators
from lightning_memdml.losses.backends import WITH_KERNEL, Backend
from lightning_memdml.losses.backends.bfloat16_prefilter import BFloat16Prefilter
from lightning_memdml.losses.definition import LossDefinition, NegativeTotals, Pairs
from lightning_memdml.losses.row_ops import HOST_DEVICES
from lightning_memdml.losses.shared_references import GPU_BLOCK_ELEMENTS, LeftOut, SharedBlock, shared_blocks

if TYPE_CHECKING:
    from lightning_memdml.losses.backends.triton.launching import Launch

BLOCK_ELEMENTS = 1 << 19  # for each thread, of a block and of its similarities on a CPU: 2 MiB each stay in its cache
MOST_THREADS = 16  # that blocks grow with: beyond, their memory would be more than 32 MiB each
TRITON_DEVICES = {"cuda"}


def evaluate(loss: LossDefinition, pairs: Pairs) -> tuple[Tensor, Tensor]:
    r"""Return the value of each anchor, `(B,)`, and its gradient $\partial l_i / \partial x_i$, `(B, D)`."""
    value, gradient = torch.empty_like(pairs.anchors[:, 0]), torch.empty_like(pairs.anchors)
    launch = None
    if loss.backend in WITH_KERNEL and len(pairs.references):
        launch = _choose_launch(loss.backend, pairs.anchors, pairs.references)
    parts = loss.parts or (loss,)
    for block in shared_blocks(loss, pairs, by_triton=launch is not None):
        # Of each part: the totals of all negatives, and their gradient; `None` where Triton has no kernel for it.
        found: list[tuple[NegativeTotals, Tensor | None] | None] = [None] * len(parts)
        if launch is not None:
            found = _total_by_triton(loss, block, pairs.references, launch)
        left = [k for k, totals in enumerate(found) if totals is None]
        if left:
            made = make_accumulators(loss, block.contexts, block.anchors, pairs.references)
            accumulators = [made[k] for k in left]
            for accumulator in accumulators if block.listed is None else ():
                accumulator.add(block.similarity.clone(), block.references, block.shared.columns, ~block.negative)
            add_negatives(accumulators, pairs.references, block.left_out, "blocks", pairs.read_rounded)
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
    loss: LossDefinition, block: SharedBlock, references: Tensor, launch: Launch
) -> list[tuple[NegativeTotals, Tensor | None] | None]:
    """Return the totals of all negatives and their gradient, for each part of a loss that has a kernel."""
    from lightning_memdml.losses.backends.triton.launching import SharedNegatives, total_negatives

    shared, mask = SharedNegatives(block.shared.columns, block.negative, block.number), block.shared.mask
    parts = loss.parts or (loss,)
    found, reason = total_negatives(parts, block.contexts, block.anchors, references, mask, shared, launch)
    if reason is not None:
        _warn_of_blocks(loss.backend, reason)
    return found


def add_negatives(
    accumulators: list[NegativeAccumulator],
    references: Tensor,
    left_out: LeftOut,
    backend: Backend,
    read_rounded: Callable[[], RoundedRows] | None = None,
) -> None:
    """Add all negatives that are not left out, by the chosen backend, and block by block where it does not apply.

    Where a block has few pairs above a threshold, the next one goes through the prefilter. Where the prefilter keeps
    too many, the block is added as a whole.

    Args:
        accumulators: Of the parts of one loss, with the same anchors.
        references: `(M, D)`.
        left_out: The references or pairs to leave out.
        backend: That of the loss.
        read_rounded: Returns the references in bfloat16, if a memory keeps them.
    """
    anchors = accumulators[0].anchors
    if backend in WITH_KERNEL and (launch := _choose_launch(backend, anchors, references)) is not None:
        from lightning_memdml.losses.backends.triton.launching import add_plain_negatives

        accumulators, reason = add_plain_negatives(accumulators, references, left_out.is_shared, launch)
        if reason is not None:
            _warn_of_blocks(backend, reason)
        if not accumulators:
            return
    prefilter = way = None
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
        if way is None or not way(accumulators, references, left_out, columns):
            share = add_block(accumulators, references, left_out, columns, scratch)
            # Not again at once where it kept too many.
            way = prefilter.choose(share) if prefilter is not None and way is None else None
        columns = slice(columns.stop, columns.stop + (width if way is None else largest))


def _choose_launch(backend: Backend, anchors: Tensor, references: Tensor) -> Launch | None:
    """Return what adds negatives by a kernel, or `None`, with a warning, where it cannot serve both."""
    if references.device.type in TRITON_DEVICES:
        from lightning_memdml.losses.backends.triton import elementwise, kernel  # Triton is not everywhere

        module = kernel if backend == "triton" else elementwise
        if (reason := module.reason_against(anchors, references)) is None:
            return module.launch
    else:
        reason = f"references on {references.device}"
    _warn_of_blocks(backend, reason)
    return None


def _warn_of_blocks(backend: Backend, reason: str) -> None:
    width, other = (" of at most 512 numbers", ", try `triton_blocks`") if backend == "triton" else ("", "")
    warnings.warn(
        f"Expected contiguous references in float16 or bfloat16{width} on an NVIDIA GPU, and a loss with element-wise "
        f'weights, for `backend="{backend}"` but got {reason}. Blocks are used instead: leave `backend` out{other}, or '
        "store the memory in 16 bits.",
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
    gradient.mul_(terms.negative_weight_scale[:, None])
    if block.listed is not None:
        return terms.value, gradient.sub_(block.listed.weigh(terms.positive_weights, block.references))
    weights = torch.where(block.positive, terms.positive_weights, 0.0)
    return terms.value, gradient.addmm_(weights, block.references, alpha=-1.0)
