"""Ranks of small and odd sets, of rows without an index, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from support.embeddings import sample

from lightning_memdml.retrieval import rank_queries, retrieval_scores

# Small and odd sets


@pytest.mark.parametrize(
    ("labels", "recall", "queries"),
    [
        ([0, 0], 1, 2),
        ([0, 1], math.nan, 0),
        ([2**63 - 1, 2**63 - 1, -5], 1, 2),
        ([0], math.nan, 0),
        ([], math.nan, 0),
    ],
)
def test_tiny_sets_are_defined(labels: list[int], recall: float, queries: int) -> None:
    embeddings = torch.eye(3)[: len(labels)] + torch.tensor([[1.0, 1.0, 0.0]])
    scores = retrieval_scores(embeddings, torch.tensor(labels, dtype=torch.int64), k=(1, 1000))
    assert scores == pytest.approx(
        {
            "recall_at_1": recall,
            "recall_at_1000": recall,
            "map_at_r": recall,
            "r_precision": recall,
            "queries": queries,
            "excluded": len(labels) - queries,
        },
        nan_ok=True,
    )


def test_one_class_is_all_right_even_when_collapsed() -> None:
    scores = retrieval_scores(torch.ones(300, 4), torch.zeros(300, dtype=torch.long), mean_average_precision=True)
    assert scores["recall_at_1"] == scores["map_at_r"] == scores["mean_average_precision"] == 1


def test_empty_queries_or_gallery_give_nan() -> None:
    embeddings, labels = sample(10, 2, 4, seed=11)
    nobody = retrieval_scores(embeddings[:0], labels[:0], embeddings, labels)
    nothing_to_find = retrieval_scores(embeddings, labels, embeddings[:0], labels[:0])
    assert math.isnan(nobody["recall_at_1"])
    assert math.isnan(nothing_to_find["map_at_r"])
    assert (nobody["queries"], nobody["excluded"]) == (0, 0)
    assert (nothing_to_find["queries"], nothing_to_find["excluded"]) == (0, 10)


def test_recall_beyond_the_gallery_is_one() -> None:
    embeddings, labels = sample(30, 5, 2, seed=12, noise=10.0)
    scores = retrieval_scores(embeddings, labels, k=(1, 10_000))
    assert scores["recall_at_1"] < 1 == scores["recall_at_10000"]


def test_embeddings_that_require_a_gradient_are_not_changed() -> None:
    embeddings, labels = sample(20, 5, 4, seed=13)
    before = embeddings.clone()
    assert retrieval_scores(embeddings.requires_grad_(), labels) == retrieval_scores(before, labels)
    assert torch.equal(embeddings.detach(), before)


# Unknown indices


def test_an_unknown_index_merges_nothing_and_excludes_nothing() -> None:
    """-1 equals no other index: scores are those without indices, within a set and between two."""
    embeddings, labels = sample(40, 5, 4, seed=18, noise=1.0)
    unknown = torch.full((40,), -1)
    assert retrieval_scores(embeddings, labels, indices=unknown, k=(1, 5)) == retrieval_scores(
        embeddings, labels, k=(1, 5)
    )
    sets = (embeddings[:10], labels[:10], embeddings, labels)  # the queries are in the gallery
    expected = retrieval_scores(*sets, k=(1, 5))
    assert expected["recall_at_1"] == 1
    assert retrieval_scores(*sets, indices=unknown[:10], gallery_indices=unknown, k=(1, 5)) == expected


def test_known_and_unknown_indices_mix() -> None:
    """Image 3 is listed twice and counts once, the two unknown rows stay; the known query does not find itself."""
    embeddings, labels = sample(40, 5, 4, seed=19, noise=1.0)
    indices = torch.arange(40)
    indices[[7, 8]] = -1
    rows = torch.cat([torch.arange(40), torch.tensor([3])])
    expected = retrieval_scores(embeddings, labels, k=(1, 5))
    assert retrieval_scores(embeddings[rows], labels[rows], indices=indices[rows], k=(1, 5)) == expected
    ranks = rank_queries(embeddings, labels, embeddings, labels, indices=indices, gallery_indices=indices)
    assert ranks.best_rank[[7, 8]].tolist() == [1, 1]  # unknown: each finds its own copy
    assert ranks.relevant.tolist() == [
        int((labels == label).sum()) - (row not in (7, 8)) for row, label in enumerate(labels)
    ]


# Errors


def test_rows_that_are_not_finite_are_named() -> None:
    embeddings, labels = sample(40, 5, 4, seed=14)
    embeddings[7, 2], embeddings[31, 0] = math.nan, -math.inf
    with pytest.raises(ValueError, match=r"`embeddings` but got NaN or infinity in 2 of 40 rows: 7, 31\."):
        retrieval_scores(embeddings, labels)
    with pytest.raises(ValueError, match=r"`gallery_embeddings` but got NaN"):
        retrieval_scores(embeddings[:5], labels[:5], embeddings, labels)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"labels": torch.zeros(6, 1, dtype=torch.long)},
            ValueError,
            r"`labels` of shape \(6,\) but got \(6, 1\). Pass `labels.squeeze\(1\)`",
        ),
        ({"labels": torch.zeros(6)}, TypeError, "`labels` of an integer dtype but got torch.float32"),
        ({"labels": [0] * 6}, TypeError, "got list"),
        (
            {"embeddings": torch.zeros(6, 2, dtype=torch.long)},
            TypeError,
            "`embeddings` of a floating-point dtype but got torch.int64",
        ),
        ({"embeddings": torch.zeros(6)}, ValueError, r"`embeddings` of shape \(B, D\)"),
        (
            {"indices": torch.zeros(6, dtype=torch.long)},
            ValueError,
            "image 0 occurs in `indices` with the labels",
        ),
        ({"k": ()}, ValueError, "distinct integers"),
        ({"k": (0,)}, ValueError, "at least 1"),
        ({"k": 5}, TypeError, r"such as \(5,\)"),
        ({"k": (1.0,)}, TypeError, "hold integers"),
        (
            {"gallery_labels": torch.zeros(6, dtype=torch.long)},
            ValueError,
            "Expected both `gallery_embeddings` and `gallery_labels`",
        ),
        (
            {"gallery_embeddings": torch.ones(6, 3), "gallery_labels": torch.arange(6)},
            ValueError,
            "dimension 2",
        ),
    ],
)
def test_wrong_input_is_explained(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"embeddings": torch.ones(6, 2), "labels": torch.arange(6)} | change
    with pytest.raises(error, match=message):
        retrieval_scores(**arguments)


def test_two_sets_numbered_on_their_own_are_refused() -> None:
    with pytest.raises(ValueError, match="image 0 has label 3 in `indices` and label 9"):
        retrieval_scores(
            torch.ones(2, 2),
            torch.tensor([3, 4]),
            torch.ones(2, 2),
            torch.tensor([9, 4]),
            indices=torch.arange(2),
            gallery_indices=torch.arange(2),
        )
