"""Pooling, and linear heads that are initialised or fitted in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_memdml.heads import FeatureStatistics, GeneralizedMeanPool, Pool, fit_head, initialize_head

CLASSES, DIM = 6, 10


@pytest.fixture
def features() -> tuple[Tensor, Tensor]:
    """Features of classes that differ along the first axes, with an uneven spread inside a class."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES).repeat_interleave(20)
    centers = torch.randn(CLASSES, DIM, generator=draw)
    spread = torch.linspace(0.1, 2.0, DIM)
    return centers[labels] + spread * torch.randn(len(labels), DIM, generator=draw), labels


def statistics_of(features: Tensor, labels: Tensor) -> FeatureStatistics:
    found = FeatureStatistics(features.shape[1], CLASSES)
    found.add(features, labels)
    return found


def test_covariances_are_those_of_numpy(features: tuple[Tensor, Tensor]) -> None:
    rows, labels = features
    mean, total, within = statistics_of(rows, labels).covariances()
    values = rows.double().numpy()
    residuals = np.concatenate([values[labels == label] - values[labels == label].mean(axis=0) for label in range(6)])
    np.testing.assert_allclose(mean, values.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(total, np.cov(values.T), atol=1e-10)
    np.testing.assert_allclose(within, residuals.T @ residuals / (len(values) - CLASSES), atol=1e-10)


def test_sums_of_batches_and_ranks_add_up(features: tuple[Tensor, Tensor]) -> None:
    rows, labels = features
    first, second = statistics_of(rows[:37], labels[:37]), statistics_of(rows[37:], labels[37:])
    for one, other, whole in zip(first.sums(), second.sums(), statistics_of(rows, labels).sums(), strict=True):
        torch.testing.assert_close(one + other, whole)


def test_pca_keeps_the_directions_of_largest_variance(features: tuple[Tensor, Tensor]) -> None:
    rows, labels = features
    head = nn.Linear(DIM, 4)
    fit_head(head, statistics_of(rows, labels), "pca")
    values = rows.double().numpy() - rows.double().numpy().mean(axis=0)
    scores = values @ np.linalg.svd(values)[2][:4].T
    np.testing.assert_allclose(np.abs(head(rows).detach().numpy()), np.abs(scores), atol=1e-4)


def test_whitening_makes_the_spread_within_classes_round(features: tuple[Tensor, Tensor]) -> None:
    rows, labels = features
    head = nn.Linear(DIM, DIM)
    fit_head(head, statistics_of(rows, labels), "whitening", shrinkage=1e-9)
    _, total, within = statistics_of(head(rows).detach(), labels).covariances()
    torch.testing.assert_close(within, torch.eye(DIM, dtype=torch.float64), atol=1e-4, rtol=0)
    assert total.diagonal().diff().max() < 1e-4, "the most telling direction comes first"


def test_whitening_with_fewer_rows_keeps_the_best_separating_ones(features: tuple[Tensor, Tensor]) -> None:
    rows, labels = features
    wide, narrow = nn.Linear(DIM, DIM), nn.Linear(DIM, 3)
    for head in (wide, narrow):
        fit_head(head, statistics_of(rows, labels), "whitening")
    torch.testing.assert_close(narrow.weight, wide.weight[:3])
    torch.testing.assert_close(narrow.bias, wide.bias[:3])


def test_an_embedding_wider_than_the_features_is_filled_with_zeros(features: tuple[Tensor, Tensor]) -> None:
    head = nn.Linear(DIM, DIM + 2)
    fit_head(head, statistics_of(*features), "whitening")
    assert head(features[0])[:, DIM:].abs().max() == 0


def test_constant_features_give_finite_heads() -> None:
    labels = torch.arange(CLASSES).repeat_interleave(2)
    for init in ("pca", "whitening"):
        head = nn.Linear(DIM, 4)
        fit_head(head, statistics_of(torch.ones(len(labels), DIM), labels), init)
        assert bool(head.weight.isfinite().all())


def test_what_cannot_be_fitted_is_refused() -> None:
    single = statistics_of(torch.randn(CLASSES, DIM), torch.arange(CLASSES))
    with pytest.raises(ValueError, match="Expected training classes with at least two images"):
        fit_head(nn.Linear(DIM, 4), single, "whitening")
    with pytest.raises(ValueError, match="Expected finite features to fit the head but got NaN or infinity"):
        statistics_of(torch.full((2, DIM), torch.nan), torch.zeros(2, dtype=torch.int64))


def test_kaiming_is_the_head_of_xbms_authors() -> None:
    """Fan-out: a standard deviation of sqrt(2 / 128) = 0.125 for 128 rows, and no bias."""
    head = nn.Linear(2048, 128)
    torch.manual_seed(0)
    initialize_head(head, "kaiming")
    assert float(head.weight.detach().std()) == pytest.approx(0.125, rel=0.01)
    assert not head.bias.any()
    initialize_head(head, "orthogonal")
    torch.testing.assert_close(head.weight @ head.weight.T, torch.eye(128), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="Expected `head_init` to be one of default, kaiming"):
        initialize_head(head, "xavier")  # type: ignore[arg-type]


def test_pooling_by_its_formula() -> None:
    maps = torch.rand(2, 5, 4, 3)
    average, maximum = maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))
    torch.testing.assert_close(Pool("average")(maps), average)
    torch.testing.assert_close(Pool("maximum")(maps), maximum)
    torch.testing.assert_close(Pool("both")(maps), torch.cat([average, maximum], dim=1))
    torch.testing.assert_close(GeneralizedMeanPool(p=1.0)(maps), average)
    torch.testing.assert_close(Pool("gem")(maps), (maps**3).mean(dim=(2, 3)) ** (1 / 3))
    torch.testing.assert_close(GeneralizedMeanPool(p=200.0)(maps), maximum, rtol=0.02, atol=0)
    with pytest.raises(
        ValueError, match="Expected `pooling` to be one of average, maximum, both, gem, token but got 'mean'"
    ):
        Pool("mean")  # type: ignore[arg-type]


def test_the_exponent_of_the_generalised_mean_learns() -> None:
    pool = GeneralizedMeanPool()
    pool(torch.rand(2, 5, 4, 3)).sum().backward()
    assert pool.p.grad is not None
    assert pool.p.grad != 0
    assert bool(torch.isfinite(GeneralizedMeanPool()(torch.zeros(1, 2, 3, 3))).all())
