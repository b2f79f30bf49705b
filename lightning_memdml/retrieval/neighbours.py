"""Exact nearest neighbours by cosine similarity, tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memdml.checks import check_types
from lightning_memdml.retrieval.retrieval_sets import (
    UNKNOWN,
    as_integers,
    check_finite_embeddings,
    check_recall_levels,
    check_same_space,
    same_known_index,
)
from lightning_memdml.retrieval.tiles import full_precision_products, row_slices, unit_float32

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
    """Find the `k` most similar references of each query, in float32. Equal similarities come in any order.

    Args:
        embeddings: `(N, D)`, any norm; without a gallery they are searched among each other, excluding
            self-matches.
        gallery_embeddings: `(M, D)`.
        k: Number of neighbours.
        queries: `(Q,)` positions in `embeddings` of the queries; all by default.
        indices: `(N,)` index of each image, -1 where unknown; with `gallery_indices`, a query does not find its own
            image.
        gallery_indices: `(M,)` index of each image of the gallery.

    Returns:
        Cosine similarities, descending, and positions in the gallery, both `(Q, min(k, M))`. Where a query
        has fewer references, since self-matches are excluded, the similarity is -inf and the position -1.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If shapes disagree or values are not finite.

    Example:
        >>> similarity, position = nearest_neighbours(torch.eye(3)[[0, 0, 1]], k=1)
        >>> position[:2, 0].tolist()
        [1, 0]
    """
    check_types(nearest_neighbours, locals())
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
            for part in row_slices(len(own), _TILE)
        ]
    width = min(k, len(gallery))
    similarity = torch.cat([torch.empty(0, width, device=own.device), *(pair[0] for pair in found)])
    position = torch.cat([torch.empty(0, width, device=own.device).long(), *(pair[1] for pair in found)])
    return similarity, position.masked_fill(similarity.isinf(), -1)


def _checked(prefix: str, embeddings: Tensor, indices: Tensor | None) -> tuple[Tensor, Tensor | None]:
    check_finite_embeddings(f"{prefix}embeddings", embeddings)
    if indices is None:
        return embeddings, None
    return embeddings, as_integers(f"{prefix}indices", indices, embeddings).clamp_min(UNKNOWN)


def _search(
    queries: Tensor, gallery: Tensor, keys: Tensor | None, gallery_keys: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """Return the best references, kept while the tiles of the gallery are computed one by one."""
    unit = unit_float32(queries)
    best = unit.new_empty(len(unit), 0)
    position = best.long()
    for columns in row_slices(len(gallery), _TILE):
        tile = unit @ unit_float32(gallery[columns]).T
        if keys is not None and gallery_keys is not None:
            tile.masked_fill_(same_known_index(keys[:, None], gallery_keys[columns]), -torch.inf)
        value, place = tile.topk(min(k, tile.shape[1]), dim=1)
        merged = torch.cat([best, value], dim=1)
        best, chosen = merged.topk(min(k, merged.shape[1]), dim=1)
        position = torch.cat([position, place + columns.start], dim=1).gather(1, chosen)
    return best, position
