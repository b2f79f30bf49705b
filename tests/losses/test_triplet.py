"""The ways in which the hinge of the triplet loss counts violated triplets agree, and follow the definition."""

import pytest
import torch

from lightning_memdml.losses import triplet

WAYS = {
    "at once": triplet._count_at_once,
    "one by one": triplet._count_one_by_one,
    "bisection": triplet._count_by_bisection,
    "buckets": triplet._count_by_buckets,
}


def some_edges(kind: str, generator: torch.Generator) -> torch.Tensor:
    """Edges of 7 anchors, the later the fewer."""
    edges = torch.rand(7, 40, generator=generator) * 1.6 - 0.8
    if kind == "all alike":
        edges = torch.full_like(edges, 0.25)
    if kind == "far apart":  # nearly all similarities share a bucket with most edges
        edges = edges * 1e-4
        edges[0, 0], edges[1, 0] = -5.0, 5.0
    if kind == "large margin":
        edges = edges - 6.0
    edges = edges.sort(dim=1).values
    for row, number in enumerate((40, 40, 33, 12, 2, 1, 0)):
        edges[row, number:] = torch.inf
    return edges


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["spread", "all alike", "far apart", "large margin"])
@pytest.mark.parametrize("way", WAYS)
def test_violated_triplets_are_counted_exactly(way: str, kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    edges = some_edges(kind, generator).to(dtype)
    similarity = (torch.rand(7, 3000, generator=generator) * 2 - 1).to(dtype)
    finite = edges[:, :30].where(edges[:, :30].isfinite(), 0.25)
    similarity[:, :30] = finite  # a triplet just at the margin is not violated
    similarity[:, 30:60] = torch.nextafter(finite, torch.tensor(torch.inf, dtype=dtype))
    similarity[2, 60:90] = -torch.inf  # not a negative
    above = similarity[:, :, None] > edges[:, None]
    if way == "buckets" and dtype == torch.float64:  # it tells numbers apart that differ by 2^-44
        similarity[:, 30:60] = finite + 2.0**-40
        above = similarity[:, :, None] > edges[:, None]
    terms = WAYS[way](similarity.clone(), edges)
    torch.testing.assert_close(terms.weights, above.sum(dim=2).to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(terms.sums, above.sum(dim=1).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_no_negative_violates_a_triplet(way: str) -> None:
    edges = some_edges("spread", torch.Generator().manual_seed(0))
    terms = WAYS[way](torch.full((7, 300), -0.9), edges)
    assert not terms.weights.any()
    assert terms.sums.shape == edges.shape
    assert not terms.sums.any()


def test_buckets_take_columns_of_a_wider_block() -> None:
    """As `rows` may give them: not contiguous, and one row of numbers after the other in another order."""
    edges = some_edges("spread", torch.Generator().manual_seed(0))
    similarity = (torch.rand(300, 7, generator=torch.Generator().manual_seed(1)) * 2 - 1).T
    wanted = triplet._count_one_by_one(similarity.contiguous(), edges)
    terms = triplet._count_by_buckets(similarity, edges)
    assert torch.equal(terms.weights, wanted.weights)
    assert torch.equal(terms.sums, wanted.sums)
