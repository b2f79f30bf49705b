"""Pictures as people have them: the right brightness, colours and orientation, or an error that names the file."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, PngImagePlugin, features

from lightning_memdml.data.checking import contact_sheet
from lightning_memdml.data.folder import FolderDataModule
from lightning_memdml.data.images import ImageDataset, OpenFiles
from lightning_memdml.data.pictures import open_picture, upright
from lightning_memdml.data.records import Record
from lightning_memdml.data.transforms import EvaluationTransform, Shrink, TrainingTransform, cut_length

RAMP = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)


def opened(path: Path, box: tuple[float, float, float, float] | None = None) -> Image.Image:
    record = Record(str(path), 0, "test", box)
    picture = ImageDataset(OpenFiles([record]), [record.path], torch.zeros(1, dtype=torch.long)).open(0)
    assert isinstance(picture, Image.Image)
    assert picture.mode == "RGB"
    return picture


def mean(path: Path) -> float:
    return float(np.asarray(opened(path)).mean())


def tiff(*entries: tuple[int, int, int, bytes], content: bytes = b"") -> bytes:
    """A little-endian TIFF of one directory: (tag, type, count, four bytes), and the content behind it."""
    body = b"".join(struct.pack("<HHL", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"II*\0" + struct.pack("<LH", 8, len(entries)) + body + struct.pack("<L", 0) + content


def grey_tiff(content: bytes, width: int, height: int, bits: int, photometric: int = 1) -> bytes:
    def short(tag: int, value: int) -> tuple[int, int, int, bytes]:
        return tag, 3, 1, struct.pack("<HH", value, 0)

    start, length = 8 + 2 + 9 * 12 + 4, len(content)
    return tiff(
        short(256, width),
        short(257, height),
        short(258, bits),
        short(259, 1),
        short(262, photometric),
        (273, 4, 1, struct.pack("<L", start)),
        short(277, 1),
        short(278, height),
        (279, 4, 1, struct.pack("<L", length)),
        content=content,
    )


# ---------------------------------------------------------------------------- orientation


TURNED = (0x112, 3, 1, struct.pack("<HH", 6, 0))


@pytest.mark.parametrize(
    "entries",
    [
        (TURNED, (0x11A, 2, 4, b"72\0\0")),  # XResolution as text
        (TURNED, (0x128, 11, 1, struct.pack("<f", 2.0))),  # ResolutionUnit as a float
        (TURNED, (0x213, 8, 1, struct.pack("<hh", -1, 0))),  # YCbCrPositioning negative
        ((0x100, 2, 4, b"abc\0"), TURNED),  # ImageWidth as text
        (TURNED, (0x132, 7, 4, b"\xff\xfe\0\1")),  # DateTime as bytes
        (TURNED, (0x8769, 4, 1, struct.pack("<L", 4_000_000_000))),  # a directory far behind the end
        ((0x112, 4, 1, struct.pack("<L", 6)),),  # the orientation as a long integer
    ],
)
def test_a_picture_is_turned_where_the_orientation_can_be_read(tmp_path, entries):
    picture = Image.new("RGB", (64, 40), "blue")
    picture.paste("red", (0, 0, 32, 40))
    picture.save(tmp_path / "a.jpg", exif=b"Exif\0\0" + tiff(*entries))
    turned = opened(tmp_path / "a.jpg")
    assert turned.size == (40, 64)
    assert turned.getpixel((20, 10))[0] > 200
    assert upright(turned).size == (40, 64), "a second call turns it no further"


@pytest.mark.parametrize("value", [0, 9, 99, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path, value):
    block = b"Exif\0\0" + tiff((0x112, 3, 1, struct.pack("<HH", value, 0)))
    Image.new("RGB", (64, 40)).save(tmp_path / "a.jpg", exif=block)
    assert opened(tmp_path / "a.jpg").size == (64, 40)


@pytest.mark.parametrize("block", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"II*\0"])
@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_block_that_is_no_exif_harms_nothing(tmp_path, block, suffix):
    Image.new("RGB", (64, 40)).save(tmp_path / f"a.{suffix}", exif=block)
    assert opened(tmp_path / f"a.{suffix}").size == (64, 40)


def test_a_raw_profile_that_is_no_hexadecimal_text_harms_nothing(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n  10\nzzzz")
    Image.new("RGB", (64, 40)).save(tmp_path / "a.png", pnginfo=text)
    assert opened(tmp_path / "a.png").size == (64, 40)


# ---------------------------------------------------------------------------- brightness


@pytest.mark.parametrize(
    "pixels",
    [RAMP, (65535 * RAMP).astype(np.uint16), (65535 * RAMP).astype(">u2"), (255 * RAMP).round().astype(np.uint8)],
    ids=["float", "16 bits", "16 bits, big-endian", "8 bits"],
)
def test_grey_of_any_depth_keeps_its_brightness(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    assert abs(mean(tmp_path / "a.tif") - 127.5) < 0.6


@pytest.mark.parametrize("suffix", ["png", "pgm"])
def test_16_bits_outside_tiff_are_a_picture_however_dark(tmp_path, suffix):
    pixels = (200 * RAMP).astype(np.uint16)
    if suffix == "png":
        Image.fromarray(pixels).save(tmp_path / "a.png")
    else:  # which older versions of Pillow read, but do not write
        (tmp_path / "a.pgm").write_bytes(b"P5 64 64 65535\n" + pixels.astype(">u2").tobytes())
    assert mean(tmp_path / f"a.{suffix}") < 1


def test_12_bits_are_spread_over_their_own_range(tmp_path):
    packed = bytes([0xFF, 0xFF, 0xFF]) * 8 * 8  # two pixels of 4095 in three bytes
    (tmp_path / "a.tif").write_bytes(grey_tiff(packed, 16, 8, bits=12))
    assert mean(tmp_path / "a.tif") == 255


@pytest.mark.parametrize("bits", [8, 16])
def test_white_may_be_zero(tmp_path, bits):
    (tmp_path / "a.tif").write_bytes(grey_tiff(bytes(8 * 8 * bits // 8), 8, 8, bits, photometric=0))
    assert mean(tmp_path / "a.tif") == 255


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (255 * RAMP, r"floats in \[0, 1\] \(mode F\) but got 0 to 255\. Save the picture with 8 or 16 bits"),
        (65535 * RAMP, r"mode F\) but got 0 to 65535"),
        (RAMP - 0.5, r"mode F\) but got -0\.5 to 0\.5"),
        (np.where(RAMP > 0.9, np.float32(np.nan), RAMP), r"mode F\) but got nan"),
        (np.where(RAMP > 0.9, np.float32(np.inf), RAMP), r"mode F\) but got 0 to inf"),
        ((255 * RAMP).astype(np.int32), r"32-bit integers \(mode I\) of 0 to 255\. Save the picture"),
    ],
)
def test_brightness_that_nobody_can_know_is_refused_with_the_path(tmp_path, pixels, message):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(OSError, match=rf"a\.tif \(Expected .*{message}"):
        opened(tmp_path / "a.tif")


# ---------------------------------------------------------------------------- colours and transparency


def hidden(seed: int) -> np.ndarray:
    """A red square on a background of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 32, 4), dtype=np.uint8)
    pixels[8:24, 8:24, :3] = (200, 50, 50)
    pixels[..., 3] = 0
    pixels[8:24, 8:24, 3] = 255
    return pixels


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_what_is_transparent_is_white_whatever_colour_it_hides(tmp_path, mode, suffix):
    if mode == "PA" and suffix != "tif":
        pytest.skip("only TIFF stores a palette with transparency of each pixel")
    pictures = []
    for seed in (0, 1):
        picture = Image.fromarray(hidden(seed))
        if mode == "LA":
            picture = picture.convert("LA")
        if mode == "PA":
            picture = picture.convert("RGBA").quantize(8).convert("PA")
            picture.putalpha(Image.fromarray(hidden(seed)[..., 3]))
        picture.save(tmp_path / f"{seed}.{suffix}", **({"lossless": True, "exact": True} if suffix == "webp" else {}))
        pictures.append(np.asarray(opened(tmp_path / f"{seed}.{suffix}")))
    assert (pictures[0][:8] == 255).all()
    assert np.array_equal(pictures[0][:8], pictures[1][:8])
    assert (pictures[0][12, 12] < 255).any()


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_one_colour_may_be_transparent(tmp_path, mode):
    picture = Image.new(mode, (8, 8), 0 if mode != "RGB" else (0, 0, 0))
    if mode == "P":
        picture.putpalette([10, 20, 30] * 256)
    picture.save(tmp_path / "a.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert opened(tmp_path / "a.png").getpixel((3, 3)) == (255, 255, 255)


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 128)).save(tmp_path / "a.png")
    assert abs(opened(tmp_path / "a.png").getpixel((3, 3))[0] - 127) <= 1


