"""Normalised mutual information (NMI) of k-means clusters and classes, the clustering score of older papers."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_memdml.checks import check_types
from lightning_memdml.retrieval.faiss_index import import_faiss
from lightning_memdml.retrieval.retrieval_sets import as_integers, check_finite_embeddings


@torch.no_grad()
def normalized_mutual_information(
    embeddings: Tensor, labels: Tensor, *, clusters: int | None = None, seed: int = 0, iterations: int = 20
) -> float:
    """Compare k-means clusters of unit embeddings with the classes: `2 I(U; V) / (H(U) + H(V))`.

    The value depends on the seed and on the k-means implementation by about a percent, so state both with a result. It
    runs on the CPU, in `O(iterations * N * clusters * D)`: as long as a few retrieval evaluations with many classes.
    The table of clusters and classes is sparse, so that 11,000 of each fit in memory.

    Args:
        embeddings: `(N, D)`, any norm.
        labels: `(N,)` integers.
        clusters: Number of clusters; by default the number of classes.
        seed: Seed of the initial centroids.
        iterations: Of k-means.

    Returns:
        A value in [0, 1]; 1 if both partitions have a single part, NaN without samples.

    Raises:
        ImportError: If faiss is not installed.
        TypeError: If an argument has the wrong type.
        ValueError: If shapes disagree, values are not finite, or `clusters` is not in 1..N.

    Example:
        >>> normalized_mutual_information(torch.eye(2).repeat(5, 1), torch.tensor([0, 1]).repeat(5))
        1.0
    """
    check_types(normalized_mutual_information, locals())
    check_finite_embeddings("embeddings", embeddings)
    labels = as_integers("labels", labels, embeddings).cpu()
    if len(labels) == 0:
        return math.nan
    classes = labels.unique(return_inverse=True)[1]
    clusters = int(classes.max()) + 1 if clusters is None else clusters
    if not 1 <= clusters <= len(labels):
        raise ValueError(
            f"Expected 1 to {len(labels)} `clusters`, one per sample at most, but got {clusters}. "
            "Leave it out for one per class."
        )
    return mutual_information_of(_k_means(embeddings.cpu(), clusters, seed, iterations), classes)


def mutual_information_of(first: Tensor, second: Tensor) -> float:
    """Return `2 I(U; V) / (H(U) + H(V))` of two partitions, `(N,)` part numbers from 0 each."""
    pairs, joint = torch.stack([first, second]).unique(dim=1, return_counts=True)
    joint = joint.double() / len(first)
    left, right = (torch.bincount(parts).double() / len(parts) for parts in (first, second))
    information = (joint * (joint / (left[pairs[0]] * right[pairs[1]])).log()).sum()
    entropies = -(torch.xlogy(left, left).sum() + torch.xlogy(right, right).sum())
    return 1.0 if entropies == 0 else min(1.0, max(0.0, (2 * information / entropies).item()))


def _k_means(embeddings: Tensor, clusters: int, seed: int, iterations: int) -> Tensor:
    faiss = import_faiss("Only normalised mutual information and approximate indexes need it.")
    unit = F.normalize(embeddings.float(), dim=1).numpy()
    # Every sample is used: by default faiss draws 256 per cluster and warns below 39.
    k_means = faiss.Kmeans(
        unit.shape[1],
        clusters,
        niter=iterations,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(unit),
    )
    k_means.train(unit)
    return torch.from_numpy(k_means.index.search(unit, 1)[1][:, 0]).long()
