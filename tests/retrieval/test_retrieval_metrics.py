"""RetrievalMetrics against `retrieval_scores` on the whole set, on one process and on two real ones."""

from __future__ import annotations

import math

import pytest
import torch
from support.children import run_ranks
from torch import Tensor, distributed
from torch.utils.data import DistributedSampler

from lightning_memdml.retrieval import RetrievalMetrics, rank_queries, retrieval_scores

K = (1, 2, 5)


def sample(count: int, classes: int, seed: int, dim: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, dim, generator=generator)
    return centres[labels] + torch.randn(count, dim, generator=generator), labels


def as_floats(scores: dict) -> dict[str, float]:
    return {name: float(value) for name, value in scores.items()}


def close_to(scores: dict) -> object:
    return pytest.approx(as_floats(scores), abs=1e-6, nan_ok=True)


def fill(metrics: RetrievalMetrics, embeddings: Tensor, labels: Tensor, rows: list[int], **kwargs: object) -> None:
    for batch in torch.tensor(rows, dtype=torch.long).split(4):
        metrics.update(embeddings[batch], labels[batch], batch, **kwargs)


def test_batches_of_self_retrieval_equal_the_whole_set() -> None:
    embeddings, labels = sample(50, 12, seed=0)
    metrics = RetrievalMetrics(k=K, mean_average_precision=True)
    fill(metrics, embeddings, labels, list(range(50)))
    scores = metrics.compute()
    assert all(value.dtype == torch.float32 and value.ndim == 0 for value in scores.values())
    assert as_floats(scores) == close_to(retrieval_scores(embeddings, labels, k=K, mean_average_precision=True))


def test_images_that_a_sampler_repeats_count_once() -> None:
    embeddings, labels = sample(30, 12, seed=1)
    metrics = RetrievalMetrics(k=K)
    fill(metrics, embeddings, labels, [*range(30), 0, 1, 29])
    assert as_floats(metrics.compute()) == close_to(retrieval_scores(embeddings, labels, k=K))


def test_queries_and_gallery_are_numbered_each_on_their_own() -> None:
    embeddings, labels = sample(60, 12, seed=2)
    expected = retrieval_scores(embeddings[:20], labels[:20], embeddings[20:], labels[20:], k=K)
    metrics = RetrievalMetrics(k=K)
    fill(metrics, embeddings[:20], labels[:20], [*range(20), 3], role="query")
    fill(metrics, embeddings[20:], labels[20:], [*range(40), 39], role="gallery")
    assert as_floats(metrics.compute()) == close_to(expected)


def test_queries_that_are_in_the_gallery_too_do_not_find_themselves() -> None:
    embeddings, labels = sample(60, 12, seed=3)
    metrics = RetrievalMetrics(k=K)
    metrics.update(embeddings[:20], labels[:20], role="both")
    metrics.update(embeddings[20:], labels[20:], role="gallery")
    expected = retrieval_scores(
        embeddings[:20],
        labels[:20],
        embeddings,
        labels,
        k=K,
        indices=torch.arange(20),
        gallery_indices=torch.arange(60),
    )
    assert as_floats(metrics.compute()) == close_to(expected)


def test_groups_are_ignored_as_in_the_whole_set() -> None:
    embeddings, labels = sample(50, 6, seed=4)
    groups = torch.arange(50) % 4
    metrics = RetrievalMetrics(k=K)
    for rows in torch.arange(50).split(7):
        metrics.update(embeddings[rows], labels[rows], rows, groups=groups[rows])
    assert as_floats(metrics.compute()) == close_to(retrieval_scores(embeddings, labels, k=K, groups=groups))


def test_each_of_several_galleries_is_searched_by_the_same_queries() -> None:
    """Indices count within a gallery: the large one holds the images of the small one again."""
    embeddings, labels = sample(60, 12, seed=8)
    metrics = RetrievalMetrics(k=K, galleries=("small", "large"))
    fill(metrics, embeddings[:20], labels[:20], list(range(20)), role="query")
    for name, end in (("small", 15), ("large", 40)):
        fill(metrics, embeddings[20:], labels[20:], [*range(end), 0], role="gallery", gallery=name)
    scores = as_floats(metrics.compute())
    assert scores["small/recall_at_5"] != scores["large/recall_at_5"]
    for name, end in (("small", 15), ("large", 40)):
        expected = retrieval_scores(embeddings[:20], labels[:20], embeddings[20 : 20 + end], labels[20 : 20 + end], k=K)
        part = {key.removeprefix(f"{name}/"): value for key, value in scores.items() if key.startswith(name)}
        assert part == close_to(expected)
        assert metrics.ranks(name).scores(K) == close_to(expected)


