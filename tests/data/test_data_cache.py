"""The pixel cache gives what opening gives, from any process, and never what is no longer true."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import multiprocessing

from lightning_memdml.data.cache import PixelCache
from lightning_memdml.data.images import OpenFiles
from lightning_memdml.data.module import RetrievalDataModule
from lightning_memdml.data.records import Record
from lightning_memdml.data.transforms import Shrink

# Data sets of tests are small.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Training classes with one image only", "ignore:Test classes that are training classes too"
)


def photographs(folder: Path, count: int = 24) -> list[Record]:
    """Noise of several sizes and modes, three of a class; the last third tests."""
    records = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(256, size=(50 + i, 70 - i, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).convert(("RGB", "L")[i % 2])
        image.save(folder / f"{i:02}.png")
        role = "train" if i < 2 * count // 3 else "test"
        records.append(Record(str(folder / f"{i:02}.png"), i // 3, role, (2, 3, 40, 45) if i == 5 else None))
    return records


class Photographs(RetrievalDataModule):
    def __init__(self, folder: Path, **kwargs: Any) -> None:
        options = {"num_workers": 0, "val_fraction": 0, "image_size": 32, "batch_size": 8, "images_per_class": 2}
        super().__init__(**{**options, **kwargs})
        self.listed = photographs(folder) if not any(folder.glob("*.png")) else None
        self.folder = folder

    def records(self) -> Iterator[Record]:
        for i, path in enumerate(sorted(self.folder.glob("*.png"))):
            yield Record(str(path), i // 3, "train" if i < 16 else "test", (2, 3, 40, 45) if i == 5 else None)


class Counted(OpenFiles):
    """Counts in a file how often an image is opened, by whatever process."""

    def __init__(self, records: list[Record], log: Path) -> None:
        super().__init__(records)
        self.log = log

    def __call__(self, row: int) -> Image.Image:
        with self.log.open("a") as file:
            file.write(f"{row}\n")
        return super().__call__(row)


def cache(folder: Path, records: list[Record], max_bytes: int = 10**9) -> tuple[PixelCache, Path]:
    log = folder / "opened.txt"
    log.touch()
    shrink = Shrink(32)
    return PixelCache(Counted(records, log), records, shrink, shrink.side, folder / "cache", max_bytes), log


def opened(log: Path) -> list[int]:
    rows = [int(row) for row in log.read_text().split()]
    log.write_text("")
    return rows


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_with_and_without_it(tmp_path, workers):
    """Bit for bit: cold, warm, and in a later run; training and test."""
    (tmp_path / "images").mkdir()
    plain = Photographs(tmp_path / "images")
    runs = [
        Photographs(tmp_path / "images", num_workers=workers, pixel_cache=str(tmp_path / "cache")) for _ in range(2)
    ]
    for epoch in range(2):
        for loader in ("train_dataloader", "test_dataloader"):
            expected = getattr(plain, loader)()
            for run in runs:
                found = getattr(run, loader)()
                for one, two in zip(expected, found, strict=True):
                    assert all(a.equal(b) for a, b in zip(one, two, strict=True)), (epoch, loader)
    (file,) = (tmp_path / "cache").glob("*.pixels")
    assert file.stat().st_size % 4096 == 0


def test_an_image_is_opened_once_by_all_processes_and_runs(tmp_path):
    records = photographs(tmp_path)
    first, log = cache(tmp_path, records)
    images = [first(row) for row in range(24)]
    assert sorted(opened(log)) == list(range(24))
    again = pickle.loads(pickle.dumps(first))
    later, _ = cache(tmp_path, records)
    for other in (first, again, later):
        assert all(other(row).equal(image) for row, image in enumerate(images))
    assert opened(log) == []
    assert images[5].shape == (3, 40, 37)  # of a box of 42 x 38, its shorter side at 37


def fill(kept: PixelCache, rows: list[int]) -> None:
    for row in rows:
        kept(row)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="starts processes by fork")
def test_processes_that_write_at_the_same_time_leave_the_right_pixels(tmp_path):
    records = photographs(tmp_path)
    kept, log = cache(tmp_path, records)
    rows = list(range(24)) * 20
    processes = [
        multiprocessing.get_context("fork").Process(target=fill, args=(kept, rows[::step])) for step in (1, -1, 1, -1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    opened(log)
    shrink, files = Shrink(32), OpenFiles(records)
    for row in range(24):
        assert kept(row).equal(shrink(files(row).convert("RGB")))
    assert opened(log) == []


def test_a_changed_source_is_opened_anew_and_a_missing_one_is_missed(tmp_path):
    records = photographs(tmp_path)
    kept, log = cache(tmp_path, records)
    fill(kept, list(range(24)))
    opened(log)
    Image.new("RGB", (60, 60), (1, 2, 3)).save(tmp_path / "03.png")
    status = (tmp_path / "04.png").stat()
    os.utime(tmp_path / "04.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    (tmp_path / "07.png").unlink()
    assert kept(3)[:, 0, 0].tolist() == [1, 2, 3]
    kept(4)
    assert opened(log) == [3, 4]
    with pytest.raises(FileNotFoundError):
        kept(7)
    fill(kept, [3, 4])
    assert opened(log) == [7]


@pytest.mark.parametrize("offset", [0, 16, 20, 22, 4096, 7000])
def test_damage_to_the_cache_is_noticed(tmp_path, offset):
    """Wherever a bit is wrong: in the key, the checksum, the height, the width, or the pixels."""
    records = photographs(tmp_path)
    kept, log = cache(tmp_path, records)
    image = kept(0)
    with kept.path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))
    opened(log)
    assert kept(0).equal(image)
    assert opened(log) == [0]
    assert kept(0).equal(image)
    assert opened(log) == []


def test_it_takes_no_more_of_the_disk_than_it_may(tmp_path):
    records = photographs(tmp_path)
    kept, log = cache(tmp_path, records, max_bytes=40_000)
    for _ in range(2):
        fill(kept, list(range(24)))
    assert 0 < kept.taken() <= 40_000
    assert 24 < len(opened(log)) < 48
    other, log = cache(tmp_path, records[:12], max_bytes=kept.taken() + 1)
    fill(other, [0, 0])
    assert opened(log) == [0, 0], "the folder as a whole is bounded"


def test_other_images_boxes_and_sizes_do_not_share_a_file(tmp_path):
    records = photographs(tmp_path)
    shrink = Shrink(32)
    files = {
        PixelCache(OpenFiles(some), some, shrink, side, tmp_path / "cache", 10**9).path
        for some, side in (
            (records, 37),
            (records, 38),
            (records[:-1], 37),
            ([records[0]._replace(box=(0, 0, 9, 9)), *records[1:]], 37),
        )
    }
    assert len(files) == 4


def test_long_images_and_images_inside_archives_are_opened_every_time(tmp_path):
    Image.new("RGB", (300, 40)).save(tmp_path / "long.png")
    records = [Record(str(tmp_path / "long.png"), 0, "train"), Record("archive.npz#1", 0, "train")]
    shrink = Shrink(32)
    kept = PixelCache(lambda row: Image.new("RGB", (300, 40)), records, shrink, shrink.side, tmp_path / "c", 10**9)
    assert kept(0).shape == (3, 37, 277)
    assert isinstance(kept(1), Image.Image)
    assert kept.taken() == 0


def test_a_deleted_cache_is_made_anew(tmp_path):
    records = photographs(tmp_path)
    kept, log = cache(tmp_path, records)
    image = kept(0)
    shutil.rmtree(kept.path.parent)
    assert kept(0).equal(image)  # its map outlives the name
    other, _ = cache(tmp_path, records)
    assert other(0).equal(image)
    assert opened(log) == [0, 0]


def test_verify_reads_the_files_and_not_the_cache(tmp_path):
    (tmp_path / "images").mkdir()
    module = Photographs(tmp_path / "images", pixel_cache=str(tmp_path / "cache"))
    list(module.train_dataloader())
    path = tmp_path / "images/02.png"
    status = path.stat()
    path.write_bytes(path.read_bytes()[:-40] + b"\0" * 40)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert [problem.path for problem in module.verify()] == [str(path)]


def test_a_cache_of_no_bytes_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least 1 byte but got 0"):
        cache(tmp_path, photographs(tmp_path, 3), max_bytes=0)


def test_workers_are_the_cores_of_each_rank_unless_said(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    module = Photographs(tmp_path / "images", num_workers=None)
    for cores, workers in ((1, 1), (6, 6), (64, 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)), raising=False)
        assert module._workers() == workers
    assert Photographs(tmp_path / "images", num_workers=3)._workers() == 3
    assert torch.utils.data.DataLoader is type(Photographs(tmp_path / "images", num_workers=0).test_dataloader())


needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")


@pytest.mark.parametrize(
    "kind", ["symbolic link", "broken link", "hard link", pytest.param("pipe", marks=needs_pipes), "folder"]
)
def test_a_planted_file_is_neither_followed_nor_overwritten(tmp_path, kind):
    records = photographs(tmp_path)
    kept, _ = cache(tmp_path, records)
    kept.path.unlink()
    mine = tmp_path / "mine.txt"
    mine.write_text("precious")
    if kind == "symbolic link":
        kept.path.symlink_to(mine)
    elif kind == "broken link":
        kept.path.symlink_to(tmp_path / "new.txt")
    elif kind == "hard link":
        os.link(mine, kept.path)
    elif kind == "pipe":
        os.mkfifo(kept.path)
    else:
        kept.path.mkdir()
    with pytest.raises(OSError, match=r"pixel cache .*[0-9a-f]{32}\.pixels.*pass another `pixel_cache`|Pass another"):
        cache(tmp_path, records)
    assert mine.read_text() == "precious"
    assert not (tmp_path / "new.txt").exists()


@pytest.mark.parametrize("length", [0, 100, 5000])
def test_a_cache_that_is_cut_while_it_is_open_harms_nothing(tmp_path, length):
    records = photographs(tmp_path)
    kept, _ = cache(tmp_path, records)
    images = [kept(row).clone() for row in range(24)]
    os.truncate(kept.path, length)
    assert all(kept(row).equal(images[row]) for row in range(24))


def test_a_full_disk_is_a_sentence_and_the_images_are_opened(tmp_path, monkeypatch):
    records = photographs(tmp_path)
    kept, _ = cache(tmp_path, records)
    expected = Shrink(32)(OpenFiles(records)(0))

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.warns(UserWarning, match=r"Cannot keep opened images in .*No space left.*free some disk"):
        assert kept(0).equal(expected)
    assert kept(0).equal(expected)
    monkeypatch.setattr(os, "pwrite", lambda *_: 3)
    other, _ = cache(tmp_path, records)
    with pytest.warns(UserWarning, match="the disk is full"):
        assert other(0).equal(expected)
