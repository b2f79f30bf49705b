"""Ranks against oracles: exact rational arithmetic on integer vectors, and plain float64 loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.embeddings import sample
from torch import Tensor
from torch.nn import functional as F

from lightning_memdml.retrieval import rank_queries, retrieval_scores
from lightning_memdml.retrieval.similarity_tiles import SimilarityTiles

K = (1, 2, 3, 10)


def nothing(query: int, reference: int) -> bool:
    return False


def same_position(query: int, reference: int) -> bool:
    return query == reference


def cosine_order(a: list[int], b: list[int]) -> Fraction:
    """A rational number that orders integer vectors as their cosine does: its square, with its sign."""
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    norms = sum(x * x for x in a) * sum(y * y for y in b)
    return Fraction(0) if norms == 0 else Fraction(dot * abs(dot), norms)


def float64_cosines(queries: Tensor, gallery: Tensor) -> list[list[float]]:
    return (F.normalize(queries.double(), dim=1) @ F.normalize(gallery.double(), dim=1).T).tolist()


def oracle(
    similarity: list[list],
    labels: list[int],
    gallery_labels: list[int],
    ignored: Callable[[int, int], bool] = nothing,
    k: tuple[int, ...] = K,
) -> dict[str, float]:
    """Sort each row, the wrong references first among equals, and read every score off the sorted list."""
    sums = dict.fromkeys([*(f"recall_at_{level}" for level in k), "map_at_r", "r_precision", "map"], 0.0)
    scored = excluded = 0
    for query, row in enumerate(similarity):
        order = [
            (-value, gallery_labels[reference] == labels[query])
            for reference, value in enumerate(row)
            if not (gallery_labels[reference] == labels[query] and ignored(query, reference))
        ]
        relevant = [match for _, match in sorted(order)]
        r = sum(relevant)
        if r == 0:
            excluded += 1
            continue
        scored += 1
        found = 0
        for position, match in enumerate(relevant, start=1):
            found += match
            if match:
                sums["map"] += found / position / r
                if position <= r:
                    sums["map_at_r"] += found / position / r
                    sums["r_precision"] += 1 / r
        for level in k:
            sums[f"recall_at_{level}"] += any(relevant[:level])
    means = {name: value / scored if scored else math.nan for name, value in sums.items()}
    means["mean_average_precision"] = means.pop("map")
    return {**means, "queries": scored, "excluded": excluded}


def assert_same(scores: dict[str, float], expected: dict[str, float]) -> None:
    assert scores == pytest.approx(expected, abs=1e-12, nan_ok=True)


def scores_of(*args: Tensor, tile_size: int | None = None, k: tuple[int, ...] = K, **kwargs: Tensor) -> dict:
    ranks = rank_queries(*args, depth=max(k), mean_average_precision=True, tile_size=tile_size, **kwargs)
    return ranks.scores(k)


integer_sets = st.tuples(st.integers(1, 4), st.integers(1, 14)).flatmap(
    lambda shape: st.lists(
        st.tuples(
            st.integers(0, 3),
            st.lists(st.integers(-2, 2), min_size=shape[0], max_size=shape[0]),
            st.integers(0, 2),
        ),
        min_size=shape[1],
        max_size=shape[1],
    )
)


@settings(max_examples=60, deadline=None)
@given(integer_sets, st.sampled_from([1, 2, 5, 64]))
def test_self_retrieval_with_many_ties_equals_rational_arithmetic(rows: list, tile_size: int) -> None:
    labels, vectors, _ = ([row[part] for row in rows] for part in range(3))
    similarity = [[cosine_order(a, b) for b in vectors] for a in vectors]
    scores = scores_of(torch.tensor(vectors).float(), torch.tensor(labels), tile_size=tile_size)
    assert_same(scores, oracle(similarity, labels, labels, same_position))


@settings(max_examples=60, deadline=None)
@given(integer_sets, st.data())
def test_query_gallery_with_many_ties_and_groups_equals_rational_arithmetic(rows: list, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(rows)))
    use_groups = data.draw(st.booleans())
    labels, vectors, groups = ([row[part] for row in rows] for part in range(3))
    similarity = [[cosine_order(a, b) for b in vectors[cut:]] for a in vectors[:cut]]
    tensors = torch.tensor(vectors).float(), torch.tensor(labels), torch.tensor(groups)
    given_groups = {"groups": tensors[2][:cut], "gallery_groups": tensors[2][cut:]} if use_groups else {}
    scores = scores_of(
        tensors[0][:cut], tensors[1][:cut], tensors[0][cut:], tensors[1][cut:], tile_size=3, **given_groups
    )
    same_group = lambda query, reference: use_groups and groups[query] == groups[cut + reference]  # noqa: E731
    assert_same(scores, oracle(similarity, labels[:cut], labels[cut:], same_group))


@pytest.mark.parametrize(("count", "classes", "noise"), [(400, 130, 1.0), (400, 130, 4.0), (300, 5, 3.0)])
@pytest.mark.parametrize("tile_size", [96, 128, None])
def test_self_retrieval_equals_float64_loops(count: int, classes: int, noise: float, tile_size: int | None) -> None:
    embeddings, labels = sample(count, classes, 8, seed=0, noise=noise)
    expected = oracle(float64_cosines(embeddings, embeddings), labels.tolist(), labels.tolist(), same_position)
    assert_same(scores_of(embeddings, labels, tile_size=tile_size), expected)


def test_query_gallery_equals_float64_loops() -> None:
    embeddings, labels = sample(500, 60, 8, seed=1)
    expected = oracle(float64_cosines(embeddings[:150], embeddings[150:]), labels[:150].tolist(), labels[150:].tolist())
    scores = scores_of(embeddings[:150], labels[:150], embeddings[150:], labels[150:], tile_size=100)
    assert_same(scores, expected)


def test_hand_computed_scores() -> None:
    # Query 0 deg, label 0; the gallery by angle: right 10, wrong 20, right 30, right 40, wrong 50, right 60.
    degrees = torch.tensor([10.0, 20, 30, 40, 50, 60]).deg2rad()
    gallery = torch.stack([degrees.cos(), degrees.sin()], dim=1)
    scores = retrieval_scores(
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([0]),
        gallery,
        torch.tensor([0, 1, 0, 0, 1, 0]),
        k=(1, 2),
        mean_average_precision=True,
    )
    assert scores["recall_at_1"] == 1
    assert scores["r_precision"] == pytest.approx(3 / 4)
    assert scores["map_at_r"] == pytest.approx((1 / 1 + 2 / 3 + 3 / 4) / 4)
    assert scores["mean_average_precision"] == pytest.approx((1 / 1 + 2 / 3 + 3 / 4 + 4 / 6) / 4)


def test_the_symmetric_and_the_blockwise_count_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, labels = sample(600, 40, 16, seed=2, noise=2.0)
    symmetric = rank_queries(embeddings, labels, tile_size=128)
    monkeypatch.setattr("lightning_memdml.retrieval.counting._STATE_BUDGET", 4000)
    blockwise = rank_queries(embeddings, labels, tile_size=128)
    for name in ("relevant", "best_rank", "r_precision", "average_precision_at_r"):
        assert torch.equal(getattr(symmetric, name), getattr(blockwise, name)), name


@pytest.mark.parametrize(("threads", "side"), [(1, 1024), (2, 2048)])
def test_tiles_are_larger_with_several_threads(threads: int, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    init = SimilarityTiles.__init__
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(
        SimilarityTiles, "__init__", lambda self, *args: (sizes.append(args[2]), init(self, *args), None)[-1]
    )
    rank_queries(torch.eye(4).repeat(600, 1), torch.arange(2400) // 4)
    assert sizes == [side**2]


@pytest.mark.parametrize("searched", [(), (0, 1)])
def test_progress_ends_at_the_number_of_all_similarities(searched: tuple[int, ...]) -> None:
    sets = sample(600, 40, 16, seed=2)
    calls: list[tuple[int, int]] = []
    rank_queries(
        *sets, *(sets[part] for part in searched), tile_size=128, progress=lambda *numbers: calls.append(numbers)
    )
    done, total = zip(*calls, strict=True)
    assert len(calls) > 3
    assert list(done) == sorted(set(done))
    assert set(total) == {done[-1]}
    assert 600 * 600 // 2 < done[-1] <= 600 * 600


def test_best_ranks_beyond_the_depth_are_cut_at_depth_plus_one() -> None:
    embeddings, labels = sample(700, 200, 8, seed=3, noise=5.0)
    exact = rank_queries(embeddings, labels, depth=10_000)
    cut = rank_queries(embeddings, labels, depth=20, tile_size=64)
    matched = exact.relevant > 0
    assert exact.best_rank[matched].max() > 100
    assert torch.equal(cut.best_rank[matched], exact.best_rank[matched].clamp_max(21))
    with pytest.raises(ValueError, match="Rank with depth=50"):
        cut.scores((50,))


# Ties


@pytest.mark.parametrize("dim", [1, 7, 128])
@pytest.mark.parametrize("tile_size", [64, None])
def test_equal_embeddings_score_about_zero(dim: int, tile_size: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(1, dim, generator=generator).expand(2000, dim)
    ranks = rank_queries(embeddings, torch.arange(2000) // 4, depth=2000, tile_size=tile_size)
    assert ranks.best_rank.unique().tolist() == [1997]  # 1996 wrong references first, then its 3 matches
    scores = ranks.scores((1, 1000))
    assert scores["recall_at_1"] == scores["recall_at_1000"] == scores["map_at_r"] == scores["r_precision"] == 0


def test_zero_embeddings_are_similar_to_nothing() -> None:
    scores = retrieval_scores(torch.zeros(6, 3), torch.tensor([0, 0, 1, 1, 2, 2]), k=(1, 4, 5))
    assert (scores["recall_at_1"], scores["recall_at_4"], scores["recall_at_5"]) == (0, 0, 1)


@pytest.mark.parametrize("scale", [1.0, 0.25, 2.0**-60, 2.0**60])
def test_a_copy_under_another_label_ranks_first_whatever_its_scale(scale: float) -> None:
    noise, _ = sample(300, 75, 64, seed=4)
    labels = torch.arange(300) // 4
    embeddings = noise[labels * 4] + 0.1 * noise  # four close images per class
    copies = torch.cat([embeddings, embeddings * scale])
    scores = retrieval_scores(copies, torch.cat([labels, labels + 75]), k=(1, 2))
    assert scores["recall_at_1"] == 0
    # The copy of the query alone beats every match; the copy of a match ties with it and comes before it too.
    assert scores["recall_at_2"] == 0


def test_float32_rounding_decides_no_rank() -> None:
    # All cosines lie within 1e-3 of each other: a float32 matrix product misorders some.
    generator = torch.Generator().manual_seed(5)
    embeddings = 1 + 1e-2 * torch.randn(260, 32, generator=generator)
    labels = torch.arange(260) // 3
    expected = oracle(float64_cosines(embeddings, embeddings), labels.tolist(), labels.tolist(), same_position)
    unit = F.normalize(embeddings, dim=1)
    rounded = oracle((unit @ unit.T).tolist(), labels.tolist(), labels.tolist(), same_position)
    assert rounded["mean_average_precision"] != pytest.approx(expected["mean_average_precision"], abs=1e-8)
    assert_same(scores_of(embeddings, labels, tile_size=64), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_type_is_ranked_by_its_own_values(dtype: torch.dtype) -> None:
    embeddings, labels = sample(200, 50, 16, seed=6)
    embeddings = embeddings.to(dtype)
    expected = oracle(float64_cosines(embeddings, embeddings), labels.tolist(), labels.tolist(), same_position)
    assert_same(scores_of(embeddings, labels), expected)


def matmul_precisions() -> list[str]:
    backends = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [torch.get_float32_matmul_precision(), *(getattr(backend, "fp32_precision", "") for backend in backends)]


def test_lowered_matmul_precision_and_autocast_change_nothing_and_are_restored() -> None:
    embeddings, labels = sample(300, 60, 32, seed=7)
    expected = retrieval_scores(embeddings, labels)
    torch.set_float32_matmul_precision("medium")
    try:
        before = matmul_precisions()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert retrieval_scores(embeddings, labels) == expected
        assert matmul_precisions() == before
    finally:
        torch.set_float32_matmul_precision("highest")


# Who is compared with whom


def test_images_repeated_by_a_padding_sampler_count_once() -> None:
    embeddings, labels = sample(90, 20, 8, seed=8)
    indices = torch.randperm(90, generator=torch.Generator().manual_seed(0)) + 7
    expected = retrieval_scores(embeddings, labels)
    padded = torch.cat([torch.arange(90), torch.tensor([3, 3, 50])])
    assert retrieval_scores(embeddings[padded], labels[padded], indices=indices[padded]) == expected
    inflated = retrieval_scores(embeddings[padded], labels[padded])
    assert inflated["recall_at_1"] > expected["recall_at_1"]


def test_a_share_of_the_queries_against_everything_gives_that_share_of_self_retrieval() -> None:
    embeddings, labels = sample(120, 30, 8, seed=9)
    indices = torch.arange(120)
    everything = rank_queries(embeddings, labels)
    share = slice(40, 75)
    part = rank_queries(
        embeddings[share], labels[share], embeddings, labels, indices=indices[share], gallery_indices=indices
    )
    assert torch.equal(part.best_rank, everything.best_rank[share])
    at_r = everything.average_precision_at_r[share]
    torch.testing.assert_close(part.average_precision_at_r, at_r, rtol=0, atol=0, equal_nan=True)


def test_same_label_and_group_is_left_out_of_self_retrieval() -> None:
    embeddings, labels = sample(100, 10, 8, seed=10)
    groups = torch.arange(100) % 3
    expected = oracle(
        float64_cosines(embeddings, embeddings),
        labels.tolist(),
        labels.tolist(),
        lambda query, reference: query % 3 == reference % 3,
    )
    assert_same(scores_of(embeddings, labels, groups=groups), expected)


def test_queries_without_a_match_are_left_out_and_counted() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    scores = retrieval_scores(embeddings, torch.tensor([0, 0, 1, 2]), k=(1,))
    assert scores == {"recall_at_1": 1, "map_at_r": 1, "r_precision": 1, "queries": 2, "excluded": 2}


# Per class and intervals


def test_scores_per_class_are_means_over_its_queries() -> None:
    embeddings, labels = sample(200, 12, 6, seed=15, noise=2.0)
    table = rank_queries(embeddings, labels).per_class(k=(1, 5))
    similarity = float64_cosines(embeddings, embeddings)
    for place, label in enumerate(table["label"].tolist()):
        queries = (labels == label).nonzero().squeeze(1).tolist()
        expected = oracle(
            [similarity[query] for query in queries],
            [label] * len(queries),
            labels.tolist(),
            lambda query, reference, queries=queries: queries[query] == reference,
            k=(1, 5),
        )
        assert table["queries"][place] == expected["queries"]
        for name in ("recall_at_1", "recall_at_5", "map_at_r", "r_precision"):
            assert table[name][place].item() == pytest.approx(expected[name])


def test_intervals_are_reproducible_hold_the_score_and_widen_with_confidence() -> None:
    embeddings, labels = sample(600, 120, 6, seed=16, noise=1.5)
    ranks = rank_queries(embeddings, labels)
    score = ranks.scores((1,))["recall_at_1"]
    narrow = ranks.confidence_intervals((1,), confidence=0.5)["recall_at_1"]
    wide = ranks.confidence_intervals((1,), confidence=0.99)["recall_at_1"]
    assert wide == ranks.confidence_intervals((1,), confidence=0.99)["recall_at_1"]
    assert wide[0] < narrow[0] < score < narrow[1] < wide[1]


def test_intervals_treat_classes_as_units() -> None:
    # One class all right, one all wrong: a resample scores 0, 0.7 or 1, never the 0.7 +- 0.1 of drawn queries.
    labels = torch.tensor([0] * 70 + [1] * 30)
    queries = torch.eye(2)[labels]
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    ranks = rank_queries(queries, labels, gallery, torch.tensor([0, 0, 1]))
    assert ranks.per_class()["recall_at_1"].tolist() == [1, 0]
    assert ranks.confidence_intervals((1,))["recall_at_1"] == (0, 1)


def test_confidence_out_of_range_is_refused() -> None:
    ranks = rank_queries(torch.eye(2), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="0 < confidence < 1"):
        ranks.confidence_intervals(confidence=95)


def test_scores_equal_pytorch_metric_learning() -> None:
    calculator_module = pytest.importorskip(
        "pytorch_metric_learning.utils.accuracy_calculator",
        reason="compares with pytorch-metric-learning, which is not installed",
    )
    pytest.importorskip("faiss", reason="pytorch-metric-learning's AccuracyCalculator needs faiss")
    embeddings, labels = sample(900, 150, 16, seed=17, noise=1.2)
    embeddings = F.normalize(embeddings, dim=1)
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    peer = calculator_module.AccuracyCalculator(include=names, k="max_bin_count", device=torch.device("cpu"))
    expected = peer.get_accuracy(embeddings, labels)
    scores = retrieval_scores(embeddings, labels)
    ours = (scores["recall_at_1"], scores["r_precision"], scores["map_at_r"])
    assert ours == pytest.approx([expected[name] for name in names], abs=1e-6)
