"""Queries to look at, each with its nearest references and its best match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_memdml.checks import check_types
from lightning_memdml.retrieval.neighbours import nearest_neighbours
from lightning_memdml.retrieval.ranking import QueryRanks, rank_queries
from lightning_memdml.retrieval.retrieval_sets import UNKNOWN, same_known_index

Order = Literal["hardest", "random"]


@dataclass(frozen=True)
class Neighbour:
    """A reference that a query found.

    Attributes:
        position: Position in the gallery.
        label: Its label.
        similarity: Cosine similarity to the query.
        right: Whether it has the query's label; None if that is unknown.
    """

    position: int
    label: int
    similarity: float
    right: bool | None


@dataclass(frozen=True)
class RetrievalExample:
    """One query and its nearest references.

    Attributes:
        position: Position of the query in its embeddings.
        label: Its label, or None if unknown.
        neighbours: Nearest references, most similar first.
        best_match: The most similar right reference, or None if there is none at all.
        best_rank: 1-based rank of that match, ties counted against it; beyond `depth` it is `depth + 1`.
        depth: Largest exact rank.
        name: Name of the query, by default the name of its class.
    """

    position: int
    label: int | None
    neighbours: tuple[Neighbour, ...]
    best_match: Neighbour | None = None
    best_rank: int = 0
    depth: int = 0
    name: str = ""


def retrieval_examples(
    embeddings: Tensor,
    labels: Tensor,
    gallery_embeddings: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    count: int = 8,
    neighbours: int = 8,
    order: Order = "hardest",
    queries: Sequence[int] | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
    gallery_indices: Tensor | None = None,
) -> list[RetrievalExample]:
    """Choose queries and find their nearest neighbours, exactly, by cosine similarity.

    Args:
        embeddings: `(N, D)` queries; without a gallery they are searched among each other, excluding self-matches.
        labels: `(N,)` integers.
        gallery_embeddings: `(M, D)`.
        gallery_labels: `(M,)`.
        count: Number of queries.
        neighbours: Number of neighbours of each.
        order: `"hardest"`: by descending rank of the first right reference, then by ascending average precision at R;
            `"random"`: a draw. Queries without any match are not chosen.
        queries: Positions of the queries instead, shown in this order.
        seed: Seed of the draw.
        indices: `(N,)` index of each image, each once, -1 where unknown; with `gallery_indices`, a query does not find
            its own image.
        gallery_indices: `(M,)` index of each image of the gallery.

    Raises:
        TypeError: If an embedding or label argument has the wrong type.
        ValueError: If shapes disagree, values are not finite, or `order` is unknown.

    Example:
        >>> embeddings, labels = torch.eye(3)[[0, 0, 1, 2]], torch.tensor([0, 0, 1, 1])
        >>> examples = retrieval_examples(embeddings, labels, neighbours=1)
        >>> [(example.position, example.best_rank) for example in examples]
        [(2, 3), (3, 3), (0, 1), (1, 1)]
    """
    check_types(retrieval_examples, locals(), "order")
    if order not in ("hardest", "random"):
        raise ValueError(f"Expected `order` to be 'hardest' or 'random' but got {order!r}. Pass one of these.")
    ranks = rank_queries(
        embeddings, labels, gallery_embeddings, gallery_labels, indices=indices, gallery_indices=gallery_indices
    )
    if len(ranks.rows) < len(embeddings):
        raise ValueError("Expected each image once but `indices` repeat. Leave the repeated rows out.")
    chosen = _choose(ranks, count, order, seed) if queries is None else torch.as_tensor(list(queries)).to(ranks.rows)
    if gallery_embeddings is None or gallery_labels is None:
        gallery_embeddings, gallery_labels, own = embeddings, ranks.labels, ranks.rows
        gallery_own = own
    else:
        gallery_labels = gallery_labels.to(ranks.labels)
        own, gallery_own = ranks.rows, torch.full_like(gallery_labels, UNKNOWN)  # no query is in the gallery
        if indices is not None and gallery_indices is not None:
            own, gallery_own = indices.to(ranks.labels), gallery_indices.to(ranks.labels)

    nearest = nearest_neighbours(
        embeddings,
        gallery_embeddings,
        k=neighbours,
        queries=chosen,
        indices=own,
        gallery_indices=gallery_own,
    )
    examples = []
    for query, similarity, position in zip(chosen.tolist(), *nearest, strict=True):
        label = int(ranks.labels[query])
        found = zip(position.tolist(), gallery_labels[position].tolist(), similarity.tolist(), strict=True)
        listed = tuple(Neighbour(at, other, value, other == label) for at, other, value in found if at >= 0)
        is_self = same_known_index(own[query], gallery_own)
        right = ((gallery_labels == label) & ~is_self).nonzero().squeeze(1)
        best_match = _best_match(embeddings[query], gallery_embeddings, right, label)
        rank = int(ranks.best_rank[query])
        examples.append(RetrievalExample(query, label, listed, best_match, rank, ranks.depth))
    return examples


def _best_match(query: Tensor, gallery: Tensor, right: Tensor, label: int) -> Neighbour | None:
    if len(right) == 0:
        return None
    similarity = F.normalize(gallery[right].float(), dim=1) @ F.normalize(query.float(), dim=0)
    best = similarity.argmax()
    return Neighbour(int(right[best]), label, float(similarity[best]), True)


def _choose(ranks: QueryRanks, count: int, order: Order, seed: int) -> Tensor:
    candidates = (ranks.relevant > 0).nonzero().squeeze(1)
    if order == "random":
        drawn = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))[:count]
        return candidates[drawn.to(candidates.device)]
    candidates = candidates[ranks.average_precision_at_r[candidates].argsort(stable=True)]
    return candidates[ranks.best_rank[candidates].argsort(descending=True, stable=True)][:count]