def open_files() -> int:
    """How many files this process has open; 0 where the system does not tell."""
    listed = Path("/proc/self/fd")
    return len(os.listdir(listed)) if listed.is_dir() else 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [("m.jpg", "MPO"), ("g.gif", "GIF"), ("t.tif", "TIFF"), ("w.webp", "WEBP"), ("p.png", "PNG")],
)
def test_the_first_frame_of_several_is_taken_and_the_file_closed(tmp_path, name, kind):
    if kind == "MPO" and PIL.__version__.startswith("10."):
        pytest.skip("Pillow 10 writes small MPO files that it cannot read")
    frames = [Image.new("RGB", (64, 64), (80 * i, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / name, format=kind, save_all=True, append_images=frames[1:])
    before = open_files()
    kept = [opened(tmp_path / name) for _ in range(3)]
    assert open_files() == before
    assert max(kept[0].getpixel((3, 3))) < 8


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow cannot read AVIF")
def test_avif_is_read_and_a_folder_takes_it(tmp_path):
    for name in "abcd":
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32), "red").save(tmp_path / name / "1.avif")
    made = FolderDataModule(str(tmp_path), val_fraction=0)
    assert {Path(record.path).suffix for record in made.records()} == {".avif"}
    assert opened(tmp_path / "a/1.avif").getpixel((3, 3))[0] > 240


