"""Columns that no anchor reaches are told in bfloat16: what is found is what float32 finds, and the bound holds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lightning_memdml as ml
from lightning_memdml import bfloat16
from lightning_memdml.losses import streaming
from lightning_memdml.losses.sieve import Sieve

LOSSES = {
    "contrastive": ml.ContrastiveLoss(margin=0.6),
    "multi-similarity": ml.MultiSimilarityLoss(),  # a cut for each anchor
    "triplet": ml.TripletLoss(),
    "direct, hardest": ml.DirectWeightLoss(negative=ml.Threshold(0.6), hardest_negatives=3),
    "hybrid": ml.HybridLoss(ml.ContrastiveLoss(), ml.MultiSimilarityLoss()),
}


@pytest.fixture
def sieved(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """Sieve on any processor, in blocks of 256 columns; the list has the bound of every sieved block."""
    monkeypatch.setattr(bfloat16, "pays", lambda device, dim: True)
    monkeypatch.setattr(streaming, "BLOCK_ELEMENTS", 1)
    bounds: list[float | None] = []
    product = Sieve.product
    monkeypatch.setattr(Sieve, "product", lambda *args, **kw: bounds.append(product(*args, **kw)) or bounds[-1])
    return bounds


def rows(count: int, dim: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    """Embeddings around 50 directions, and which of them."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(50, dim, generator=torch.Generator().manual_seed(9)), dim=1)
    labels = torch.randint(0, 50, (count,), generator=generator)
    noise = F.normalize(torch.randn(count, dim, generator=generator), dim=1)
    return F.normalize(centres[labels] + spread * noise, dim=1), labels


def evaluated(loss: ml.PairLoss, *args: Tensor) -> tuple[Tensor, Tensor]:
    x, y, r, ry = args
    return streaming.evaluate(loss, streaming.Pairs(x, y, r, ry, None, None))


@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize("name", LOSSES)
def test_the_sieve_changes_nothing(name: str, scale: float, sieved: list[float | None]) -> None:
    """Half of the negatives with weight are mislabelled, so blocks have few of them but all have some."""
    loss = LOSSES[name]
    (x, y), (r, ry) = rows(12, 128, 0.5, seed=0), rows(3000, 128, 0.5, seed=1)
    ry = torch.where(torch.arange(3000) % 40 == 0, 50, ry)
    value, gradient = evaluated(loss, x, y, scale * r, ry)
    assert len(sieved) >= 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bfloat16, "pays", lambda device, dim: False)
        plain = evaluated(loss, x, y, scale * r, ry)
    torch.testing.assert_close((value, gradient), plain, rtol=1e-5, atol=1e-5 * scale)


@settings(max_examples=30, deadline=None)
@given(
    dim=st.sampled_from([64, 65, 300]),
    logarithm=st.integers(-12, -6),
    seed=st.integers(0, 5),
    scale=st.sampled_from([0.01, 1.0, 7.0]),
)
def test_no_column_above_the_cut_is_missed(dim: int, logarithm: int, seed: int, scale: float) -> None:
    """Similarities are packed around the cut, nearer than bfloat16 can tell."""
    (x, _), (noise, _) = rows(4, dim, 1.0, seed), rows(600, dim, 1.0, seed + 50)
    noise = F.normalize(noise - (noise @ x[:1].T) * x[:1], dim=1)
    wanted = 0.6 + 2.0**logarithm * torch.linspace(-1, 1, 600)[:, None]
    r = scale * (wanted * x[:1] + (1 - wanted**2).sqrt() * noise)
    exact, similarity = (x.double() @ r.double().T), torch.empty(4, 600)
    error = Sieve(x).product(r, out=similarity)
    assert ((similarity - exact).abs() <= error).all()
    assert error <= 0.03 * scale
    hits = streaming._reached_columns(similarity[:, ::2], 0.6 * scale, torch.zeros(300, dtype=torch.bool), error)
    above = (exact[:, ::2].amax(dim=0) > 0.6 * scale).nonzero().squeeze(1)
    assert hits is None or set(above.tolist()) <= set(hits.tolist())


def test_it_is_not_used_where_many_columns_are_reached(sieved: list[float | None]) -> None:
    (x, y), (r, ry) = rows(12, 64, 0.2, seed=0), rows(3000, 64, 0.2, seed=1)
    evaluated(ml.ContrastiveLoss(margin=-0.9), x, y, r, ry)
    evaluated(ml.SupConLoss(), x, y, r, ry)
    assert not sieved
    evaluated(ml.ContrastiveLoss(margin=0.9), x, y, r, ry)
    assert sieved


def test_a_row_that_is_not_finite_hides_no_other(sieved: list[float | None]) -> None:
    loss = ml.ContrastiveLoss(margin=0.6)
    (x, y), (r, _) = rows(12, 128, 0.5, seed=0), rows(3000, 128, 0.5, seed=1)
    nowhere = torch.full((3000,), 99)  # all are negatives, the near ones with weight
    r[700] = torch.nan
    value, _ = evaluated(loss, x, y, r, nowhere)
    assert None in sieved
    finite = torch.arange(3000) != 700
    torch.testing.assert_close(value, evaluated(loss, x, y, r[finite], nowhere[finite])[0])
