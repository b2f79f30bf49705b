"""Whitening: the identity as covariance, numpy's own decomposition, and sentences for what cannot be whitened."""

from __future__ import annotations

from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_memdml.deploy.index_command import index_images
from lightning_memdml.deploy.score import score_files
from lightning_memdml.heads import FeatureStatistics, fit_head
from lightning_memdml.whitening import SHRINKAGE, Whitening


@pytest.fixture
def rows() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    return mixed @ torch.randn(5, 5, generator=generator, dtype=torch.float64) + 0.4


@pytest.mark.parametrize("dim", [None, 3])
def test_whitened_training_images_have_the_identity_as_covariance(rows: Tensor, dim: int | None) -> None:
    whitening = Whitening.fit(rows, dim, shrinkage=0)
    spread = (F.normalize(rows, dim=1) - whitening.mean) @ whitening.weight.T
    kept = 5 if dim is None else dim
    torch.testing.assert_close(torch.cov(spread.T), torch.eye(kept, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(whitening(rows), F.normalize(spread, dim=1), atol=1e-12, rtol=0)


def test_directions_are_those_of_numpy_and_shrinkage_moves_their_variances_to_the_mean(rows: Tensor) -> None:
    unit = rows.numpy() / np.linalg.norm(rows.numpy(), axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(np.cov(unit.T))
    expected = (vectors / np.sqrt(0.7 * values + 0.3 * values.mean()))[:, ::-1].T[:4]
    found = Whitening.fit(rows, dim=4, shrinkage=0.3)
    np.testing.assert_allclose(np.abs(found.weight.numpy()), np.abs(expected), atol=1e-10)
    np.testing.assert_allclose(found.mean.numpy(), unit.mean(axis=0), atol=1e-12)


def test_a_fitted_head_of_one_class_is_the_same_whitening(rows: Tensor) -> None:
    """The two share one decomposition: without classes, the spread within them is all of it."""
    unit = F.normalize(rows, dim=1)
    statistics, head = FeatureStatistics(5, 1), nn.Linear(5, 5).double()
    statistics.add(unit, torch.zeros(200, dtype=torch.long))
    fit_head(head, statistics, "whitening")
    torch.testing.assert_close(head.weight.data, Whitening.fit(rows).weight, atol=1e-8, rtol=0)


def test_shrinkage_serves_fewer_images_than_dimensions(rows: Tensor) -> None:
    assert bool(Whitening.fit(rows[:3])(rows).isfinite().all())


def test_what_is_saved_is_read_again(rows: Tensor, tmp_path: Path) -> None:
    whitening = Whitening.fit(rows, dim=2)
    whitening.save(tmp_path / "whitening.npy")
    read = Whitening.load(tmp_path / "whitening.npy")
    assert torch.equal(read(rows), whitening(rows))
    assert read.digest() == whitening.digest() != Whitening.fit(rows, dim=3).digest()
    for wrong, message in (
        (np.zeros(3), "whitening.npy holds (3,) torch.float64"),
        (np.full((3, 5), np.nan), "whitening.npy holds NaN or infinity"),
    ):
        np.save(tmp_path / "whitening.npy", wrong)
        with pytest.raises(ValueError, match="holds") as error:
            Whitening.load(tmp_path / "whitening.npy")
        assert str(error.value) == message


def test_defaults_of_the_commands_are_those_of_the_class() -> None:
    for command in (score_files, index_images):
        assert signature(command).parameters["shrinkage"].default == SHRINKAGE


def test_what_cannot_be_whitened_is_explained(rows: Tensor) -> None:
    wrong: list[tuple[Tensor, int | None, float, str]] = [
        (rows, 6, 0.5, "Expected to keep 1 to 5 dimensions, the width of the embedding, but got 6. Pass fewer."),
        (rows, None, 1.0, "Expected `shrinkage` in [0, 1) but got 1.0. Pass 0.5, for example."),
        (
            rows[:3], None, 0.0,
            "Expected training images that vary in 5 directions but these 3 vary in 2. Pass a `shrinkage` above 0, or "
            "keep 2 dimensions at most.",
        ),
        (
            torch.full((4, 5), torch.nan), None, 0.5,
            "Expected finite embeddings of at least two training images to whiten but got 4 of which 4 are not finite. "
            "Pass others.",
        ),
    ]  # fmt: skip
    for given, dim, shrinkage, message in wrong:
        with pytest.raises(ValueError, match="Expected") as error:
            Whitening.fit(given, dim, shrinkage)
        assert str(error.value) == message
    with pytest.raises(ValueError, match="Expected") as error:
        Whitening.fit(rows)(rows[:, :4])
    assert str(error.value) == (
        "Expected embeddings of dimension 5, as those that the whitening was learned on, but got 4. Embed both with "
        "one network."
    )
