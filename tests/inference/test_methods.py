"""A learner embeds, indexes, searches and exports images, prepared as those it was validated on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from lightning_memdml import ContrastiveLoss, FolderDataModule, MetricLearner, SmallConvNet
from lightning_memdml.retrieval import load_index
from lightning_memdml.saving import DataConfig


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for label in "ab":
        (folder / label).mkdir()
        for number in range(3):
            noise = generator.integers(0, 255, (5, 7, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((70 + 9 * number, 50)).save(folder / label / f"{number}.png")
    return folder


@pytest.fixture
def learner(pictures: Path) -> MetricLearner:
    torch.manual_seed(0)
    made = MetricLearner(SmallConvNet(in_channels=3, width=4), ContrastiveLoss(), embedding_dim=8)
    config = {"class_path": "FolderDataModule", "init_args": {"root": str(pictures), "image_size": 40}}
    made.data_config = DataConfig(config, "this test", trust=False)
    return made


def expected(learner: MetricLearner, files: list[Path]) -> torch.Tensor:
    transform = FolderDataModule("unused", image_size=40).default_test_transform()
    with torch.no_grad():
        return learner.eval()(torch.stack([transform(Image.open(file).convert("RGB")) for file in files]))


def test_every_kind_of_images_gives_the_same(
    learner: MetricLearner, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted(pictures.rglob("*.png"))
    wanted = expected(learner, files)
    opened = [Image.open(file) for file in files]
    for images in (pictures, str(pictures), files, [str(file) for file in files], opened):
        found = learner.embed(images, batch_size=4)
        assert found.dtype == torch.float32
        assert found.allclose(wanted, atol=1e-6)
    assert "6/6" in capsys.readouterr().err
    for one in (files[2], str(files[2]), opened[2]):
        assert learner.embed(one, progress=False).allclose(wanted[2:3], atol=1e-6)
    assert capsys.readouterr().err == ""
    pixels = torch.stack([v2.functional.pil_to_tensor(picture.resize((60, 50))) for picture in opened])
    transform = FolderDataModule("unused", image_size=40).default_test_transform()
    prepared = torch.stack([transform(picture) for picture in pixels])
    assert learner.embed(pixels).allclose(learner.embed(prepared), atol=1e-6)


def test_modes_are_as_they_were(learner: MetricLearner) -> None:
    learner.train()
    learner.model.backbone.layers[1].eval()
    before = [module.training for module in learner.modules()]
    statistics = learner.model.backbone.layers[4].running_mean.clone()
    assert not learner.embed(torch.randn(4, 3, 40, 40)).requires_grad
    assert [module.training for module in learner.modules()] == before
    assert learner.model.backbone.layers[4].running_mean.equal(statistics)


def test_a_transform_of_the_user(learner: MetricLearner, pictures: Path) -> None:
    learner.data_config = None
    file = pictures / "a/0.png"
    message = (
        r"^Expected a learner that was trained with a data module of this package, or `transform=`, but got neither"
    )
    with pytest.raises(ValueError, match=message):
        learner.embed(file)
    transform = v2.Compose([v2.Resize((32, 32)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    found = learner.embed(file, transform=transform)
    assert found.allclose(learner.embed(transform(Image.open(file))[None]), atol=1e-6)


def test_indexed_searched_and_saved(learner: MetricLearner, pictures: Path, tmp_path: Path) -> None:
    index = learner.build_index(pictures, output=tmp_path / "index", progress=False)
    assert index.images.classes == ["a"] * 3 + ["b"] * 3
    assert Path(index.images.paths[0]) == pictures / "a/0.png"
    for searched in (index, tmp_path / "index", load_index(tmp_path / "index")):
        similarity, position = learner.search([pictures / "b/1.png", pictures / "a/0.png"], searched, k=2)
        assert position[:, 0].tolist() == [4, 0]
        assert similarity[:, 0].tolist() == pytest.approx([1, 1])


def test_exported(learner: MetricLearner, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learner.train()
    assert learner.export(tmp_path, ["torch"])["model.pt2"] < 1e-5
    assert learner.training
    assert "preprocessing.json: decode" in capsys.readouterr().out


def test_what_is_no_image(learner: MetricLearner, pictures: Path) -> None:
    for wrong, message in (
        ([3], "but got a list of others"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "but got a tensor of torch.int64"),
    ):
        with pytest.raises(TypeError, match=f"^Expected a folder, image files.*{message}"):
            learner.embed(wrong)
    with pytest.raises(ValueError, match="Expected at least one image to embed but got none"):
        learner.embed([])
    with pytest.raises(FileNotFoundError, match=r"^Expected an image file but there is no nowhere\.png"):
        learner.embed("nowhere.png")
