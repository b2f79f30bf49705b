"""Embeddings that are hard to rank, small sets of them, and an oracle of ranks in float64."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_memdml.retrieval import QueryRanks

FIELDS = ("relevant", "best_rank", "r_precision", "average_precision_at_r", "average_precision")


def assert_equal(left: QueryRanks, right: QueryRanks) -> None:
    for name in FIELDS:
        torch.testing.assert_close(getattr(left, name), getattr(right, name), rtol=0, atol=0, equal_nan=True, msg=name)


def oracle_ranks(embeddings: Tensor, labels: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Best rank and MAP@R of each query from all float64 cosines, the wrong references first among equals."""
    cosine = F.normalize(embeddings.double(), dim=1) @ F.normalize(embeddings.double(), dim=1).T
    best, precision = [], []
    for query, row in enumerate(cosine.unbind()):
        match = labels == labels[query]
        negatives = row[~match]
        match[query] = False
        positives = row[match].sort(descending=True).values
        above = (negatives >= positives[:, None] - 1e-12).sum(1)
        rank = above + torch.arange(1, len(positives) + 1)
        best.append(int(rank[0].clamp_max(depth + 1)))
        places = torch.arange(1, len(positives) + 1)
        precision.append(float(((places / rank.double()) * (rank <= len(positives))).sum() / len(positives)))
    return torch.tensor(best), torch.tensor(precision, dtype=torch.float64)


def embeddings_of(kind: str, count: int, dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, dim, generator=generator)
    return {
        "spread": noise,
        "within one bfloat16 step": 1 + 1e-3 * noise,  # cosines differ by less than 1e-5
        "copies": noise[torch.arange(count) % 7],
        "opposite": torch.cat([noise[: count // 2], -noise[: count - count // 2]]),
        "codes": noise.sign(),
        "zero rows": noise * (torch.arange(count) % 3 > 0)[:, None],
        "collapsed": noise[:1].expand(count, dim),
    }[kind]


KINDS = ["spread", "within one bfloat16 step", "copies", "opposite", "codes", "zero rows", "collapsed"]


def draw_sets(data: st.DataObject) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Small sets for `rank_queries`, its positional arguments and its options."""
    dim, count = data.draw(st.sampled_from([1, 2, 17, 130])), data.draw(st.integers(2, 40))
    embeddings = embeddings_of(data.draw(st.sampled_from(KINDS)), count, dim)
    embeddings = embeddings[data.draw(st.permutations(range(count)))]
    small = st.lists(st.integers(0, 5), min_size=count, max_size=count)
    labels, groups = torch.tensor(data.draw(small)), torch.tensor(data.draw(small))
    options: dict[str, Any] = {
        "depth": data.draw(st.sampled_from([1, 5, 100])),
        "tile_size": data.draw(st.integers(1, 20)),
    }
    if data.draw(st.booleans()):
        options["groups"] = groups
    cut = data.draw(st.integers(0, count))  # 0: self-retrieval
    if not cut:
        return (embeddings, labels), options
    options |= {"indices": torch.arange(cut), "gallery_indices": torch.arange(count)}
    if "groups" in options:
        options |= {"groups": groups[:cut], "gallery_groups": groups}
    return (embeddings[:cut], labels[:cut], embeddings, labels), options
