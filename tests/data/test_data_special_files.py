"""Pipes, names that no table can hold, and HEIC: an answer at once, where a program might wait or break off late."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_memdml.data import FolderDataModule, TableDataModule
from lightning_memdml.data.folders import image_records
from lightning_memdml.data.images import ImageDataset, OpenFiles
from lightning_memdml.data.paths import require_utf8
from lightning_memdml.data.pictures import SUFFIXES, open_picture
from lightning_memdml.data.records import Record
from lightning_memdml.data.table_files import read_parquet
from lightning_memdml.runs import read_checkpoint

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")


def classes(root: Path) -> Path:
    for label in range(4):
        for image in range(2):
            (root / f"c{label}").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (40 * label, 9, 9 * image)).save(root / f"c{label}/{image}.png")
    return root


@needs_pipes
def test_a_named_pipe_in_a_table_is_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    record = Record(str(tmp_path / "pipe.png"), 0, "test")
    images = ImageDataset(OpenFiles([record]), [record.path], torch.zeros(1, dtype=torch.long))
    with pytest.raises(OSError, match=r"Cannot read the image .*pipe.png \(Expected a picture but got a folder, a nam"):
        images.open(0)


@needs_pipes
def test_a_named_pipe_in_a_folder_is_left_out_with_the_other_files(tmp_path: Path) -> None:
    root = classes(tmp_path / "images")
    os.mkfifo(root / "c0/pipe.png")
    os.mkfifo(root / "c0/nosuffix")
    with pytest.warns(UserWarning, match=r"^2 files in .* are no images of a class and are not used"):
        records = image_records(root)
    assert len(records) == 8


@needs_pipes
def test_a_named_pipe_is_no_table_and_no_checkpoint(tmp_path: Path) -> None:
    for name in ("t.csv", "t.parquet", "last.ckpt"):
        os.mkfifo(tmp_path / name)
    for name in ("t.csv", "t.parquet"):
        with pytest.raises(FileNotFoundError, match=f"looked for the file .*{name}"):
            TableDataModule(str(tmp_path / name)).setup()
    with pytest.raises(
        ValueError, match=r"Expected a checkpoint that can be read but got .*last.ckpt, which is no file"
    ):
        read_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "list.parquet").mkdir()
    os.mkfifo(tmp_path / "list.parquet/part-0.parquet")
    with pytest.raises(ValueError, match=r"expected files but .*part-0.parquet is a broken link or a pipe"):
        read_parquet(tmp_path / "list.parquet")


def test_a_folder_named_like_a_picture_is_no_picture(tmp_path: Path) -> None:
    root = classes(tmp_path / "images")
    (root / "c0/2.png").mkdir()
    Image.new("RGB", (8, 8)).save(root / "c0/2.png/inner.png")
    assert len(image_records(root)) == 9  # what lies in it belongs to the class
    with pytest.raises(OSError, match="Expected a picture but got a folder"):
        open_picture(str(root / "c0/2.png"))


def test_names_that_a_table_cannot_hold_are_counted() -> None:
    odd = os.fsdecode(b"caf\xe9.png")
    require_utf8(["a.png", "caf\N{LATIN SMALL LETTER E WITH ACUTE}.png"])
    with pytest.raises(ValueError, match=r"but got caf\\xe9.png and 1 more. Rename these files or folders"):
        require_utf8(["a.png", odd, odd])


# ---------------------------------------------------------------------------- HEIC, with the extra and without


def test_without_the_extra_heic_is_left_out_with_the_way_to_read_it(tmp_path: Path) -> None:
    if find_spec("pillow_heif"):
        pytest.skip("the extra is installed")
    root = classes(tmp_path / "images")
    (root / "c0/phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(OSError, match=r"got HEIC. Install the extra `heic` \(pillow-heif\), or convert the picture"):
        open_picture(str(root / "c0/phone.HEIC"))
    with pytest.warns(UserWarning, match=r"\.HEIC \(1\)\. Install the extra `heic` to read HEIC pictures\.$"):
        assert len(image_records(root)) == 8


@pytest.mark.parametrize("orientation", [None, 6])
def test_with_the_extra_heic_is_read_upright(tmp_path: Path, orientation: int | None) -> None:
    pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed: it is the extra `heic`")
    halves = np.zeros((40, 64, 3), np.uint8)
    halves[:20, :, 0] = halves[20:, :, 2] = 255
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    root = classes(tmp_path / "images")
    pillow_heif.from_bytes("RGB", (64, 40), halves.tobytes()).save(root / "c0/2.heic", exif=exif.tobytes(), quality=95)
    assert {".heic", ".heif"} <= SUFFIXES
    assert len(FolderDataModule(str(root), val_fraction=0).records()) == 9
    picture = np.asarray(open_picture(str(root / "c0/2.heic")), dtype=int)
    red, blue = (picture[2, -3], picture[2, 2]) if orientation else (picture[2, 2], picture[-3, 2])
    assert picture.shape == ((64, 40, 3) if orientation else (40, 64, 3))
    assert abs(red - (255, 0, 0)).max() < 20
    assert abs(blue - (0, 0, 255)).max() < 20


def test_a_damaged_heic_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif", reason="pillow-heif is not installed: it is the extra `heic`")
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(OSError, match="Expected a whole picture but got a damaged HEIC file"):
        open_picture(str(tmp_path / "a.heic"))
