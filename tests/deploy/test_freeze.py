"""`memdml freeze`: features of a folder, a table and an archive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.children import run_python

from lightning_memdml.cli import main
from lightning_memdml.data import FeatureDataModule, FolderDataModule

CLASSES, IMAGES = 4, 3
SMALL = ["--backbone=resnet18", "--image_size=33", "--views=2"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one folder per class."""
    pixels = np.random.default_rng(0)
    for label in range(CLASSES):
        (tmp_path / f"images/{label}").mkdir(parents=True)
        for row in range(IMAGES):
            image = Image.fromarray(pixels.integers(0, 255, (40, 40, 3), np.uint8))
            image.save(tmp_path / f"images/{label}/{row}.jpg")
    return tmp_path / "images"


def write_table(folder: Path) -> Path:
    files = sorted(folder.rglob("*.jpg"))
    lines = [f"{file.relative_to(folder.parent)},{file.parent.name}\n" for file in files]
    path = folder.parent / "list.csv"
    path.write_text("path,label\n" + "".join(lines))
    return path


def write_archive(folder: Path) -> Path:
    files = [file.read_bytes() for file in sorted(folder.rglob("*.jpg"))]
    offset = np.cumsum([0, *map(len, files)])
    label = np.repeat(np.arange(CLASSES), IMAGES)
    path = folder.parent / "images.npz"
    np.savez(path, jpeg=np.frombuffer(b"".join(files), np.uint8), offset=offset, label=label)
    return path


def test_folder_table_and_archive_give_the_same_features(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    found = []
    for name, source in (("folder", folder), ("archive", write_archive(folder)), ("table", write_table(folder))):
        torch.manual_seed(0)  # of the random weights
        main(["freeze", str(source), f"{name}.npz", *SMALL])
        with np.load(f"{name}.npz") as made:
            found.append({key: made[key] for key in ("feature", "label", "train")})
    for other in found[1:]:
        for key, values in found[0].items():
            assert np.array_equal(values, other[key]), key
    assert found[0]["feature"].shape == (CLASSES * IMAGES, 2, 512)
    assert found[0]["train"].sum() == CLASSES * IMAGES // 2


def test_an_installed_package_freezes_a_folder(folder: Path) -> None:
    done = run_python("-m", "lightning_memdml", "freeze", "images", "new/features.npz", *SMALL, cwd=folder.parent)
    assert "12 images x 2 views x 512 features: new/features.npz" in done.stdout
    assert done.stdout.startswith("The weights of resnet18 are random. Pass --weights DEFAULT, or a file, for features")
    assert "24/24" in done.stderr.replace(".0", "")  # the progress bar
    data = FeatureDataModule(str(folder.parent / "new/features.npz"), batch_size=4, images_per_class=2, val_fraction=0)
    data.setup()
    assert len(data.train_set) == len(data.query_set) == CLASSES * IMAGES // 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["features.npz", "--views=0"], "error: Expected --views of at least 1 but got 0. Pass 1 or more."),
        (
            ["features.zip"],
            "error: Expected a file that ends in .npz as output but got features.zip. Pass features.npz.",
        ),
    ],
)
def test_values_that_cannot_be_used_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(folder.parent)
    with pytest.raises(SystemExit) as stopped:
        main(["freeze", "images", *options])
    assert stopped.value.code == message


def test_separate_queries_and_gallery_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (folder / "train").mkdir()
    for role, labels in {"train": "01", "query": "2", "gallery": "3"}.items():
        for label in labels:
            (folder / role).mkdir(exist_ok=True)
            (folder / label).rename(folder / role / label)
    with pytest.raises(SystemExit, match="but got separate ones in images"):
        main(["freeze", "images", "features.npz", *SMALL])


def test_validation_images_are_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    for label, role in enumerate(("train", "train", "val", "test")):
        (folder / role).mkdir(exist_ok=True)
        (folder / str(label)).rename(folder / role / str(label))
    main(["freeze", "images", "features.npz", *SMALL])
    assert "3 validation images are left out" in capsys.readouterr().out


def test_a_network_of_timm_gets_images_as_it_wants_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    monkeypatch.chdir(folder.parent)
    sizes = []
    monkeypatch.setattr(
        "lightning_memdml.deploy.freeze.FolderDataModule",
        lambda root, **options: (
            sizes.append((options["image_size"], options["mean"])) or FolderDataModule(root, **options)
        ),
    )
    main(["freeze", "images", "features.npz", "--backbone=timm:test_vit", "--views=1"])
    assert sizes == [(160, [0.5, 0.5, 0.5])]
    with np.load("features.npz") as made:
        assert made["feature"].shape == (CLASSES * IMAGES, 1, 64)
