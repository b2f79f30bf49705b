"""Averaging with mirrored images and whitening: in plain functions, and in what a learner does with images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_memdml import ContrastiveLoss, MetricLearner, SmallConvNet
from lightning_memdml.inference.evaluation import embed_images
from lightning_memdml.retrieval import load_index
from lightning_memdml.whitening import Whitening


class Slanted(nn.Module):
    """A network in float64 that tells left from right."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3 * 4 * 5, 6, generator=generator, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(images.flatten(1) @ self.weight, dim=1)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(8, 3, 12, 14, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def learner() -> MetricLearner:
    torch.manual_seed(0)
    return MetricLearner(SmallConvNet(in_channels=3, width=4), ContrastiveLoss(), embedding_dim=6).eval()


@torch.no_grad()
def averaged(model: nn.Module, images: Tensor) -> Tensor:
    mirrored = images[..., torch.arange(images.shape[-1] - 1, -1, -1)]
    total = model(images) + model(mirrored)
    return total / total.norm(dim=1, keepdim=True)


def test_the_average_of_a_network_that_is_not_symmetric() -> None:
    model, images = Slanted(), torch.randn(7, 3, 4, 5, dtype=torch.float64)
    plain, found = embed_images(model, images), embed_images(model, images, flip=True)
    torch.testing.assert_close(found, averaged(model, images), atol=1e-14, rtol=0)
    assert torch.equal(plain, model(images))
    assert not torch.allclose(plain, found, atol=0.1)
    torch.testing.assert_close(embed_images(model, images.flip(3), flip=True), found, atol=1e-14, rtol=0)
    with pytest.raises(ValueError, match="Expected") as error:
        embed_images(model, torch.zeros(2, 4, 60), flip=True)
    assert str(error.value) == (
        "Expected images (B, C, H, W) to mirror but got (2, 4, 60). Leave `flip` out: features have no left and right."
    )


def test_a_learner_embeds_and_predicts_averages(learner: MetricLearner, images: Tensor) -> None:
    expected = averaged(learner, images)
    assert torch.equal(learner.embed(images, progress=False), learner(images))
    assert learner.embed(images, flip=True, progress=False).allclose(expected, atol=1e-6)
    batch = (images, torch.zeros(8, dtype=torch.long))
    assert torch.equal(learner.predict_step(batch, 0)["embeddings"], learner(images))
    learner.predict_flip = True
    assert learner.predict_step(batch, 0)["embeddings"].allclose(expected, atol=1e-6)


def test_an_index_treats_queries_as_its_own_images(learner: MetricLearner, tmp_path: Path) -> None:
    """Neighbours are those of brute force over averaged and whitened embeddings, also after saving."""
    pixels = torch.randint(0, 256, (30, 3, 12, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    options = {"transform": lambda picture: picture / 255, "progress": False}
    queries = pixels[:5].flip(-1)
    rows = averaged(learner, pixels / 255)
    for whitening in (None, Whitening.fit(rows, dim=4)):
        space = rows if whitening is None else whitening(rows)
        expected = (space[:5] @ space.T).topk(6)  # a mirrored query has the average of the image itself
        made = learner.build_index(pixels, flip=True, whitening=whitening, output=tmp_path / "index", **options)
        for index in (made, load_index(tmp_path / "index")):
            similarity, position = learner.search(queries, index, 6, **options)
            assert torch.equal(position, expected.indices)
            torch.testing.assert_close(similarity, expected.values, atol=1e-5, rtol=0)
        assert made.embeddings.shape == (30, 6 if whitening is None else 4)
        assert made.measure(k=[1]).recall == {1: 1.0}
    with pytest.raises(ValueError, match="Expected `queries` of dimension 6, as in the index, but got 4"):
        made.search(space)


def test_a_learner_re_ranks(learner: MetricLearner) -> None:
    pixels = torch.randint(0, 256, (30, 3, 12, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    options = {"transform": lambda picture: picture / 255, "progress": False}
    index = learner.build_index(pixels, **options)
    found = learner.search(pixels[:3], index, 9, rerank=True, **options)
    expected = index.search_reranked(learner.embed(pixels[:3] / 255, progress=False), 9)
    assert torch.equal(found[1], expected[1])
    assert not torch.equal(found[1], learner.search(pixels[:3], index, 9, **options)[1])
    everything = learner.search(pixels[:3], index, 300, rerank=True, **options)  # more than the candidates of a search
    assert torch.equal(everything[1][:, :9], expected[1])


def test_an_index_without_its_whitening_is_damaged(learner: MetricLearner, images: Tensor, tmp_path: Path) -> None:
    options = {"transform": lambda picture: picture / 255, "progress": False}
    pixels = (images * 50 + 100).clamp(0, 255).to(torch.uint8)
    whitening = Whitening.fit(learner.embed(images, progress=False), dim=3)
    learner.build_index(pixels, whitening=whitening, output=tmp_path / "index", **options)
    (tmp_path / "index/whitening.npy").rename(tmp_path / "moved.npy")
    with pytest.raises(ValueError, match=r"it is damaged: .*whitening\.npy.*Make it again with `memdml index`\.$"):
        load_index(tmp_path / "index")
    Whitening.fit(learner.embed(images, progress=False), dim=2).save(tmp_path / "index/whitening.npy")
    with pytest.raises(ValueError, match=r"whitening\.npy holds \(8, 2, 'float32'\) instead of \(8, 3, 'float32'\)"):
        load_index(tmp_path / "index")
