"""One folder per class: sides, halves, hidden files, and what is said about folders that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lightning_memdml.data.folder import FolderDataModule


def draw(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)


def module(root: Path, **kwargs: object) -> FolderDataModule:
    made = FolderDataModule(root=str(root), num_workers=0, val_fraction=0, **kwargs)
    made.setup()
    return made


def names(made: FolderDataModule, part: str) -> list[object]:
    return [made.classes[label] for label in getattr(made, part).labels]


def test_classes_are_halved_by_name(tmp_path):
    draw(*(tmp_path / name / f"{i}.png" for name in ("owl", "ant", "fox", "cat", "bee") for i in range(2)))
    made = module(tmp_path)
    assert names(made, "train_set") == ["ant", "ant", "bee", "bee"]
    assert names(made, "query_set") == ["cat", "cat", "fox", "fox", "owl", "owl"]
    assert made.gallery_set is made.query_set
    made = module(tmp_path, split_by="alternate")
    assert set(names(made, "train_set")) == {"ant", "cat", "owl"}


def test_train_val_and_test_folders_are_the_sides(tmp_path):
    draw(tmp_path / "train/a/1.png", tmp_path / "train/b/1.png", tmp_path / "test/c/1.png", tmp_path / "val/d/1.png")
    made = module(tmp_path)
    assert [names(made, part) for part in ("train_set", "val_set", "query_set")] == [["a", "b"], ["d"], ["c"]]


def test_a_class_named_train_without_a_test_folder_is_a_class(tmp_path):
    draw(*(tmp_path / name / "1.png" for name in ("train", "bus", "car")))
    assert names(module(tmp_path), "query_set") == ["car", "train"]


def test_deeper_folders_belong_to_their_class_and_hidden_ones_to_none(tmp_path):
    draw(tmp_path / "a/1.png", tmp_path / "a/deep/er/2.JPG", tmp_path / "b/1.webp", tmp_path / "c/1.png")
    draw(tmp_path / "a/.hidden/3.png", tmp_path / ".git/4.png")
    (tmp_path / "b/._1.webp").write_bytes(b"")
    (tmp_path / ".DS_Store").write_bytes(b"")
    made = module(tmp_path)
    paths = made.train_set.paths + made.query_set.paths
    assert [str(Path(path).relative_to(tmp_path)) for path in paths] == [
        "a/1.png",
        "a/deep/er/2.JPG",
        "b/1.webp",
        "c/1.png",
    ]
    assert made.verify() == []


def test_other_files_are_counted_in_a_warning(tmp_path):
    draw(tmp_path / "a/1.png", tmp_path / "b/1.png")
    for name in ("a/1.txt", "b/1.txt", "b/README"):
        (tmp_path / name).write_text("x")
    with pytest.warns(UserWarning, match=r"3 files in .* are not used: \.txt \(2\), \(no suffix\) \(1\)"):
        module(tmp_path)


def test_a_class_without_images_is_named_with_what_it_holds(tmp_path):
    draw(tmp_path / "a/1.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/1.heic").write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"\.jpg.*in the class folder .*/b but found files with the suffixes: \.heic \(1\)"
    ):
        module(tmp_path)


def test_a_flat_folder_is_told_from_folders_of_classes(tmp_path):
    draw(tmp_path / "1.png", tmp_path / "2.png")
    with pytest.raises(FileNotFoundError, match=r"one folder per class in .* found none.*\.png \(2\)"):
        module(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked for the folder .*nowhere, which does not exist; pass `root=`"):
        module(tmp_path / "nowhere")
