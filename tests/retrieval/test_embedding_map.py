"""Maps of embeddings: PCA against a singular value decomposition, and what the picture says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_memdml.retrieval import map_points, save_map
from lightning_memdml.retrieval.embedding_map import _figure


def sample(count: int = 60, dim: int = 7, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    centres = 3 * torch.randn(classes, dim, generator=generator)
    return centres[labels] + torch.randn(count, dim, generator=generator), labels


def test_pca_is_the_projection_of_unit_rows_on_the_two_largest_directions() -> None:
    embeddings, _ = sample()
    points, shares = map_points(5 * embeddings)
    unit = embeddings.numpy().astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    centred = unit - unit.mean(axis=0)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    for axis in range(2):
        direction = directions[axis] * np.sign(directions[axis][np.abs(directions[axis]).argmax()])
        np.testing.assert_allclose(points[:, axis], centred @ direction, atol=1e-5)
        assert shares[axis] == pytest.approx(values[axis] ** 2 / (values**2).sum(), rel=1e-5)


def test_a_map_is_the_same_at_every_call_and_equal_rows_are_one_point() -> None:
    embeddings, _ = sample()
    embeddings[1] = 2 * embeddings[0]
    one, other = map_points(embeddings)[0], map_points(embeddings.double())[0]
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    torch.testing.assert_close(one[0], one[1], atol=1e-6, rtol=0)
    points, shares = map_points(torch.ones(4, 3))
    assert points.abs().max() < 1e-6
    assert all(0 <= share <= 1 for share in shares)


def test_umap_keeps_classes_apart() -> None:
    pytest.importorskip("umap", reason="umap-learn is not installed: it is the extra `umap`")
    embeddings, labels = sample(90)
    points, shares = map_points(embeddings, "umap", seed=1)
    assert shares == ()
    assert torch.equal(points, map_points(embeddings, "umap", seed=1)[0])
    nearest = torch.cdist(points, points).fill_diagonal_(torch.inf).argmin(dim=1)
    assert (labels[nearest] == labels).float().mean() > 0.9


def test_without_umap_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    with pytest.raises(ImportError, match=r"lightning-memdml\[umap\].*or take 'pca'"):
        map_points(sample()[0], "umap")


def test_the_largest_classes_are_named_and_every_embedding_is_a_point() -> None:
    embeddings, _ = sample(100)
    labels = torch.arange(100) % 30 // 2 + 7 * (torch.arange(100) > 80)
    points, shares = map_points(embeddings)
    figure = _figure(points, labels, {0: "a name that is far too long to stand there"}, "", "pca", shares)
    (axes,) = figure.axes
    named = [part for part in axes.collections if "more classes" not in str(part.get_label())]
    looks = {(tuple(part.get_facecolor()[0]), part.get_paths()[0].vertices.tobytes()) for part in named}
    assert len(looks) == 10, "two classes look the same"
    assert len({part.get_paths()[0].vertices.tobytes() for part in named}) == 10, "told apart by colour alone"
    drawn = np.concatenate([np.asarray(part.get_offsets()) for part in axes.collections])
    np.testing.assert_allclose(np.sort(drawn, axis=0), np.sort(points.numpy(), axis=0), atol=1e-6)
    sizes = dict(zip(*(column.tolist() for column in labels.unique(return_counts=True)), strict=True))
    shown = {part.get_label(): len(part.get_offsets()) for part in axes.collections}
    assert f"{len(sizes) - 10} more classes" in shown
    assert min(value for name, value in shown.items() if "more" not in name) >= sorted(sizes.values())[-10]
    assert max(map(len, shown)) <= 28
    assert f"{shares[0]:.0%} of the variance" in axes.get_xlabel()


def test_the_picture_is_written_and_wrong_input_is_explained(tmp_path: Path) -> None:
    embeddings, labels = sample()
    assert Image.open(save_map(tmp_path / "new/map.png", embeddings, labels)).width > 600
    for call, message in (
        (lambda: save_map(tmp_path / "map.gif", embeddings, labels), r"ending in \.png"),
        (lambda: save_map(tmp_path / "map.png", embeddings, labels[:5]), r"`labels` of shape \(60,\)"),
        (lambda: map_points(embeddings[:2]), "at least 3 embeddings of 2 dimensions"),
        (lambda: map_points(embeddings, "tsne"), "'pca' or 'umap' but got 'tsne'"),  # type: ignore[arg-type]
        (lambda: map_points(embeddings / 0), "NaN or infinity in 60 of 60 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not (tmp_path / "map.png").exists()
