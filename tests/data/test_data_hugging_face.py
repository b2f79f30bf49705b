"""Data sets of Hugging Face: made here, saved to a folder, and read back image by image."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_memdml import HuggingFaceDataModule
from lightning_memdml.trust import UntrustedFileError, allowed_config

datasets = pytest.importorskip("datasets", reason="the extra `hf`")


def pictures(count: int) -> list[Image.Image]:
    """Pictures of one colour each, by their number."""
    return [Image.new("RGB", (40, 30), (10 * number, 0, 0)) for number in range(count)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("hf")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcdef"))})
    train = datasets.Dataset.from_dict({"image": pictures(12), "label": [n // 2 for n in range(12)]}, features=features)
    test = datasets.Dataset.from_dict({"image": pictures(4), "label": [5, 5, 4, 4]}, features=features)
    train.save_to_disk(folder / "one")
    datasets.DatasetDict(train=train.select(range(8)), test=test, unlabelled=test).save_to_disk(folder / "splits")
    renamed = train.rename_columns({"image": "picture", "label": "kind"}).cast_column("kind", datasets.Value("string"))
    renamed.save_to_disk(folder / "renamed")
    return {name: str(folder / name) for name in ("one", "splits", "renamed")}


def module(path: str, **options: Any) -> HuggingFaceDataModule:
    sizes = {"batch_size": 4, "images_per_class": 2, "val_fraction": 0.0, "image_size": 16, "num_workers": 0}
    made = HuggingFaceDataModule(path, **{**sizes, **options})
    made.setup()
    return made


def red(images: Any, position: int) -> int:
    return images.picture(position).getpixel((3, 3))[0]


def test_the_first_half_of_the_classes_trains(saved: dict[str, str]) -> None:
    data = module(saved["one"])
    assert data.classes == list("abcdef")
    assert data.train_set.paths == [f"train/{row}" for row in range(6)]
    assert data.train_set.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.query_set.labels.tolist() == [3, 3, 4, 4, 5, 5]
    assert data.gallery_set is data.query_set
    assert [red(data.query_set, position) for position in range(6)] == [60, 70, 80, 90, 100, 110]
    images, labels, indices = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 16, 16)
    assert len(set(labels.tolist())) == 2
    assert len(set(indices.tolist())) == 4


def test_splits_are_joined_or_keep_their_roles(saved: dict[str, str]) -> None:
    joined = module(saved["splits"])
    assert len(joined.train_set) + len(joined.query_set) == 16
    assert red(joined.query_set, len(joined.query_set) - 1) == 30  # the last row of the last split
    own = module(saved["splits"], own_splits=True)
    assert own.train_set.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [own.classes[label] for label in own.query_set.labels.tolist()] == ["f", "f", "e", "e"]
    assert own.query_set.paths == [f"test/{row}" for row in range(4)]


def test_columns_of_other_names_and_texts_as_labels(saved: dict[str, str]) -> None:
    data = module(saved["renamed"], image_column="picture", label_column="kind")
    assert sorted(map(str, data.classes)) == ["0", "1", "2", "3", "4", "5"]
    with pytest.raises(
        ValueError,
        match=r"^Expected the columns image and label in .*renamed \(train\) but got picture, kind\. Pass `image",
    ):
        module(saved["renamed"])


def test_workers_open_the_images(saved: dict[str, str]) -> None:
    data = module(saved["one"], num_workers=1)
    assert len(next(iter(data.test_dataloader()))[0]) == 6


def test_what_is_not_there(saved: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"^Expected a folder of `save_to_disk` but there is no .*cifar100\. Pass"
    ):
        module("cifar100")
    datasets.DatasetDict(test=datasets.load_from_disk(saved["one"])).save_to_disk(tmp_path / "test")
    with pytest.raises(ValueError, match=r"^Expected a split `train` in .* but got test\."):
        module(str(tmp_path / "test"), own_splits=True)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'is not installed\. `pip install "lightning-memdml\[hf\]"`\.$'):
        module(saved["one"])


def test_a_name_of_the_hub_is_downloaded_only_on_request(
    monkeypatch: pytest.MonkeyPatch, saved: dict[str, str]
) -> None:
    asked: list[str] = []
    load: Callable[[str], Any] = lambda name: asked.append(name) or datasets.load_from_disk(saved["one"])  # noqa: E731
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(module("someone/birds", download=True).train_set) == 6
    assert set(asked) == {"someone/birds"}


def test_a_file_may_name_a_folder_and_downloads_nothing() -> None:
    options = {"path": "someone/birds", "image_column": "picture", "download": True, "own_splits": True}
    config = {"data": {"class_path": "HuggingFaceDataModule", "init_args": options}}
    assert allowed_config(config, "a.ckpt")["data"]["init_args"] == {**options, "download": False}
    with pytest.raises(UntrustedFileError):
        allowed_config(
            {"data": {"class_path": "HuggingFaceDataModule", "init_args": {"path": "https://a/b"}}}, "a.ckpt"
        )


def test_grey_pictures_become_rgb(tmp_path: Path) -> None:
    grey = [Image.fromarray(np.full((20, 20), 9 * number, dtype=np.uint8)) for number in range(8)]
    labels = [number // 2 for number in range(8)]
    datasets.Dataset.from_dict({"image": grey, "label": labels}).cast_column("image", datasets.Image()).save_to_disk(
        tmp_path / "grey"
    )
    assert module(str(tmp_path / "grey")).query_set.picture(0).mode == "RGB"
