"""Re-ranking against plain float64 loops, and the scores after it."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from support.embeddings import sample
from torch import Tensor

from lightning_memdml.retrieval import rank_queries, rank_reranked, rerank, reranking


def reranked_with_loops(queries: Tensor, gallery: Tensor, k1: int, k2: int, weight: float) -> list[list[float]]:
    """The formulas of the paper, image by image, over queries and gallery together."""
    rows = [[x / math.hypot(*row) for x in row] for row in torch.cat([queries, gallery]).double().tolist()]
    images = range(len(rows))
    d = [[sum((x - y) ** 2 for x, y in zip(p, g, strict=True)) for g in rows] for p in rows]

    def nearest(p: int, k: int) -> list[int]:
        return sorted(images, key=lambda g: (d[p][g], g))[:k]

    def reciprocal(p: int, k: int) -> set[int]:
        return {g for g in nearest(p, k) if p in nearest(g, k)}

    v = []
    for p in images:
        own = reciprocal(p, k1)
        wider = set(own)
        for q in own:
            other = reciprocal(q, math.ceil(k1 / 2))
            if len(own & other) >= 2 * len(other) / 3 - 1e-9:
                wider |= other
        v.append([math.exp(-d[p][g]) if g in wider else 0.0 for g in images])
    v = [[sum(v[q][g] for q in nearest(p, k2)) / len(nearest(p, k2)) for g in images] for p in images]

    def jaccard(p: int, g: int) -> float:
        pairs = list(zip(v[p], v[g], strict=True))
        return 1 - sum(min(pair) for pair in pairs) / sum(max(pair) for pair in pairs)

    searched = images[len(queries) :]
    return [[(1 - weight) * jaccard(p, g) + weight * d[p][g] for g in searched] for p in images[: len(queries)]]


@pytest.mark.parametrize(
    ("k1", "k2", "weight"), [(6, 3, 0.3), (7, 1, 0.0), (1, 4, 0.6), (9, 2, 1.0), (50, 60, 0.3), (20, 6, 0.3)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_distances_are_those_of_the_formulas(k1: int, k2: int, weight: float, seed: int) -> None:
    rows, _ = sample(34, classes=5, dim=4, seed=seed)
    queries, gallery = rows[:12], rows[12:]
    expected = torch.tensor(reranked_with_loops(queries, gallery, k1, k2, weight), dtype=torch.float64)
    torch.testing.assert_close(rerank(queries, gallery, k1, k2, weight), expected, atol=1e-9, rtol=0)


def test_without_a_gallery_the_queries_search_each_other_and_not_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reranking, "_ROWS", 8)  # several blocks of rows
    rows, _ = sample(30, classes=4, dim=5, seed=2)
    found = rerank(rows, None, 6, 3, 0.3)
    assert found.diagonal().isinf().all()
    for split in (1, 7, 29):  # the union is the same wherever it is divided
        expected = torch.tensor(reranked_with_loops(rows[:split], rows[split:], 6, 3, 0.3), dtype=torch.float64)
        torch.testing.assert_close(found[:split, split:], expected, atol=1e-9, rtol=0)


def test_reciprocal_neighbours_correct_what_a_dense_class_attracts() -> None:
    """The image at 10 degrees is nearest to the dense class, whose images have neighbours of their own."""
    dense = torch.arange(9) / 2
    angles = torch.cat([dense, torch.tensor([10.0, 16.9, 23.8])]).deg2rad()
    rows, labels = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0] * 9 + [1] * 3)
    plain, after = rank_queries(rows, labels), rank_reranked(rows, labels, k1=6, k2=1)
    assert plain.best_rank[9] > 1
    assert after.best_rank[9] == 1
    assert after.scores((1,))["recall_at_1"] == 1 > plain.scores((1,))["recall_at_1"]
    assert after.scores((1,))["map_at_r"] > plain.scores((1,))["map_at_r"]


@pytest.mark.parametrize("with_gallery", [False, True])
def test_ranks_by_the_original_distance_are_those_of_rank_queries(with_gallery: bool) -> None:
    """Indices, groups, repeated images and queries without a match included."""
    rows, labels = sample(60, classes=9, dim=4, seed=3)
    labels[0] = 100  # without a match
    indices, groups = torch.arange(60), torch.arange(60) % 3
    padded = torch.cat([torch.arange(40), torch.tensor([2, 2])])
    arguments: dict[str, Any] = {
        "indices": indices[padded],
        "groups": groups[padded],
        "mean_average_precision": True,
        "depth": 3,
    }
    if with_gallery:
        for name, values in (("embeddings", rows), ("labels", labels), ("indices", indices), ("groups", groups)):
            arguments[f"gallery_{name}"] = values[20:]
    expected = rank_queries(rows[padded], labels[padded], **arguments)
    found = rank_reranked(rows[padded], labels[padded], lambda_value=1, **arguments)
    matched = expected.relevant > 0
    assert not matched.all()
    for name in ("rows", "labels", "relevant"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("best_rank", "r_precision", "average_precision_at_r", "average_precision"):
        torch.testing.assert_close(getattr(found, name)[matched], getattr(expected, name)[matched])
    assert found.scores((1, 3)) == pytest.approx(expected.scores((1, 3)))


def test_equal_images_count_against_the_model() -> None:
    rows, labels = torch.ones(12, 3), torch.arange(12) // 3
    assert rank_reranked(rows, labels, k1=12, k2=12).scores((1,))["recall_at_1"] == 0


def test_an_empty_set_has_no_scores() -> None:
    assert rerank(torch.ones(2, 3), torch.ones(0, 3)).shape == (2, 0)
    assert rerank(torch.ones(0, 3), None).shape == (0, 0)
    ranks = rank_reranked(torch.ones(0, 3), torch.ones(0, dtype=torch.long))
    assert ranks.scores((1,))["queries"] == 0


def test_what_cannot_be_re_ranked_is_explained() -> None:
    rows = torch.eye(4)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"k1": 0}, "Expected `k1` of at least 1 but got 0. Count the image itself as one."),
        ({"k2": -1}, "Expected `k2` of at least 1 but got -1. Count the image itself as one."),
        ({"lambda_value": 1.5}, "Expected `lambda_value` in [0, 1] but got 1.5. The paper uses 0.3."),
    ]
    for arguments, message in refused:
        with pytest.raises(ValueError, match=re.escape(message)):
            rerank(rows, None, **arguments)
    message = (
        "Expected at most 10,000 images to re-rank, queries and gallery together, but got 10,001, for which about "
        "3 GB would be needed. Pass fewer images."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        rerank(torch.ones(1, 2), torch.ones(10_000, 2))
