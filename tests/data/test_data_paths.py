"""Paths as people write them, and one identity of each image wherever it is listed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lightning_memdml import data
from lightning_memdml.data import FolderDataModule, TableDataModule
from lightning_memdml.data.paths import listed_path, local_path, shown
from lightning_memdml.data.records import Record, first_rows
from lightning_memdml.inference.sources import images_at

CLASSES = {"root": ("FolderDataModule", "CUB200", "Omniglot"), "path": ("TableDataModule", "FeatureDataModule")}
NAMED = [(name, argument) for argument, names in CLASSES.items() for name in names]


def pictures(root: Path, count: int = 8) -> Path:
    """Pictures of different colours, two of a class."""
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (30 * i, 9, 9)).save(root / f"{i}.png")
    return root


def table(folder: Path, *rows: str, head: str = "path,label") -> TableDataModule:
    (folder / "list.csv").write_text("\n".join([head, *rows]))
    options = {"batch_size": 4, "images_per_class": 2, "val_fraction": 0, "num_workers": 0, "image_size": 32}
    return TableDataModule(str(folder / "list.csv"), **options)


# ---------------------------------------------------------------------------- roots and files


@pytest.mark.parametrize(("name", "argument"), NAMED)
def test_home_and_relative_paths_hold_from_any_folder(name, argument, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    made = [getattr(data, name)(**{argument: path}) for path in ("~/x.npz", "x.npz", f"file://{tmp_path}/a%20b.npz")]
    monkeypatch.chdir("/")
    found = [str(getattr(module, argument)) for module in made]
    assert found == [f"{tmp_path}/home/x.npz", f"{tmp_path}/x.npz", f"{tmp_path}/a b.npz"]


@pytest.mark.parametrize("url", ["s3://bucket/x.npz", "https://host/x.npz", "file://host/x.npz", "gs:/bucket/x.npz"])
@pytest.mark.parametrize(("name", "argument"), NAMED)
def test_urls_are_refused_at_once(name, argument, url):
    with pytest.raises(ValueError, match=f"Expected `{argument}` to be a path on this machine but got '{url}'. Copy"):
        getattr(data, name)(**{argument: url})


def test_an_empty_path_is_refused():
    with pytest.raises(ValueError, match=r"Expected `root` to be a path but got ''\. Pass `\.`"):
        FolderDataModule("")


def test_a_pixel_cache_may_be_below_home_and_not_on_another_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = [f"{i}.png,{i // 2},{'train' if i < 4 else 'test'}" for i in range(8)]
    pictures(tmp_path)
    made = table(tmp_path, *rows, head="path,label,split")
    made.pixel_cache = "~/cache"
    made.setup()
    assert list((tmp_path / "cache").glob("*.pixels"))
    other = table(tmp_path, *rows, head="path,label,split")
    other.pixel_cache = "s3://bucket"
    with pytest.raises(ValueError, match="Expected `pixel_cache` to be a path on this machine"):
        other.setup()


@pytest.mark.parametrize("root", [None, ".", "/"])
def test_absolute_paths_of_a_table_are_taken(tmp_path, monkeypatch, root):
    monkeypatch.chdir(pictures(tmp_path))
    made = table(tmp_path, *(f"{tmp_path}/{i}.png,{i // 2}" for i in range(8)))
    made.root = made.root if root is None else local_path(root, "root")
    made.setup()
    assert made.verify() == []


def test_other_paths_of_a_table():
    assert listed_path(Path("/r"), "~/1.jpg", "row 1") == os.path.expanduser("~/1.jpg")
    assert listed_path(Path("/r"), "file:///d/1%20.jpg", "row 1") == "/d/1 .jpg"
    assert listed_path(Path("/r"), "a\\b.jpg", "row 1") == "/r/a/b.jpg"
    assert listed_path(Path("/r"), "~a.jpg", "row 1") == "/r/~a.jpg"
    for path in ("s3://b/1.jpg", "../1.jpg", "", "C:\\1.jpg", "//host/../x\0", "a/../../1.jpg"):
        with pytest.raises(ValueError, match=r"^row 1: [eE]xpected "):
            listed_path(Path("/r"), path, "row 1")


def test_a_missing_image_says_which_option_to_check(tmp_path):
    made = table(tmp_path, "a.png,1", "b.png,1", "c.png,2", "d.png,2")
    made.setup()
    with pytest.raises(FileNotFoundError, match=r"a\.png does not exist, .* Check `--data\.root`"):
        made.train_set.open(0)


def test_names_that_are_not_utf8_are_read_and_named_by_verify(tmp_path):
    for label in "abcd":
        pictures(tmp_path / label, count=2)
    odd = os.fsencode(tmp_path / "d") + b"/caf\xe9.png"
    os.rename(os.fsencode(tmp_path / "d/1.png"), odd)
    made = FolderDataModule(str(tmp_path), val_fraction=0, num_workers=0)
    made.setup()
    assert made.query_set.open(3).size == (8, 8)
    (problem,) = made.verify()
    assert problem.path == f"{tmp_path}/d/caf\\xe9.png"
    assert "expected a name in UTF-8" in problem.reason
    assert problem.path.encode()


def test_a_damaged_picture_of_an_odd_name_can_be_printed(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n.png")
    Path(path).write_bytes(b"no picture")
    images = data.images.ImageDataset(data.images.OpenFiles([Record(path, 0, "test")]), [path], torch.zeros(1))
    with pytest.raises(OSError, match="Cannot read the image") as caught:
        images.open(0)
    assert str(caught.value).encode()
    assert shown(path) in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="a folder of Windows is never read-only")
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folders_are_read(tmp_path):
    for label in "abcd":
        pictures(tmp_path / "images" / label, count=2)
    (tmp_path / "images").chmod(0o555)
    made = FolderDataModule(
        str(tmp_path / "images"), val_fraction=0, num_workers=0, pixel_cache=str(tmp_path / "images")
    )
    with pytest.raises(OSError, match="Cannot write the pixel cache"):
        made.setup()


# ---------------------------------------------------------------------------- one identity


HEAD = "path,label,split,is_query,is_gallery"
TRAIN = tuple(f"{i}.png,{i // 2},train,," for i in range(4))
TESTS = tuple((f"{i}.png", i // 2) for i in range(4, 8))


def sets(made: TableDataModule) -> tuple[list[int], list[int], bool]:
    made.setup()
    return made.query_set.indices.tolist(), made.gallery_set.indices.tolist(), made.query_set is made.gallery_set


def other_names(folder: Path, kind: str) -> list[str]:
    """Other paths of the test images."""
    (folder / "links").mkdir()
    names = []
    for name, _ in TESTS:
        other = {"row": name, "./": f"./{name}", "//": f"links/..//{name}", "absolute": f"{folder}/{name}"}.get(kind)
        if kind == "symbolic link":
            (folder / "links" / name).symlink_to(folder / name)
            other = f"links/{name}"
        if kind == "hard link":
            os.link(folder / name, folder / "links" / name)
            other = f"links/{name}"
        if kind == "linked folder":
            other = f"linked/{name}"
        names.append(str(other))
    if kind == "linked folder":
        (folder / "linked").symlink_to(folder)
    return names


@pytest.mark.parametrize("kind", ["row", "./", "absolute", "symbolic link", "hard link", "linked folder"])
def test_an_image_listed_twice_is_one_image(tmp_path, kind):
    pictures(tmp_path)
    both = [f"{name},{label},validation,True,True" for name, label in TESTS]
    expected = sets(table(tmp_path, *TRAIN, *both, head=HEAD))
    again = [
        f"{name},{label},validation,True,True"
        for name, (_, label) in zip(other_names(tmp_path, kind), TESTS, strict=True)
    ]
    with pytest.warns(UserWarning, match="lists images more than once; 4 repeated rows are not used"):
        assert sets(table(tmp_path, *TRAIN, *both, *again, head=HEAD)) == expected == ([0, 1, 2, 3], [0, 1, 2, 3], True)


@pytest.mark.parametrize("kind", ["row", "./", "absolute", "symbolic link", "hard link", "linked folder"])
def test_a_query_and_a_gallery_row_of_one_image_share_its_index(tmp_path, kind, recwarn):
    pictures(tmp_path)
    queries = [f"{name},{label},validation,True,False" for name, label in TESTS]
    gallery = [
        f"{name},{label},validation,False,True"
        for name, (_, label) in zip(other_names(tmp_path, kind), TESTS, strict=True)
    ]
    assert sets(table(tmp_path, *TRAIN, *queries, *gallery, head=HEAD)) == ([0, 1, 2, 3], [0, 1, 2, 3], True)
    assert sets(table(tmp_path, *TRAIN, *queries[:1], *gallery, head=HEAD)) == ([0], [0, 1, 2, 3], False)
    assert not [warning for warning in recwarn if "more than once" in str(warning.message)]


@pytest.mark.filterwarnings("ignore:Training classes with one image only")
def test_two_boxes_of_a_file_are_two_images(tmp_path):
    pictures(tmp_path)
    rows = [f"7.png,{i // 2},test,{i},0,{i + 2},8" for i in range(4)]
    made = table(tmp_path, *(f"{row},,," for row in ("0.png,7,train,", "1.png,8,train,")), *rows,
                 head="path,label,split,x_1,y_1,x_2,y_2")  # fmt: skip
    assert sets(made) == ([0, 1, 2, 3], [0, 1, 2, 3], True)


@pytest.mark.parametrize("second", ["4.png,9,validation,,", "./4.png,9,train,,", "link.png,9,validation,,"])
def test_one_image_under_two_labels_is_refused_by_name(tmp_path, second):
    pictures(tmp_path)
    (tmp_path / "link.png").symlink_to("4.png")
    rows = [*TRAIN, "4.png,2,validation,,", second]
    rows = [row.replace(",validation,,", ",validation,True,True") for row in rows]
    with pytest.raises(ValueError, match=r"Expected one class for each image but got 2 and 9 for .*4|link\.png"):
        table(tmp_path, *rows, head=HEAD).setup()


@pytest.mark.filterwarnings("ignore:Test classes that are training classes too")
def test_a_test_on_training_images_is_named(tmp_path):
    pictures(tmp_path)
    rows = [*TRAIN, "0.png,0,validation,True,True", "./1.png,0,validation,True,True"]
    with pytest.warns(UserWarning, match="Test images that are training or validation images too: 2"):
        table(tmp_path, *rows, head=HEAD).setup()


def test_missing_files_are_told_apart_by_their_paths():
    records = [Record(path, 0, "test") for path in ("/no/a.jpg", "/no/./a.jpg", "/no/b.jpg", "/no/A.jpg")]
    assert first_rows(records) == [0, 0, 2, 3]


@pytest.mark.filterwarnings("ignore:.* are no images of a class")
def test_an_index_takes_an_image_once(tmp_path):
    pictures(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/link.png").symlink_to(tmp_path / "3.png")
    (tmp_path / "list.csv").write_text("path,label\n3.png,1\n./3.png,1\na/link.png,1\n4.png,2\n")
    named = images_at(tmp_path / "list.csv", lambda image: image)
    assert [Path(path).name for path in named.images.paths] == ["3.png", "4.png"]
    with pytest.raises(ValueError, match="Expected one class for each image"):
        images_at(tmp_path, lambda image: image)


def test_images_that_are_no_files_are_never_one(tmp_path):
    class Same(data.RetrievalDataModule):
        def records(self) -> Any:
            return [Record("", label // 2, "train" if label < 4 else "test") for label in range(8)]

        def images(self, records: Any) -> torch.Tensor:
            return torch.zeros(8, 1, 4, 4, dtype=torch.uint8)

    made = Same(val_fraction=0)
    made.setup()
    assert (len(made.train_set), len(made.query_set)) == (4, 4)


# ---------------------------------------------------------------------------- what is printed


def test_a_data_module_is_printed_in_a_line(tmp_path):
    for label in "abcd":
        pictures(tmp_path / label, count=2)
    made = FolderDataModule(str(tmp_path), val_fraction=0)
    assert str(made) == repr(made) == f"FolderDataModule('{tmp_path}'), not set up"
    made.setup()
    assert str(made) == (
        f"FolderDataModule('{tmp_path}'): 4 train images of 2 classes, 0 validation images of 0 classes, 4 query and "
        "gallery images of 2 classes"
    )
    assert "GlyphDataModule, not set up" in f"{data.GlyphDataModule()}"
