"""Recall and latency of an index against exact search."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SAME = 1e-6  # neighbours whose similarities differ by less count as equal


@dataclass(frozen=True)
class IndexBenchmark:
    """Recall and latency of an index, against exact search.

    Attributes:
        queries: Number of its own images that were searched.
        recall: K -> share of the exact K nearest images that the index finds, an image itself left out.
        milliseconds: Median time of a search for one image.
        exact_milliseconds: The same of comparing with every image.
        threads: Threads that both used.
    """

    queries: int
    recall: dict[int, float]
    milliseconds: float
    exact_milliseconds: float
    threads: int

    def __str__(self) -> str:
        levels = ", ".join(f"@{k} {recall:.4f}" for k, recall in self.recall.items())
        return (
            f"recall against exact search of {self.queries} images: {levels}; {self.milliseconds:.2f} ms per search "
            f"(exact: {self.exact_milliseconds:.2f} ms), threads: {self.threads}"
        )


def without_self(similarity: Tensor, position: Tensor, own: Tensor) -> Tensor:
    """Return the similarities without that of the image itself, or without the last where it was not found."""
    is_self = position == own[:, None]
    is_self[~is_self.any(1), -1] = True
    return similarity[~is_self].view(len(similarity), -1)


def share_found(found: Tensor, exact: Tensor) -> float:
    """Return the share of found similarities that reach the last exact one of their row."""
    return float((found >= exact[:, -1:] - _SAME).double().mean())


def median_milliseconds(
    search: Callable[..., Any], embeddings: np.ndarray, k: int, seed: int, repeats: int = 11
) -> float:
    """Return the median time of a search for one image; the first search is slower."""
    times = []
    for row in np.random.default_rng(seed).integers(len(embeddings), size=repeats):
        query = torch.from_numpy(embeddings[[row]])
        start = time.perf_counter()
        search(query, k)
        times.append(1000 * (time.perf_counter() - start))
    return float(np.median(times))
