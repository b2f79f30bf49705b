"""Images come out upright and in RGB, with a clear error for those that do not come out."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import PILToTensor

from lightning_memdml.data.images import ImageDataset, OpenFiles, TensorImageDataset, draw_seeded
from lightning_memdml.data.paths import inside
from lightning_memdml.data.pictures import crop
from lightning_memdml.data.records import Record, split_classes
from lightning_memdml.data.transforms import EvaluationTransform, TrainingTransform


def data_set(*records: Record) -> ImageDataset:
    paths = [record.path for record in records]
    return ImageDataset(OpenFiles(records), paths, torch.arange(len(records)))


def halves(width: int = 40, height: int = 20) -> Image.Image:
    """A picture, red on its left and blue on its right."""
    image = Image.new("RGB", (width, height), (255, 0, 0))
    image.paste((0, 0, 255), (width // 2, 0, width, height))
    return image


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new(mode, (5, 4)).save(path)
    image, _, _ = data_set(Record(str(path), 0, "train"))[0]
    assert (image.mode, image.size) == ("RGB", (5, 4))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_exif_orientation_turns_the_image(tmp_path, suffix):
    path = tmp_path / f"turned{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise: left becomes top
    halves().save(path, exif=exif)
    image = data_set(Record(str(path), 0, "train")).picture(0)
    assert image.size == (20, 40)
    assert image.getpixel((10, 5))[0] > 200
    assert image.getpixel((10, 35))[2] > 200


def test_a_box_is_cut_from_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    halves().save(tmp_path / "turned.jpg", exif=exif)
    image = data_set(Record(str(tmp_path / "turned.jpg"), 0, "train", box=(2, 24, 12, 99))).picture(0)
    assert image.size == (10, 16)
    assert image.getpixel((5, 8))[2] > 200


@pytest.mark.parametrize("box", [(0, 0, 0, 5), (8, 0, 4, 5), (20, 0, 30, 5), (-9, -9, 0, 0)])
def test_a_box_without_pixels_is_an_error(box):
    with pytest.raises(ValueError, match="box inside the 10 x 10 image"):
        crop(Image.new("RGB", (10, 10)), box)


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lost\.jpg does not exist"):
        data_set(Record(str(tmp_path / "lost.jpg"), 0, "train"))[0]


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "box"])
def test_a_damaged_image_is_named(tmp_path, damage):
    buffer = io.BytesIO()
    halves(200, 200).save(buffer, "JPEG")
    content = {"empty": b"", "text": b"no image", "cut": buffer.getvalue()[:-600], "box": buffer.getvalue()}[damage]
    (tmp_path / "bad.jpg").write_bytes(content)
    box = (300.0, 300.0, 400.0, 400.0) if damage == "box" else None
    with pytest.raises(OSError, match=r"Cannot read the image .*bad\.jpg \(.+\)"):
        data_set(Record(str(tmp_path / "bad.jpg"), 0, "train", box))[0]


def test_a_part_keeps_labels_paths_and_given_indices():
    pixels = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1)
    whole = TensorImageDataset(pixels, list("abcde"), torch.tensor([9, 8, 7, 6, 5]))
    part = whole.part(torch.tensor([4, 1]), None).part(torch.tensor([1]), torch.neg, torch.tensor([77]))
    image, label, index = part[0]
    assert (int(image), label, index, part.paths, part.labels.tolist()) == (255, 8, 77, ["b"], [8])
    images, labels, indices = part.get_batch([0, 0], [1, 2])
    assert (images.flatten().tolist(), labels.tolist(), indices.tolist()) == ([255, 255], [8, 8], [77, 77])
    assert len(whole) == 5


@pytest.mark.parametrize("transform", [TrainingTransform(16), EvaluationTransform(16), None])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_is_what_its_samples_are(tmp_path, transform, workers):
    """Bit for bit, whether it is put together at once or sample by sample, here or in a worker."""
    records = [Record(str(tmp_path / f"{i}.png"), i, "train") for i in range(4)]
    for i, record in enumerate(records):
        noise = np.random.default_rng(i).integers(256, size=(30, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(record.path)
    images = data_set(*records).part(torch.tensor([3, 1, 2]), transform or PILToTensor(), torch.tensor([7, 8, 9]))
    expected = draw_seeded(images, [2, 0, 0], [5, 6, 7])
    (found,) = DataLoader(Batches(images), batch_size=None, num_workers=workers)
    assert all(one.equal(two) for one, two in zip(expected, found, strict=True))
    assert found[1].tolist() == [2, 3, 3]
    assert found[2].tolist() == [9, 7, 7]
    assert found[0].is_shared() == bool(workers)
    if transform is not None:
        assert found[0].dtype == torch.float32


class Batches(torch.utils.data.Dataset):
    """One batch of draws."""

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return 1

    def __getitem__(self, number: int) -> object:
        return self.images.get_batch([2, 0, 0], [5, 6, 7])


def test_data_sets_can_be_sent_to_spawned_workers(tmp_path):
    halves().save(tmp_path / "a.png")
    files = pickle.loads(pickle.dumps(data_set(Record(str(tmp_path / "a.png"), 0, "train"))))
    memory = TensorImageDataset(torch.ones(1, 1, 2, 2, dtype=torch.uint8), ["a"], torch.tensor([0]))
    assert files.picture(0).size == (40, 20)
    assert pickle.loads(pickle.dumps(memory)).picture(0).getpixel((0, 0)) == 1


def test_labels_and_paths_must_agree():
    with pytest.raises(ValueError, match="2 paths and 1 labels"):
        ImageDataset(halves, ["a", "b"], torch.tensor([0]))


@given(st.text(st.sampled_from("ab./\\:C \0é"), max_size=12))
@example("/etc/passwd")
@example("\\\\host\\share\\x.jpg")
@example("C:\\x.jpg")
@example("C:x.jpg")
@example("a/../../x.jpg")
@example("a\\..\\..\\x.jpg")
@example("..")
@example("")
def test_no_listed_path_leads_out_of_the_root(relative):
    root = Path("/data/images")
    try:
        path = inside(root, relative, "list, row 3")
    except ValueError as error:
        message = str(error)
        path = "/data/images/refused"
    else:
        message = "list, row 3: expected a path below /data/images but got "
    parts = Path(path).parts
    assert message.startswith("list, row 3: expected a path below /data/images but got ")
    assert parts[:3] == root.parts
    assert len(parts) > 3
    assert ".." not in parts
    assert "\0" not in path


def test_usual_listed_paths_are_accepted():
    assert inside(Path("root"), "img/MEN/id_1/02_1 front.jpg", "") == "root/img/MEN/id_1/02_1 front.jpg"
    assert inside(Path("root"), "img\\MEN\\1..jpg", "") == "root/img/MEN/1..jpg"


def test_a_wrong_class_split_is_named():
    with pytest.raises(ValueError, match="halves, alternate but got 'thirds'"):
        split_classes([], [], "thirds")