def test_a_sample_of_both_roles_is_in_every_gallery() -> None:
    embeddings, labels = sample(30, 5, seed=9)
    metrics = RetrievalMetrics(k=K, galleries=("first", "second"))
    metrics.update(embeddings[:10], labels[:10])
    metrics.update(embeddings[10:20], labels[10:20], role="gallery", gallery="first")
    metrics.update(embeddings[20:], labels[20:], role="gallery", gallery="second")
    scores = as_floats(metrics.compute())
    for name, part in (("first", slice(10, 20)), ("second", slice(20, 30))):
        gallery = torch.cat([embeddings[:10], embeddings[part]]), torch.cat([labels[:10], labels[part]])
        numbers = {"indices": torch.arange(10), "gallery_indices": torch.arange(20)}
        expected = retrieval_scores(embeddings[:10], labels[:10], *gallery, k=K, **numbers)
        assert {key: scores[f"{name}/{key}"] for key in expected} == close_to(expected)


def test_ranks_give_the_scores_of_each_class() -> None:
    embeddings, labels = sample(50, 6, seed=11)
    metrics = RetrievalMetrics(k=K)
    fill(metrics, embeddings, labels, [*range(50), 0, 7])
    classes, expected = metrics.ranks().per_class(K), rank_queries(embeddings, labels).per_class(K)
    assert classes.keys() == expected.keys()
    assert all(torch.equal(column, expected[name]) for name, column in classes.items())


def test_samples_hold_each_image_once() -> None:
    embeddings, labels = sample(12, 3, seed=12)
    metrics = RetrievalMetrics(k=K)
    fill(metrics, embeddings, labels, [3, 1, 3, 2], role="query")
    fill(metrics, embeddings, labels, [3, 5], role="gallery")
    samples = metrics.samples()
    assert samples.indices is not None
    assert samples.indices.tolist() == [3, 1, 2, 3, 5]
    assert torch.equal(samples.embeddings, embeddings[[3, 1, 2, 3, 5]])
    assert (samples.query.tolist(), samples.gallery.tolist()) == ([0, 1, 2], [3, 4])


def test_rows_stay_float32_and_off_the_graph_under_bfloat16() -> None:
    embeddings, labels = sample(20, 4, seed=5)
    metrics = RetrievalMetrics(k=K).bfloat16()
    metrics.update(embeddings.bfloat16().requires_grad_(), labels)
    assert metrics.embeddings[0].dtype == torch.float32
    assert not metrics.embeddings[0].requires_grad
    assert as_floats(metrics.compute()) == close_to(retrieval_scores(embeddings.bfloat16(), labels, k=K))


def test_too_few_samples_give_nan_and_reset_forgets() -> None:
    embeddings, labels = sample(10, 2, seed=6)
    metrics = RetrievalMetrics(k=K)
    metrics.update(embeddings, labels)
    assert metrics.compute()["queries"] == 10
    metrics.reset()
    metrics.update(embeddings[:2], torch.tensor([0, 1]))
    scores = metrics.compute()
    assert math.isnan(scores["recall_at_1"])
    assert math.isnan(scores["map_at_r"])
    assert scores["excluded"] == 2


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_samples_at_all_give_nan() -> None:
    scores = RetrievalMetrics(k=K).compute()
    assert math.isnan(scores["recall_at_5"])
    assert scores["queries"] == 0


def test_nothing_is_saved_in_a_checkpoint() -> None:
    metrics = RetrievalMetrics(k=K)
    metrics.update(*sample(10, 2, seed=7))
    assert metrics.state_dict() == {}


