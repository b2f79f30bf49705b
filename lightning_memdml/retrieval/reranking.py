"""Re-ranking by k-reciprocal neighbours, and the scores after it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memdml.checks import check_types
from lightning_memdml.retrieval.rank_counter import TIE
from lightning_memdml.retrieval.ranking import QueryRanks
from lightning_memdml.retrieval.retrieval_sets import (
    RetrievalSet,
    check_finite_embeddings,
    check_recall_levels,
    check_same_space,
    check_sets,
    same_known_index,
)
from lightning_memdml.retrieval.tiles import full_precision_products, row_slices

LARGEST = 10_000
"""Most images that are re-ranked together: about 32 bytes for each pair, so 3.2 GB."""

_ROWS = 256  # rows handled together, which bounds copies to a fortieth of the largest matrix


@torch.no_grad()
def rerank(queries: Tensor, gallery: Tensor | None, k1: int = 20, k2: int = 6, lambda_value: float = 0.3) -> Tensor:
    r"""Return distances after re-ranking: images are near whose k-reciprocal neighbours are the same.

    Neighbours are searched among queries and gallery together. `N(p, k)` are the k nearest images of `p`, and `p`
    itself is the first. With `d(p, g) = |p - g|^2` between rows of norm 1, which is `2 - 2 cos(p, g)`:

    - `R(p, k) = {g in N(p, k): p in N(g, k)}`;
    - `R*(p) = R(p, k1)` and every `R(q, k1 / 2)` with `q in R(p, k1)` of which at least two thirds are in `R(p, k1)`;
      `k1 / 2` is rounded up;
    - `V_p[g] = exp(-d(p, g))` for `g in R*(p)`, and 0 elsewhere;
    - `V_p` is replaced by the mean of `V_q` over `q in N(p, k2)`;
    - `d_J(p, g) = 1 - sum_j min(V_p[j], V_g[j]) / sum_j max(V_p[j], V_g[j])`;
    - the result is `(1 - lambda_value) d_J + lambda_value d`.

    Equal distances are ordered by position. Everything is computed in float64. The memory is about
    `32 (Q + G)^2` bytes, so more than 10,000 images together are refused.

    Args:
        queries: `(Q, D)`, any norm.
        gallery: `(G, D)`, or None: then the queries search each other, and the distance of each to itself is infinite.
        k1: Neighbours among which reciprocal ones are searched, at least 1.
        k2: Neighbours whose `V` are averaged, at least 1. With 1 each image keeps its own.
        lambda_value: Weight of the original distance, in [0, 1]. With 1 the order is that of the cosine.

    Returns:
        `(Q, G)` distances in float64; without a gallery `(Q, Q)`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If shapes disagree, values are not finite or out of range, or there are too many images.

    Source:
        Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR 2017, whose values are the
        defaults. The paper leaves open whether neighbours include other queries and the image itself, and how `k / 2`
        is rounded.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> rerank(rows, None, k1=2, k2=1).argmin(1).tolist()
        [1, 0, 3, 2]
    """
    check_types(rerank, locals())
    _check(queries, gallery, k1, k2, lambda_value)
    images = queries if gallery is None else torch.cat([queries, gallery])
    if images.device.type == "mps":  # has no float64
        images = images.cpu()
    with full_precision_products(images.device):
        distances = _squared_distances(images)
    neighbours = _neighbours(distances, max(k1, k2))
    features = _expanded(_reciprocal_features(distances, neighbours, k1), neighbours[:, :k2])
    first = 0 if gallery is None else len(queries)
    result = _jaccard_distances(features, len(queries), first).mul_(1 - lambda_value)
    result.add_(distances[: len(queries), first:], alpha=lambda_value)
    return result.fill_diagonal_(torch.inf) if gallery is None else result


@torch.no_grad()
def rank_reranked(
    embeddings: Tensor,
    labels: Tensor,
    gallery_embeddings: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    depth: int = 1000,
    indices: Tensor | None = None,
    gallery_indices: Tensor | None = None,
    groups: Tensor | None = None,
    gallery_groups: Tensor | None = None,
    mean_average_precision: bool = False,
) -> QueryRanks:
    """Count the ranks of every query after `rerank`, by the rules of `rank_queries`.

    Images that the scores leave out still are neighbours of others, as in the paper. An image that is in both sets
    counts as two neighbours.

    Args:
        embeddings: See `retrieval_scores`, as for every argument without a description here.
        labels: `(N,)`.
        gallery_embeddings: `(M, D)`.
        gallery_labels: `(M,)`.
        k1: See `rerank`.
        k2: See `rerank`.
        lambda_value: See `rerank`.
        depth: Largest exact rank of the best match.
        indices: `(N,)`.
        gallery_indices: `(M,)`.
        groups: `(N,)`.
        gallery_groups: `(M,)`.
        mean_average_precision: Fill `average_precision` as well.

    Raises:
        TypeError: As `rerank` and `retrieval_scores`.
        ValueError: As `rerank` and `retrieval_scores`.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> rank_reranked(rows, torch.tensor([0, 0, 1, 1]), k1=2, k2=1).best_rank.tolist()
        [1, 1, 1, 1]
    """
    check_types(rank_reranked, locals())
    (depth,) = check_recall_levels((depth,), name="depth")
    queries, gallery = check_sets(
        *(embeddings, labels, indices, groups),
        *(gallery_embeddings, gallery_labels, gallery_indices, gallery_groups),
    )
    distances = rerank(queries.embeddings, None if gallery is None else gallery.embeddings, k1, k2, lambda_value)
    return _rank(distances, queries, gallery, depth, mean_average_precision)


def _check(queries: Tensor, gallery: Tensor | None, k1: int, k2: int, lambda_value: float) -> None:
    for name, count in (("k1", k1), ("k2", k2)):
        if count < 1:
            raise ValueError(f"Expected `{name}` of at least 1 but got {count}. Count the image itself as one.")
    if not 0 <= lambda_value <= 1:
        raise ValueError(f"Expected `lambda_value` in [0, 1] but got {lambda_value}. The paper uses 0.3.")
    check_finite_embeddings("queries", queries)
    if gallery is not None:
        check_finite_embeddings("gallery", gallery)
        check_same_space(queries, gallery)
    require_rerankable(len(queries) + (0 if gallery is None else len(gallery)))


def require_rerankable(images: int) -> None:
    """Refuse more images than fit into memory together.

    Raises:
        ValueError: If there are more than `LARGEST`.
    """
    if images > LARGEST:
        raise ValueError(
            f"Expected at most {LARGEST:,} images to re-rank, queries and gallery together, but got {images:,}, for "
            f"which about {32e-9 * images**2:,.0f} GB would be needed. Pass fewer images."
        )


def _squared_distances(images: Tensor) -> Tensor:
    """Return `(N, N)` squared distances between rows of norm 1; a zero row is at distance 2 from all others."""
    rows = images.double()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return (rows @ rows.T).mul_(-2).add_(2).clamp_min_(0).fill_diagonal_(0)


def _neighbours(distances: Tensor, count: int) -> Tensor:
    """Return `(N, count)` positions of the nearest images, each image first in its own row."""
    nearest = []
    for rows in row_slices(len(distances), _ROWS):
        part = distances[rows].clone()
        part.diagonal(rows.start).fill_(-1)  # before any duplicate, which is at distance 0 too
        nearest.append(part.sort(dim=1, stable=True).indices[:, :count].clone())
    return torch.cat(nearest) if nearest else torch.empty(0, 0, dtype=torch.long, device=distances.device)


def _reciprocal(neighbours: Tensor) -> Tensor:
    """Return `(N, N)`, whether two images are among the neighbours of each other."""
    near = torch.zeros(len(neighbours), len(neighbours), dtype=torch.bool, device=neighbours.device)
    near.scatter_(1, neighbours, True)
    return near & near.T


def _reciprocal_features(distances: Tensor, neighbours: Tensor, k1: int) -> Tensor:
    """Return `(N, N)`, of which row p is `V_p` before the average."""
    reciprocal, half = _reciprocal(neighbours[:, :k1]), _reciprocal(neighbours[:, : (k1 + 1) // 2])
    features = torch.zeros_like(distances)
    for image, own in enumerate(reciprocal):
        candidates = half[own]
        shared = (candidates & own).sum(1)
        added = candidates[3 * shared >= 2 * candidates.sum(1)].any(0)
        chosen = own | added
        features[image, chosen] = (-distances[image, chosen]).exp()
    return features


def _expanded(features: Tensor, neighbours: Tensor) -> Tensor:
    """Return the mean of each image's neighbours' rows."""
    result = torch.empty_like(features)
    for rows in row_slices(len(features), _ROWS):
        result[rows] = sum(features[column] for column in neighbours[rows].T) / neighbours.shape[1]
    return result


def _jaccard_distances(features: Tensor, queries: int, first: int) -> Tensor:
    """Return `(Q, G)` distances of the first `queries` images to those from `first` on."""
    sums, columns = features.sum(1), features.T.contiguous()
    result = features.new_empty(queries, len(features) - first)
    for query, own in enumerate(features[:queries]):
        used = own.nonzero().squeeze(1)
        smaller = torch.minimum(own[used, None], columns[used, first:]).sum(0)
        result[query] = 1 - smaller / (sums[query] + sums[first:] - smaller)  # max(a, b) = a + b - min(a, b)
    return result


def _rank(
    distances: Tensor, queries: RetrievalSet, gallery: RetrievalSet | None, depth: int, every_positive: bool
) -> QueryRanks:
    """Count the ranks of each query's matches; a negative that is as near as a match ranks before it."""
    searched = queries if gallery is None else gallery
    relevant, best = torch.zeros_like(queries.labels), torch.zeros_like(queries.labels)
    r_precision, at_r, full = distances.new_full((3, len(queries.labels)), torch.nan)
    for query, row in enumerate(distances):
        match = searched.labels == queries.labels[query]
        negative = ~match
        if queries.groups is not None and searched.groups is not None:
            match &= searched.groups != queries.groups[query]
        if gallery is None:
            match[query] = False
        elif queries.indices is not None and gallery.indices is not None:
            match &= ~same_known_index(gallery.indices, queries.indices[query])
        found = int(match.sum())
        relevant[query] = found
        if found == 0:
            continue
        place = torch.arange(1, found + 1, device=row.device)
        rank = place + torch.searchsorted(row[negative].sort().values, row[match].sort().values + TIE, right=True)
        precision, within = place / rank.double(), rank <= found
        best[query] = rank[0].clamp_max(depth + 1)
        r_precision[query] = within.sum() / found
        at_r[query] = (precision * within).sum() / found
        full[query] = precision.mean()
    return QueryRanks(
        queries.rows, queries.labels, relevant, best, r_precision, at_r, full if every_positive else None, depth
    )
