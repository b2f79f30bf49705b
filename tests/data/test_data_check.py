"""`memdml data check` tells what a data set holds, what is wrong, and shows it; one command, no surprise."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_memdml.cli import main
from lightning_memdml.data import FolderDataModule, InShop
from lightning_memdml.data.checking import CELL, GAP, LABEL, TITLE, contact_sheet

_spec = importlib.util.spec_from_file_location("trees", Path(__file__).with_name("trees.py"))
trees = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trees)
pytestmark = pytest.mark.filterwarnings("ignore:.*Scores are not comparable")


def folders(root: Path, classes: int = 6) -> Path:
    for label in range(classes):
        for image in range(label + 2):
            trees.draw(root / f"class{label}/{image}.png", label, image)
    return root


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, int]:
    code = 0
    try:
        main(["data", "check", *arguments])
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    return capsys.readouterr().out, code


@pytest.mark.filterwarnings("ignore:.* are no images of a class")
def test_a_sound_data_set_is_described(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = folders(tmp_path / "images")
    (root / "notes.txt").write_text("12345")
    said, code = check(capsys, "--data", "FolderDataModule", "--data.root", str(root), "--data.val_fraction", "0")
    assert code == 0
    assert f"FolderDataModule in {root}\n  class0/ (2 files)\n" in said
    assert "  notes.txt (5 bytes)\n" in said
    assert "train: 9 images of 3 classes, 2 to 4 images per class, median 3\n" in said
    assert "  2 training classes have less than 4 images; a batch repeats images of these evenly\n" in said
    assert "test, both query and gallery: 18 images of 3 classes, 5 to 7 images per class, median 6\n" in said
    assert "no problems\ncontact sheet: runs/data_check/FolderDataModule.png\n" in said
    assert [path.name for path in (tmp_path / "runs/data_check").iterdir()] == ["FolderDataModule.png"]


def test_problems_are_counted_and_the_first_named(tmp_path, capsys):
    root = trees.in_shop(tmp_path / "shop", train=8, test=4, images=4)
    files = sorted(root.rglob("*.jpg"))
    for file in files[:12]:
        file.unlink()
    files[12].write_bytes(b"")
    said, code = check(
        capsys,
        "--data",
        "InShop",
        "--data.root",
        str(root),
        "--output",
        str(tmp_path / "out"),
        "--data.num_workers",
        "1",
    )
    assert code == 1
    assert "16 problems\n  " in said  # 3 counts, 12 missing, 1 empty
    assert "expected 14,218 query images of 3,985 classes but found 8 query images of 4 classes" in said
    assert "No such file or directory" in said
    shown = said.partition("16 problems\n")[2].splitlines()
    assert all(line.startswith(f"  {root}") for line in shown[:10])
    assert shown[10].startswith("  ...; most often: [Errno 2] No such file or directory (12), ")
    said, code = check(
        capsys,
        "--data",
        "InShop",
        "--data.root",
        str(root),
        "--output",
        str(tmp_path / "out"),
        "--open_images",
        "false",
    )
    assert code == 1
    assert "3 problems\n" in said


def test_the_contact_sheet_shows_a_column_per_class_and_marks_what_cannot_be_read(tmp_path):
    root = trees.in_shop(tmp_path)
    data = InShop(str(root), num_workers=0, val_fraction=0)
    data.setup()
    Path(data.train_set.paths[0]).write_bytes(b"")
    sheet = contact_sheet(data)
    height = TITLE + LABEL + 3 * (CELL + GAP) + GAP
    assert sheet.size == (GAP + 8 * (CELL + GAP), 3 * height)

    def middle(row: int, column: int, part: int) -> tuple[int, ...]:
        # left of the middle, where no word stands
        return sheet.getpixel(
            (GAP + column * (CELL + GAP) + 4, part * height + TITLE + LABEL + row * (CELL + GAP) + CELL // 2)
        )

    assert middle(0, 0, 0) == (255, 255, 255), "an image that cannot be read"
    shown = data.train_set.picture(4)  # the first of the second class
    assert isinstance(shown, Image.Image)
    expected = shown.getpixel((5, 20))
    assert all(abs(a - b) < 12 for a, b in zip(middle(0, 1, 0), expected, strict=True))
    assert middle(0, 3, 2) != (255, 255, 255), "the gallery's fourth class"
    assert middle(0, 4, 2) == (255, 255, 255), "the gallery has four"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data"], "Expected `memdml data check` but got `memdml data`. `memdml data check --help` describes it."),
        (["data", "chek"], "Expected `memdml data check` but got `memdml data chek`. `memdml data check --help` desc"),
        (["data", "check", "--data", "CUB200", "--data.root", "nowhere"], r"CUB200 looked for /.*/nowhere/images\.txt"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"error: {message}"):
        main(arguments)


def test_a_data_set_without_images_is_an_error(tmp_path):
    (tmp_path / "list.csv").write_text("path,label,split\n")
    with pytest.raises(SystemExit, match=r"error: .*list.csv has no row"):
        main(["data", "check", "--data", "TableDataModule", "--data.path", str(tmp_path / "list.csv")])


def test_one_class_can_be_tested_on_alone(tmp_path, capsys):
    said, code = check(capsys, "--data=FolderDataModule", f"--data.root={folders(tmp_path / 'one', classes=1)}")
    assert code == 0
    assert "test, both query and gallery: 2 images of 1 classes" in said
    assert "train: no images, so that it can be tested on, but not trained on\n" in said
    with pytest.raises(ValueError, match="FolderDataModule has no train images, but 2 test images of 1 class"):
        FolderDataModule(root=str(tmp_path / "one")).train_dataloader()


def test_features_have_no_contact_sheet(tmp_path, capsys):
    labels = np.arange(40) // 4
    np.savez(tmp_path / "f.npz", feature=np.ones((40, 2, 8), np.float16), label=labels, train=labels < 5)
    arguments = ["--data=FeatureDataModule", f"--data.path={tmp_path}/f.npz", f"--output={tmp_path}/sheet"]
    said, code = check(capsys, *arguments, "--data.val_fraction=0")
    assert code == 0
    assert "no problems\nno contact sheet: FeatureDataModule has features and no pictures\n" in said
    assert not (tmp_path / "sheet").exists()


def test_a_misspelt_class_gets_the_nearest_name(capsys):
    with pytest.raises(SystemExit):
        main(["data", "check", "--data", "CUB20", "--data.root", "x"])
    assert "There is no class 'CUB20'. Did you mean 'CUB200'?" in capsys.readouterr().err


def test_a_data_module_of_ones_own_can_be_checked(tmp_path):
    data = FolderDataModule(root=str(folders(tmp_path)), val_fraction=0)
    assert data.count_problems() == []
    assert contact_sheet(data).height == 2 * (TITLE + LABEL + 3 * (CELL + GAP) + GAP)
