"""One folder per class: sides, halves, hidden files, and what is said about folders that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lightning_memdml.data.folder import FolderDataModule

# Data sets of tests are small.
pytestmark = pytest.mark.filterwarnings("ignore:Training classes with one image only")


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


# ---------------------------------------------------------------------------- folders as people have them


def tree(root: Path, parts: dict[str, str], images: int = 2) -> Path:
    """Classes of their own in each part: `{"train": "ab"}`."""
    draw(
        *(root / part / label / f"{i}.png" for part, labels in parts.items() for label in labels for i in range(images))
    )
    return root


@pytest.mark.parametrize(
    ("parts", "sides"),
    [
        (("train", "val"), ("ab", "cd", "", "")),
        (("train", "valid", "test"), ("ab", "cd", "ef", "ef")),
        (("Train", "VAL", "Test"), ("ab", "cd", "ef", "ef")),
        (("training", "validation", "testing"), ("ab", "cd", "ef", "ef")),
        (("train", "dev", "query"), ("ab", "cd", "ef", "")),
        (("train", "query", "gallery"), ("ab", "", "cd", "ef")),
    ],
)
def test_folders_of_roles_are_known_by_their_usual_names(tmp_path, parts, sides):
    made = module(tree(tmp_path, dict(zip(parts, ("ab", "cd", "ef"), strict=False))))
    found = [set(names(made, part)) for part in ("train_set", "val_set", "query_set", "gallery_set")]
    assert found == [set(side) for side in sides]


@pytest.mark.parametrize("above", ["archive", "archive/data", ".", "archive/__MACOSX/../data"])
def test_a_folder_that_holds_only_the_roles_may_be_passed(tmp_path, above):
    made = module(tree(tmp_path, {f"{above}/train": "ab", f"{above}/test": "cd", "__MACOSX/archive/train": "xy"}))
    assert set(names(made, "train_set")) == {"a", "b"}
    assert set(names(made, "query_set")) == {"c", "d"}


@pytest.mark.parametrize("flat", [True, False])
def test_distractors_are_searched_and_match_nothing(tmp_path, flat):
    root = tree(tmp_path, {"train": "ab", "query": "cd", "gallery": "cd"})
    draw(*(root / "distractors" / ("" if flat else "c") / f"x{i}.png" for i in range(3)))
    made = module(root)
    assert len(made.gallery_set) == 7
    assert set(names(made, "query_set")) == {"c", "d"}
    assert len(set(names(made, "gallery_set")) - {"c", "d"}) == (3 if flat else 1)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("train", "validation", "extra"), "got 'extra' beside 'train', 'validation'. Rename or move"),
        (("train", "test", "cat"), "got 'cat' beside 'test', 'train'"),
        (("val", "valid", "train"), "Expected one folder of the val images in .* but got 'val', 'valid'"),
        (("test", "Test", "train"), "Expected one folder of the test images in .* but got 'Test', 'test'"),
        (("train", "other"), "got 'other' beside 'train'"),
    ],
)
def test_roles_that_are_not_understood_are_refused_by_name(tmp_path, parts, message):
    with pytest.raises(ValueError, match=message):
        module(tree(tmp_path, dict.fromkeys(parts, "ab")))


@pytest.mark.parametrize(
    "parts",
    [
        ("train_set", "test_set"), ("trainset", "testset"), ("train2017", "val2017"), ("Training-Set", "valid_set"),
        ("train.v2", "test.v2"), ("image_train", "image_query", "image_gallery"), ("my_train", "my_test"),
    ],
)  # fmt: skip
def test_almost_the_names_of_roles_are_refused_and_no_classes(tmp_path, parts):
    for place, part in enumerate(parts):
        for label in range(3):
            draw(tmp_path / part / f"c{place}{label}/0.png")
    with pytest.raises(
        ValueError, match=rf"Expected the folders train, val, .* but got .*{parts[0]}.*\. Rename them\."
    ):
        FolderDataModule(str(tmp_path)).records()


@pytest.mark.parametrize("names", [("test_tube", "flask"), ("train station", "train track"), ("train ", "test ")])
def test_classes_with_such_words_are_classes_and_spaces_make_no_other_name(tmp_path, names):
    for name in names:
        for label in range(2):
            draw(tmp_path / name / f"{label}/0.png")
    labels = {record.label for record in FolderDataModule(str(tmp_path)).records()}
    assert labels == ({"0", "1"} if names[0] == "train " else set(names))


def test_roles_below_the_classes_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"above the class folders, but got them below: '.*cat/test', '.*cat/train'"):
        module(tree(tmp_path, {"cat": ["train", "test"], "dog": ["train", "test"]}))


def test_one_folder_named_like_a_role_inside_a_class_is_a_part_of_the_class(tmp_path):
    draw(tmp_path / "toys/train/1.png", tmp_path / "toys/car/1.png", tmp_path / "pets/1.png")
    assert set(module(tmp_path).classes) == {"pets", "toys"}


@pytest.mark.parametrize("name", ["__MACOSX", "@eaDir", "__pycache__", ".ipynb_checkpoints", "lost+found", "#recycle"])
def test_what_systems_leave_behind_is_ignored_everywhere(tmp_path, name, recwarn):
    root = tree(tmp_path, {".": "abcd"})
    draw(root / name / "a/._0.png", root / name / "9.png", root / "a" / name / "8.png")
    (root / "b/Thumbs.db").write_bytes(b"x")
    made = module(root)
    assert made.classes == ["a", "b", "c", "d"]
    assert len(made.train_set) + len(made.query_set) == 8
    assert not [warning for warning in recwarn if "not used" in str(warning.message)]


def test_links_are_followed_and_loops_end(tmp_path):
    tree(tmp_path / "elsewhere", {"x": "12"})
    root = tree(tmp_path / "root", {".": "abc"})
    (root / "d").symlink_to(tmp_path / "elsewhere/x")
    (root / "a/loop").symlink_to(root)
    (root / "a/self").symlink_to(root / "a")
    made = module(root)
    assert set(made.classes) == {"a", "b", "c", "d"}
    assert len(made.train_set) + len(made.query_set) == 3 * 2 + 4


def test_a_picture_in_two_classes_by_a_link_is_refused_by_name(tmp_path):
    root = tree(tmp_path, {".": "abcd"})
    (root / "a/again").symlink_to(root / "b")
    with pytest.raises(ValueError, match="Expected one class for each image but got 'a' and 'b'"):
        module(root)


def test_what_is_left_out_is_counted_and_named_once(tmp_path):
    root = tree(tmp_path, {".": "abcd"})
    draw(root / "cover.png")
    (root / "a/broken.png").symlink_to(root / "nowhere.png")
    (root / "a/notes.txt").write_text("x")
    (root / "b/phone.heic").write_bytes(b"x")
    with pytest.warns(UserWarning, match="are not used") as warned:
        module(root)
    (said,) = [str(warning.message) for warning in warned if "not used" in str(warning.message)]
    assert said.startswith(f"4 files in {root} are no images of a class and are not used: ")
    for kind in (".png (1)", "(broken link) (1)", ".txt (1)", ".heic (1)"):
        assert kind in said


def test_pictures_without_a_suffix_are_known_by_their_first_bytes(tmp_path):
    root = tree(tmp_path, {".": "abcd"})
    for kind, name in (("PNG", "0a1b"), ("JPEG", "0a1c"), ("WEBP", "0a1d"), ("TIFF", "0a1e")):
        Image.new("RGB", (4, 4)).save(root / "a" / name, format=kind)
    (root / "a/README").write_text("BM is no bitmap, but begins like one")
    (root / "a/LICENSE").write_text("text")
    made = FolderDataModule(str(root), val_fraction=0)
    with pytest.warns(UserWarning, match=r"1 files in .* are not used: \(no suffix\) \(1\)"):
        records = made.records()
    assert sum(record.label == "a" for record in records) == 2 + 4 + 1  # the file that begins like a bitmap too


def test_accents_are_one_class_however_they_are_written(tmp_path):
    draw(tmp_path / "caf\u00e9/1.png", tmp_path / "cafe\u0301/2.png", tmp_path / "x/1.png")
    assert set(module(tmp_path).classes) == {"caf\u00e9", "x"}


def test_nested_folders_have_the_classes_of_training_in_an_index(tmp_path):
    from lightning_memdml.inference.sources import images_at

    root = tree(tmp_path, {"train": "ab", "test": "cd"})
    draw(root / "test/c/deep/er/9.png")
    made = module(root)
    named = images_at(root, lambda image: image)
    expected = {record.path: record.label for record in made.records()}
    assert dict(zip(named.images.paths, named.classes, strict=True)) == expected
