"""Evaluates a pair loss against references of which every rank keeps a share.

The anchors travel, the references stay. Each rank adds up the plain negatives of its share for the anchors of all
ranks, and sends each rank the totals of its anchors. They combine exactly, because they are sums, maxima and
log-sum-exps. Only the references that share a class or an image with the anchors are sent to all ranks.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lightning_memdml.losses.accumulators import make_accumulators
from lightning_memdml.losses.definition import LossDefinition, Pairs
from lightning_memdml.losses.streaming import (
    SharedReferences,
    add_plain_negatives,
    compare_with_shared,
    evaluate_in_chunks,
    find_shared,
    finish,
    too_many_pairs,
)


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

    def all_to_all(self, states: Tensor, counts: list[int]) -> Tensor:
        """Send each rank its rows of `(A, S)`, `counts` of each. Return those for this rank, `(W, B, S)`."""


def evaluate_sharded(loss: LossDefinition, pairs: Pairs, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return the value of this rank's anchors, `(B,)`, and their gradient, `(B, D)`.

    Args:
        loss: The loss.
        pairs: This rank's anchors, and its share of the references.
        ranks: How to reach the other ranks.
    """
    anchors, labels, references, ref_labels, indices, ref_indices, _ = pairs
    if indices is None or ref_indices is None:
        indices, ref_indices = torch.full_like(labels, -1), torch.full_like(ref_labels, -1)  # unknown, equal to none
    if references.shape[0] == 0:
        references = anchors.new_zeros(0, anchors.shape[1])  # a share without rows has no width of its own
    all_anchors, all_labels, all_indices, counts = ranks.gather(anchors, labels, indices)
    shared = find_shared(Pairs(all_anchors, all_labels, references, ref_labels, all_indices, ref_indices))
    own_shared = references[shared.columns].to(anchors.dtype), ref_labels[shared.columns], ref_indices[shared.columns]
    shared_rows, shared_labels, shared_indices, _ = ranks.gather(*own_shared)
    if max(counts) > 1 and too_many_pairs(all_anchors, shared_labels):
        return evaluate_in_chunks(lambda chunk: evaluate_sharded(loss, chunk, ranks), pairs)
    if all_anchors.shape[0] == 0:
        return anchors.new_zeros(0), anchors.clone()
    every = torch.ones_like(shared_labels, dtype=torch.bool)
    shared_pairs = Pairs(all_anchors, all_labels, shared_rows, shared_labels, all_indices, shared_indices)
    block = compare_with_shared(loss, shared_pairs, SharedReferences(every, every.nonzero().squeeze(1), every))

    # The plain negatives of this share, for the anchors of all ranks.
    shares = make_accumulators(loss, block.contexts, block.anchors, references)
    for share in shares:  # gives the further sums their shape, where this share has no plain negative
        share.add(block.similarity[:, :0].clone(), block.references[:0], slice(0, 0))
    add_plain_negatives(shares, references, shared.mask, loss.backend)
    plain = (~shared.mask).sum().expand(all_anchors.shape[0], 1).to(anchors.dtype)
    states = [plain, *(share.state()[block.place] for share in shares)]
    received = ranks.all_to_all(torch.cat(states, dim=1), counts)
    if anchors.shape[0] == 0:
        return anchors.new_zeros(0), anchors.clone()

    # The shared references and the totals of all shares, for the anchors of this rank.
    first = sum(counts[: ranks.rank])
    own = block.select(block.place[first : first + counts[ranks.rank]])
    numbers, *states_of_parts = received.split([state.shape[1] for state in states], dim=2)
    accumulators = make_accumulators(loss, own.contexts, own.anchors, own.references)
    for accumulator, states_of_part in zip(accumulators, states_of_parts, strict=True):
        places = torch.arange(own.references.shape[0], device=own.references.device)
        accumulator.add(own.similarity.clone(), own.references, places, ~own.negative)
        accumulator.merge(states_of_part)
    number = own.negative.sum(dim=1) + numbers.sum(dim=(0, 2)).long()
    return finish(loss, own, accumulators, number)