def test_images_that_are_not_finite_are_named_by_their_number() -> None:
    metrics = RetrievalMetrics(k=K)
    embeddings = torch.ones(3, 2)
    embeddings[1] = math.nan
    metrics.update(embeddings, torch.zeros(3, dtype=torch.long), torch.tensor([100, 207, 300]))
    with pytest.raises(ValueError, match="rows, indices: 207"):
        metrics.compute()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"role": "querry"}, "Expected `role` to be one of 'both', 'query', 'gallery' but got 'querry'"),
        ({"groups": torch.tensor([0, -1])}, "`groups` of at least 0 but got -1"),
        ({"groups": torch.tensor([[0, 1]])}, r"`groups` of shape \(2,\) but got \(1, 2\)"),
        ({"role": "gallery", "gallery": "small"}, r"and the galleries \(\)"),
    ],
)
def test_wrong_updates_are_explained(kwargs: dict, message: str) -> None:
    metrics = RetrievalMetrics()
    with pytest.raises(ValueError, match=message):
        metrics.update(torch.ones(2, 2), torch.tensor([0, 0]), **kwargs)
    assert metrics.embeddings == []


def test_galleries_have_to_be_told_apart() -> None:
    with pytest.raises(ValueError, match="distinct names"):
        RetrievalMetrics(galleries=("small", "small"))
    metrics = RetrievalMetrics(galleries=("small", "large"))
    with pytest.raises(ValueError, match="one of 'small', 'large' but got None"):
        metrics.update(torch.ones(2, 2), torch.tensor([0, 0]), role="gallery")
    with pytest.raises(ValueError, match="the role 'query' and the galleries"):
        metrics.update(torch.ones(2, 2), torch.tensor([0, 0]), role="query", gallery="small")
    with pytest.raises(ValueError, match="but got 'medium'"):
        metrics.ranks("medium")


def test_indices_in_some_updates_only_are_refused() -> None:
    metrics = RetrievalMetrics(k=K)
    metrics.update(torch.ones(2, 2), torch.tensor([0, 0]))
    metrics.update(torch.ones(2, 2), torch.tensor([0, 0]), torch.tensor([0, 1]))
    with pytest.raises(
        ValueError, match="Expected `indices` in every update or in none but got them for 2 of 4 samples"
    ):
        metrics.compute()


# Two ranks


@pytest.mark.parametrize("shared", [False, True])
def test_images_of_unknown_index_are_not_merged_and_do_not_find_themselves(shared: bool) -> None:
    """A query that is in the gallery too is excluded by its row, also where its index is unknown."""
    embeddings, labels = sample(30, 8, seed=20)
    unknown = torch.full((30,), -1)
    metrics = RetrievalMetrics(k=K, shared_indices=shared)
    metrics.update(embeddings, labels, unknown)
    assert as_floats(metrics.compute()) == close_to(retrieval_scores(embeddings, labels, k=K))
    mixed = RetrievalMetrics(k=K, shared_indices=shared)
    indices = torch.where(torch.arange(30) % 2 == 0, torch.arange(30), -1)
    mixed.update(embeddings[:20], labels[:20], indices[:20], role="both")
    mixed.update(embeddings[20:], labels[20:], indices[20:], role="gallery")
    rows = torch.arange(30)
    expected = retrieval_scores(
        embeddings[:20], labels[:20], embeddings, labels, k=K, indices=rows[:20], gallery_indices=rows
    )
    assert as_floats(mixed.compute()) == close_to(expected)


