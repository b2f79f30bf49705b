"""Evaluates a pair loss against references of which every rank keeps a share.

The anchors travel, the references stay: each rank streams the anchors of all ranks through its share, and sends each
rank the partial totals of its anchors, which add up exactly, because row statistics are sums, maxima and log-sum-exps.
Only the references that share a class or an image with the anchors are sent to all ranks, for the positives among them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lightning_memdml.losses import streaming
from lightning_memdml.losses.masks import pair_masks
from lightning_memdml.losses.streaming import Pairs
from lightning_memdml.losses.totals import negatives

if TYPE_CHECKING:
    from lightning_memdml.losses.pair_loss import PairLoss


class Ranks(Protocol):
    """How the ranks reach each other. Every rank makes the same calls in the same order."""

    rank: int
    world_size: int

    def gather(self, embeddings: Tensor, labels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Return the rows of all ranks in rank order, ``(A, D)``, ``(A,)``, ``(A,)``, and how many are of each rank."""

    def all_to_all(self, states: Tensor, counts: list[int]) -> Tensor:
        """Send each rank its rows of ``(A, S)``, ``counts`` of each; return those for this rank, ``(W, B, S)``."""


def evaluate_sharded(loss: PairLoss, pairs: Pairs, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return the value ``(B,)`` of this rank's anchors, and their gradient ``dl_i/dx_i``, ``(B, D)``."""
    anchors, labels, references, ref_labels, indices, ref_indices, _ = pairs
    if indices is None or ref_indices is None:
        indices, ref_indices = torch.full_like(labels, -1), torch.full_like(ref_labels, -1)  # unknown, equal to none
    if references.shape[0] == 0:
        references = anchors.new_zeros(0, anchors.shape[1])  # a share without rows does not know how long they are
    everyone, every_label, every_index, counts = ranks.gather(anchors, labels, indices)
    special = streaming.special_columns(Pairs(everyone, every_label, references, ref_labels, every_index, ref_indices))
    columns = special.columns
    near, near_labels, near_indices, _ = ranks.gather(
        references[columns].to(anchors.dtype), ref_labels[columns], ref_indices[columns]
    )
    if max(counts) > 1 and everyone.shape[0] * near.shape[0] > streaming.most_near_elements(anchors):
        return streaming.in_halves(lambda half: evaluate_sharded(loss, half, ranks), pairs)
    if everyone.shape[0] == 0:
        return anchors.new_zeros(0), anchors.clone()
    positive, negative = pair_masks(every_label, near_labels, every_index, near_indices)
    similarity = everyone @ near.T

    contexts = [part.context(similarity, positive) for part in loss.parts]
    order = positive.sum(dim=1).argsort(descending=True)
    sorted_contexts = [tuple(facts[order] for facts in context) for context in contexts]
    shares = negatives(loss, sorted_contexts, everyone[order], references)
    for part in shares:  # gives the sums their shape, where this share has no other column
        part.add(similarity[:, :0], near[:0], slice(0, 0))
    streaming.stream_plain_negatives(shares, references, special.shared)
    plain = (~special.shared).sum().expand(everyone.shape[0], 1).to(anchors.dtype)
    states = [part.state()[order.argsort()] for part in shares]
    widths = [1, *(state.shape[1] for state in states)]
    received = ranks.all_to_all(torch.cat([plain, *states], dim=1), counts).split(widths, dim=2)
    if anchors.shape[0] == 0:
        return anchors.new_zeros(0), anchors.clone()

    first = sum(counts[: ranks.rank])
    own = slice(first, first + counts[ranks.rank])
    own_contexts = [tuple(facts[own] for facts in context) for context in contexts]
    parts = negatives(loss, own_contexts, anchors, near)
    for part, states_of_part in zip(parts, received[1:], strict=True):
        place = torch.arange(near.shape[0], device=near.device)
        part.add(similarity[own].clone(), near, place, partial(streaming.fill_masked, ~negative[own]))
        part.merge(states_of_part)
    number = negative[own].sum(dim=1) + received[0].sum(dim=(0, 2)).long()
    return streaming.finish(loss, similarity[own], positive[own], own_contexts, parts, number, near)


def check_needs_no_ranks(loss: object, options: dict[str, object]) -> None:
    """Raise a `ValueError` if a loss that cannot reach the other ranks is to be used with a share of the memory."""
    if "ranks" in options:
        raise ValueError(f"Expected a PairLoss against a ShardedMemory, which spreads its rows, but got {loss}.")
