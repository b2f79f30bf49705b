"""Exact nearest neighbours by cosine similarity, tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_memdml.retrieval.checks import (
    check_embeddings,
    check_finite,
    check_integers,
    check_recall_levels,
    check_same_space,
)
from lightning_memdml.retrieval.tiles import full_precision_products, split_rows

_TILE = 2048


@torch.no_grad()
def nearest_neighbours(
    embeddings: Tensor,
    gallery_embeddings: Tensor | None = None,
    *,
    k: int = 10,
    queries: Tensor | None = None,
    indices: Tensor | None = None,
    gallery_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the `k` most similar references of each query, in float32; equal similarities come in any order.

    Args:
        embeddings: `(N, D)`, any norm; without a gallery they are searched among each other, nobody finding
            itself.
        gallery_embeddings: `(M, D)`.
        k: Number of neighbours.
        queries: `(Q,)` positions in `embeddings` of the queries; all by default.
        indices: `(N,)` image numbers; with `gallery_indices`, a query does not find its own number.
        gallery_indices: `(M,)` image numbers of the gallery.

    Returns:
        Cosine similarities, descending, and positions in the gallery, both `(Q, min(k, M))`. Where a query
        has fewer references (it may not find itself) the similarity is -inf and the position -1.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If shapes disagree or values are not finite.

    Example:
        >>> similarity, position = nearest_neighbours(torch.eye(3)[[0, 0, 1]], k=1)
        >>> position[:2, 0].tolist()
        [1, 0]
    """
    (k,) = check_recall_levels((k,))
    gallery_keys: Tensor | None
    own, keys = _checked("", embeddings, indices)
    if gallery_embeddings is None:
        gallery = own
        keys = gallery_keys = torch.arange(len(own), device=own.device)
    else:
        gallery, gallery_keys = _checked("gallery_", gallery_embeddings, gallery_indices)
        check_same_space(own, gallery)
    if queries is not None:
        own, keys = own[queries], None if keys is None else keys[queries]
    with full_precision_products(own.device):
        found = [
            _search(own[part], gallery, None if keys is None else keys[part], gallery_keys, k)
            for part in split_rows(len(own), _TILE)
        ]
    width = min(k, len(gallery))
    similarity = torch.cat([torch.empty(0, width, device=own.device), *(pair[0] for pair in found)])
    position = torch.cat([torch.empty(0, width, device=own.device).long(), *(pair[1] for pair in found)])
    return similarity, position.masked_fill(similarity.isinf(), -1)


def _checked(prefix: str, embeddings: Tensor, indices: Tensor | None) -> tuple[Tensor, Tensor | None]:
    check_embeddings(embeddings, f"{prefix}embeddings")
    check_finite(embeddings, f"{prefix}embeddings")
    return embeddings, None if indices is None else check_integers(indices, f"{prefix}indices", embeddings)


def _search(
    queries: Tensor, gallery: Tensor, keys: Tensor | None, gallery_keys: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """The best of the gallery, kept while its tiles pass by."""
    unit = F.normalize(queries.float(), dim=1)
    best = unit.new_empty(len(unit), 0)
    position = best.long()
    for columns in split_rows(len(gallery), _TILE):
        tile = unit @ F.normalize(gallery[columns].float(), dim=1).T
        if keys is not None and gallery_keys is not None:
            tile.masked_fill_(keys[:, None] == gallery_keys[columns], -torch.inf)
        value, place = tile.topk(min(k, tile.shape[1]), dim=1)
        merged = torch.cat([best, value], dim=1)
        best, chosen = merged.topk(min(k, merged.shape[1]), dim=1)
        position = torch.cat([position, place + columns.start], dim=1).gather(1, chosen)
    return best, position
