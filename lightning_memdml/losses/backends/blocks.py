"""Adds plain negatives block by block: one matrix product, the loss in torch, a second matrix product.

On a CPU, a loss with a threshold (`LossDefinition.negative_threshold`) skips the columns of a block in which no anchor
is above it: they take part in the first product only. With a trained network these are nearly all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memdml.losses.accumulators import NegativeAccumulator
from lightning_memdml.losses.row_ops import HOST_DEVICES

BLOCK_ELEMENTS = 1 << 19  # of a block and of its similarities on a CPU: 2 MiB each in float32 stay in its cache
GPU_BLOCK_ELEMENTS = 1 << 24  # similarities of a block on a GPU, where a block costs a dozen kernel launches
SAMPLE = 256  # columns that are looked at first
DENSE_SHARE = 0.5  # above this share of columns to be kept, gathering them costs more than it saves
SPARSE_SHARE = 0.25  # up to this share the prefilter is tried, which keeps some more


def add_plain_negatives(
    accumulators: list[NegativeAccumulator], references: Tensor, is_shared: Tensor
) -> list[NegativeAccumulator]:
    """Add every reference that is not shared to all accumulators, and return none of them.

    Args:
        accumulators: Of the parts of one loss, with the same anchors.
        references: `(M, D)`.
        is_shared: True for the references to leave out, `(M,)`.
    """
    width, scratch = block_size(accumulators[0].anchors, references)
    for start in range(0, references.shape[0], width):
        add_block(accumulators, references, is_shared, slice(start, start + width), scratch)
    return []


def block_size(anchors: Tensor, references: Tensor, blocks_at_once: int = 1) -> tuple[int, Tensor]:
    """Return how many references a block has, and memory for the similarities of so many blocks.

    All blocks of a call share this memory: new memory for each would cost time.
    """
    on_host = anchors.device.type in HOST_DEVICES
    width = max(256, BLOCK_ELEMENTS // max(anchors.shape) if on_host else GPU_BLOCK_ELEMENTS // anchors.shape[0])
    return width, anchors.new_empty(anchors.shape[0] * min(blocks_at_once * width, references.shape[0]))


def add_block(
    accumulators: list[NegativeAccumulator], references: Tensor, is_shared: Tensor, columns: slice, scratch: Tensor
) -> bool:
    """Add one block. All accumulators read the same similarities.

    Args:
        accumulators: Of the parts of one loss, with the same anchors.
        references: All references, `(M, D)`.
        is_shared: True for the references to leave out, `(M,)`.
        columns: The references of the block.
        scratch: At least `B * n` numbers, overwritten.

    Returns:
        Whether few columns have a similarity above a threshold. Always false on a GPU, where they are not counted.
    """
    anchors, block, excluded = accumulators[0].anchors, references[columns], is_shared[columns]
    on_host = anchors.device.type in HOST_DEVICES
    # A CPU widens references in 16 bits, which costs it less than rounding the anchors. A GPU multiplies in 16 bits
    # with sums in float32, and gets indices as a mask: the host would wait for their number.
    if on_host or anchors.dtype != torch.float32:
        block = block.to(anchors.dtype)
    similarity = scratch[: anchors.shape[0] * block.shape[0]].view(anchors.shape[0], block.shape[0])
    if block.dtype == anchors.dtype:
        torch.mm(anchors, block.T, out=similarity)
    else:
        torch.mm(anchors.to(block.dtype), block.T, out_dtype=anchors.dtype, out=similarity)
    few = True
    pairs_to_fill = excluded.nonzero().squeeze(1) if on_host else excluded
    for accumulator in accumulators:
        kept = columns_above(similarity, accumulator.threshold, excluded) if on_host else None
        few &= kept is not None and kept.shape[0] <= SPARSE_SHARE * block.shape[0]
        if kept is None:
            own = similarity if accumulator is accumulators[-1] else similarity.clone()  # it is overwritten
            accumulator.add(own, block, columns, pairs_to_fill)
        else:
            own, rows = similarity.index_select(1, kept), block.index_select(0, kept)
            accumulator.add(own, rows, kept + columns.start)
    return few


def columns_above(similarity: Tensor, threshold: Tensor | float, excluded: Tensor) -> Tensor | None:
    """Return the columns in which an anchor is above its threshold, or `None` where it pays to take them all.

    Args:
        similarity: `(B, n)`.
        threshold: One number, or one per anchor `(B,)`.
        excluded: Columns to leave out, `(n,)`.

    Returns:
        Ascending numbers of columns. `None` if more than half of all columns, or of the first 256, are above.
    """
    if not isinstance(threshold, Tensor) and threshold <= -1.0:
        return None
    for width in (min(SAMPLE, similarity.shape[1]), similarity.shape[1]):
        block = similarity[:, :width]
        # The largest similarity of a column is compared, not each of them: a mask of all pairs costs more.
        if isinstance(threshold, Tensor):
            is_above = (block - threshold[:, None]).amax(dim=0) > 0
        else:
            is_above = block.amax(dim=0) > threshold
        if is_above.sum() > DENSE_SHARE * width:
            return None
    return (is_above & ~excluded).nonzero().squeeze(1)
