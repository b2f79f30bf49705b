"""Evaluates a pair loss against references of which every rank keeps a share.

The anchors are sent to all ranks, the references stay. Each rank adds up the negatives of its share for the anchors of
all ranks, and sends each rank the totals of its anchors. They combine exactly, because they are sums, maxima and
log-sum-exps. Only the references that share a class or an image with an anchor are sent to all ranks. Among them each
rank finds the positives of its own anchors, and it sends the statistics on which the negatives depend to all ranks.

So every pair is computed once, on the rank that keeps the reference, and those of one class twice: the arithmetic of a
rank does not grow with the number of ranks.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memdml.losses.accumulators import make_accumulators
from lightning_memdml.losses.definition import Context, LossDefinition, Pairs, pair_masks
from lightning_memdml.losses.listed_pairs import list_pairs
from lightning_memdml.losses.row_ops import HOST_DEVICES
from lightning_memdml.losses.shared_references import GPU_BLOCK_ELEMENTS, LeftOut, find_shared, shared_blocks
from lightning_memdml.losses.streaming import add_negatives, finish


class Ranks(Protocol):
    """How the ranks reach each other. Every rank makes the same calls in the same order.

    Attributes:
        rank: The number of this rank.
        world_size: The number of ranks W.
    """

    rank: int
    world_size: int

    def gather(self, embeddings: Tensor, labels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Return the rows of all ranks in rank order, `(A, D)`, `(A,)`, `(A,)`, and how many are of each rank."""

    def gather_contexts(self, contexts: Tensor) -> Tensor:
        """Return the rows of all ranks in rank order, `(A, S)`, of equally wide tensors `(B, S)`."""

    def all_to_all(self, states: Tensor, counts: list[int]) -> Tensor:
        """Send each rank its rows of `(A, S)`, `counts` of each. Return those for this rank, `(W, B, S)`."""


def evaluate_sharded(loss: LossDefinition, pairs: Pairs, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return the value of this rank's anchors, `(B,)`, and their gradient, `(B, D)`.

    Args:
        loss: The loss.
        pairs: This rank's anchors, and its share of the references.
        ranks: How to reach the other ranks.
    """
    anchors, labels, references, ref_labels, indices, ref_indices, *_ = pairs
    if indices is None or ref_indices is None:
        indices, ref_indices = torch.full_like(labels, -1), torch.full_like(ref_labels, -1)  # unknown, equal to none
    if references.shape[0] == 0:
        references = anchors.new_zeros(0, anchors.shape[1])  # a share without rows has no width of its own
    all_anchors, all_labels, all_indices, counts = ranks.gather(anchors, labels, indices)
    shared = find_shared(Pairs(all_anchors, all_labels, references, ref_labels, all_indices, ref_indices))
    own_shared = references[shared.columns].to(anchors.dtype), ref_labels[shared.columns], ref_indices[shared.columns]
    shared_rows, shared_labels, shared_indices, _ = ranks.gather(*own_shared)
    own = Pairs(anchors, labels, shared_rows, shared_labels, indices, shared_indices)
    contexts = _contexts_of_all(loss, own, ranks)
    if all_anchors.shape[0] == 0:
        return anchors.new_zeros(0), anchors.clone()

    # The negatives of this share, for the anchors of all ranks.
    shares = make_accumulators(loss, contexts, all_anchors, references)
    number = (~shared.mask).sum().expand(all_anchors.shape[0])
    # On a GPU the shared references are added here. On a CPU one empty block, which gives further sums their shape.
    left_out, columns = LeftOut(shared.mask, None), shared.columns
    if anchors.device.type in HOST_DEVICES:
        is_negative = pair_masks(all_labels, ref_labels[columns], all_indices, ref_indices[columns])[1]
        number = number + is_negative.sum(dim=1)
        listed = list_pairs(~is_negative)
        left_out, columns = LeftOut(shared.mask, listed._replace(columns=columns[listed.columns])), columns[:0]
    for block in columns.split(max(256, GPU_BLOCK_ELEMENTS // all_anchors.shape[0])):
        rows = references[block].to(anchors.dtype)
        is_negative = pair_masks(all_labels, ref_labels[block], all_indices, ref_indices[block])[1]
        number = number + is_negative.sum(dim=1)
        similarity = all_anchors @ rows.T
        for share in shares:
            share.add(similarity.clone(), rows, block, ~is_negative)
    add_negatives(shares, references, left_out, loss.backend, pairs.read_rounded)
    states = [number[:, None].to(anchors.dtype), *(share.state() for share in shares)]
    received = ranks.all_to_all(torch.cat(states, dim=1), counts)

    # The totals of all shares and the positives, for the anchors of this rank.
    value, gradient = torch.empty_like(anchors[:, 0]), torch.empty_like(anchors)
    for block in shared_blocks(loss, own) if anchors.shape[0] else ():
        numbers, *states_of_parts = received[:, block.rows].split([state.shape[1] for state in states], dim=2)
        accumulators = make_accumulators(loss, block.contexts, block.anchors, block.references)
        for accumulator, states_of_part in zip(accumulators, states_of_parts, strict=True):
            accumulator.merge(states_of_part)
        number = numbers.sum(dim=(0, 2)).long()
        totals, of_negatives = [accumulator.totals(number) for accumulator in accumulators], accumulators[0].gradient
        assert of_negatives is not None
        value[block.rows], gradient[block.rows] = finish(loss, block, totals, of_negatives)
    return value, gradient


def _contexts_of_all(loss: LossDefinition, own: Pairs, ranks: Ranks) -> list[Context]:
    """Return the contexts of each part of the loss for the anchors of all ranks.

    Where a context is wider for some anchors than for others, it is padded with `inf`.
    """
    nothing = own.anchors.new_zeros(0, 0)
    of_none = [part.context(nothing, nothing.bool()) for part in loss.parts or (loss,)]
    flat = [tensor for context in of_none for tensor in context]
    if not flat:
        return of_none
    rows = own.anchors.shape[0]
    tensors = [own.anchors.new_zeros(rows, 0) for _ in flat]
    for block in shared_blocks(loss, own) if rows else ():
        for k, tensor in enumerate(tensor for context in block.contexts for tensor in context):
            columns = tensor.to(own.anchors.dtype).view(block.anchors.shape[0], -1)
            missing = columns.shape[1] - tensors[k].shape[1]
            tensors[k] = F.pad(tensors[k], (0, max(0, missing)), value=torch.inf)
            tensors[k][block.rows] = F.pad(columns, (0, max(0, -missing)), value=torch.inf)
    own_widths = own.anchors.new_tensor([[tensor.shape[1] for tensor in tensors]])
    widths = [int(width) for width in ranks.gather_contexts(own_widths).amax(dim=0)]
    padded = [
        F.pad(tensor, (0, width - tensor.shape[1]), value=torch.inf)
        for tensor, width in zip(tensors, widths, strict=True)
    ]
    received = iter(ranks.gather_contexts(torch.cat(padded, dim=1)).split(widths, dim=1))
    return [
        tuple(next(received).squeeze(1) if tensor.ndim == 1 else next(received) for tensor in context)
        for context in of_none
    ]