def scored_by_rank() -> dict[str, dict[str, float]]:
    """What one of two ranks computes, by case; the single-process values are computed by the test."""
    rank, cases = distributed.get_rank(), {}

    embeddings, labels = sample(31, 8, seed=10)  # 31 on 2 ranks: the sampler repeats image 0
    metrics = RetrievalMetrics(k=K, mean_average_precision=True)
    sampler = DistributedSampler(range(31), num_replicas=2, rank=rank, shuffle=False)
    assert len(list(sampler)) == 16
    fill(metrics, embeddings, labels, list(sampler))
    cases["padded"] = as_floats(metrics.compute())
    assert sum(map(len, metrics.labels)) == 16  # back to this rank's own rows

    metrics = RetrievalMetrics(k=K, compute_on_cpu=True)
    fill(metrics, embeddings[:12], labels[:12], list(range(rank, 12, 2)), role="query")
    fill(
        metrics,
        embeddings[12:],
        labels[12:],
        list(range(19))[: 14 if rank == 0 else None][rank * 14 :],
        role="gallery",
    )
    cases["uneven query and gallery"] = as_floats(metrics.compute())

    metrics = RetrievalMetrics(k=K)
    if rank == 0:
        fill(metrics, embeddings, labels, list(range(31)))
    cases["an empty rank"] = as_floats(metrics.compute())

    metrics = RetrievalMetrics(k=K)
    metrics.update(embeddings[:1], labels[:1], torch.tensor([0]))
    cases["no match"] = as_floats(metrics.compute())

    metrics = RetrievalMetrics(k=K, mean_average_precision=True)
    for rows in torch.tensor(list(sampler)).split(5):
        metrics.update(embeddings[rows], labels[rows], rows, groups=rows % 3)
    cases["groups"] = as_floats(metrics.compute())
    cases["samples"] = {"images": float(len(metrics.samples().labels))}
    columns = metrics.ranks().per_class(K)
    cases["classes"] = {f"{name} {at}": float(value) for name in columns for at, value in enumerate(columns[name])}

    metrics = RetrievalMetrics(k=K, galleries=("small", "large"), shared_indices=True)
    metrics.update(embeddings[:12][rank::2], labels[:12][rank::2], torch.arange(12)[rank::2], role="query")
    for name, end in (("small", 19), ("large", 31)):
        share = list(DistributedSampler(range(end), num_replicas=2, rank=rank, shuffle=False))  # pads both
        metrics.update(embeddings[share], labels[share], torch.tensor(share), role="gallery", gallery=name)
    cases["several galleries"] = as_floats(metrics.compute())
    return cases


def test_two_ranks_equal_one() -> None:
    first, second = run_ranks(2, scored_by_rank)
    embeddings, labels = sample(31, 8, seed=10)
    expected = {
        "padded": retrieval_scores(embeddings, labels, k=K, mean_average_precision=True),
        "uneven query and gallery": retrieval_scores(embeddings[:12], labels[:12], embeddings[12:], labels[12:], k=K),
        "an empty rank": retrieval_scores(embeddings, labels, k=K),
        "no match": retrieval_scores(embeddings[:1], labels[:1], k=K),
    }
    groups = torch.arange(31) % 3
    expected["groups"] = retrieval_scores(embeddings, labels, k=K, groups=groups, mean_average_precision=True)
    expected["samples"] = {"images": 31}
    classes = rank_queries(embeddings, labels, groups=groups, mean_average_precision=True).per_class(K)
    expected["classes"] = {f"{name} {at}": float(value) for name in classes for at, value in enumerate(classes[name])}
    numbers = {"indices": torch.arange(12), "gallery_indices": torch.arange(31)}
    expected["several galleries"] = {
        f"{name}/{key}": value
        for name, end in (("small", 19), ("large", 31))
        for key, value in retrieval_scores(
            embeddings[:12],
            labels[:12],
            embeddings[:end],
            labels[:end],
            k=K,
            indices=numbers["indices"],
            gallery_indices=numbers["gallery_indices"][:end],
        ).items()
    }
    assert expected["padded"]["recall_at_1"] not in (0, 1)
    for case, scores in expected.items():
        assert first[case] == close_to(scores), case
        assert second[case] == close_to(scores), case


def test_an_image_that_is_query_and_gallery_does_not_find_itself_where_indices_are_shared():
    """Gallery rows 0 and 1 are the queries; only query 1 has another image of its class, which ranks third."""
    angles = torch.tensor([0.0, 0.5, 0.6, 1.2])
    gallery, labels = torch.stack([angles.cos(), angles.sin()], dim=1), torch.tensor([7, 8, 9, 8])
    scores = {}
    for shared in (True, False):
        metrics = RetrievalMetrics(k=(1, 2), shared_indices=shared)
        metrics.update(gallery[:2], labels[:2], torch.tensor([0, 1]), role="query")
        metrics.update(gallery, labels, torch.arange(4), role="gallery")
        scores[shared] = {name: float(value) for name, value in metrics.compute().items()}
    assert (scores[True]["recall_at_1"], scores[True]["recall_at_2"], scores[True]["queries"]) == (0, 0, 1)
    assert (scores[False]["recall_at_1"], scores[False]["queries"]) == (1, 2)