# ---------------------------------------------------------------------------- what is not read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
            "HEIC",
        ),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "begins with b'%!PS-Adobe-3'"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "that begins with b"),
        (b"8BPS\0\1" + bytes(40), "begins with b'8BPS"),
        (b"version https://git-lfs.github.com/spec/v1\n", "begins with b'version http'"),
        (b"", "an empty file"),
    ],
    ids=["HEIC", "PostScript", "SVG", "Photoshop", "a pointer of Git LFS", "nothing"],
)
def test_other_formats_are_named_and_no_other_program_is_started(tmp_path, monkeypatch, content, message):
    program = tmp_path / "bin/gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(OSError, match=r"a\.jpg \(Expected a picture") as caught:
        opened(tmp_path / "a.jpg")
    assert message.strip() in str(caught.value)
    assert not (tmp_path / "started").exists()


def test_a_picture_of_too_many_pixels_is_refused_with_the_path(tmp_path):
    Image.new("1", (20_000, 10_000)).save(tmp_path / "a.png")  # 25 kB
    with pytest.raises(OSError, match=r"a\.png \(.*200000000 pixels"):
        opened(tmp_path / "a.png")
    Image.new("1", (14_000, 13_000)).save(tmp_path / "b.png")
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # as many programs set it
    try:
        with pytest.raises(OSError, match=r"b\.png \(Expected at most 178,956,970 pixels but got 14000 x 13000"):
            opened(tmp_path / "b.png")
    finally:
        Image.MAX_IMAGE_PIXELS = limit


# ---------------------------------------------------------------------------- thin pictures


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (2, 2000), (1, 2000)])
@pytest.mark.parametrize("transform", [EvaluationTransform(224), TrainingTransform(224)])
def test_a_thin_picture_costs_megabytes(size, transform):
    picture = Image.new("RGB", size, "red")
    tracemalloc.start()
    assert Shrink(224)(picture).numel() <= 3 * 256 * 32 * 256
    assert transform(picture).shape == (3, 224, 224)
    tracemalloc.stop()


def test_a_thin_box_costs_no_more(tmp_path):
    Image.new("RGB", (300, 4000)).save(tmp_path / "a.png")
    assert opened(tmp_path / "a.png", box=(7, 0, 8, 4000)).size == (1, 4000)
    assert Shrink(224)(opened(tmp_path / "a.png", box=(7, 0, 8, 4000))).shape == (3, 32 * 256, 256)


@pytest.mark.parametrize("size", [(40, 40 * 40), (41, 41 * 34), (3, 120)])
def test_the_middle_is_what_it_was(size):
    """The test transform sees the same pixels as without the cut."""
    pixels = torch.randint(256, (3, size[1], size[0]), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = EvaluationTransform(64)
    whole = transform.transforms[1](transform.transforms[0].transforms[1](pixels))
    cut = transform.transforms[1](transform.transforms[0].transforms[1](cut_length(pixels)))
    assert (whole.int() - cut.int()).abs().max() <= 1


@pytest.mark.parametrize("shape", [(3, 10, 320), (3, 320, 10), (3, 5, 5)])
def test_pictures_up_to_32_times_as_long_as_wide_are_left_whole(shape):
    picture = torch.zeros(shape)
    assert cut_length(picture) is picture


def test_a_contact_sheet_shows_thin_and_unreadable_pictures(tmp_path):
    for label in "abcd":
        (tmp_path / label).mkdir()
        Image.new("RGB", (1, 3000)).save(tmp_path / label / "1.png")
        (tmp_path / label / "2.png").write_bytes(b"no picture")
    made = FolderDataModule(str(tmp_path), val_fraction=0)
    assert contact_sheet(made).size[0] > 0


def test_a_file_object_can_be_opened_twice(tmp_path):
    Image.new("RGB", (9, 8)).save(tmp_path / "a.png")
    with (tmp_path / "a.png").open("rb") as file:
        assert open_picture(file).size == (9, 8)
