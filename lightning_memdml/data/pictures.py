"""Open a picture file: upright, in RGB with 8 bits, read whole, and the file closed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from stat import S_ISREG
from typing import IO, Any

import numpy as np
from PIL import Image

# Pillow can open more than these, but some of it runs other programs (PostScript starts Ghostscript).
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "TIFF",
    "BMP",
    "DIB",
    "GIF",
    "PPM",
    "AVIF",
    "HEIF",
)  # HEIF with the extra `heic`
HEIC_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo"}
    | {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
    | (HEIC_SUFFIXES if find_spec("pillow_heif") else set())
)
MAX_PIXELS = 178_956_970  # 0.5 GB in RGB, where Pillow's own limit stands too
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P4", b"P5", b"P6")


def open_picture(source: str | IO[bytes]) -> Image.Image:
    """Return the picture in a file, upright and in RGB; of several frames or pages, the first.

    Args:
        source: Path of the file, or the file itself. What it contains decides how it is read, not its name.

    Raises:
        OSError: If the file is missing or damaged, is no regular file, or its format is not one of `FORMATS`.
        ValueError: If the picture has too many pixels, or its brightness is not defined.
    """
    if isinstance(source, str) and not S_ISREG(os.stat(source).st_mode):
        # Opening a named pipe would wait for ever.
        raise OSError("Expected a picture but got a folder, a named pipe or a device. Replace it")
    try:
        return _decoded(source)
    except Image.UnidentifiedImageError as error:
        start = _first_bytes(source)
        if _is_heic(start) and "HEIF" not in Image.OPEN and _register_heic():
            return _decoded(source)
        raise OSError(_unknown_format(start)) from error


def _decoded(source: str | IO[bytes]) -> Image.Image:
    with _no_warning_of_exif(), Image.open(source, formats=_formats()) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(
                f"Expected at most {MAX_PIXELS:,} pixels but got {image.width} x {image.height}. Shrink the picture"
            )
        return upright(image)


def _is_heic(start: bytes) -> bool:
    return start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS


def _register_heic() -> bool:
    """Let Pillow open HEIC, and return whether the extra `heic` is installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _formats() -> list[str]:
    if "TIFF" not in Image.OPEN:
        Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _unknown_format(start: bytes) -> str:
    if _is_heic(start):
        if "HEIF" in Image.OPEN:
            return "Expected a whole picture but got a damaged HEIC file. Replace it"
        return (
            "Expected a picture that Pillow can open but got HEIC. Install the extra `heic` (pillow-heif), or convert "
            "the picture to JPEG"
        )
    got = f"a file that begins with {start!r}" if start else "an empty file"
    return f"Expected a picture ({', '.join(FORMATS[:-1])}) but got {got}. Replace it"


def _first_bytes(source: str | IO[bytes]) -> bytes:
    if isinstance(source, str):
        with open(source, "rb") as file:
            return file.read(12)
    source.seek(0)
    return source.read(12)


def looks_like_a_picture(path: str) -> bool:
    """Return whether a file begins as pictures do: for files whose names have no suffix."""
    try:
        start = _first_bytes(path)
    except OSError:
        return False
    return (
        start.startswith(BEGINNINGS) or start[8:12] == b"WEBP" or start[4:12] == b"ftypavif"
        or (_is_heic(start) and HEIC_SUFFIXES <= SUFFIXES)
    )  # fmt: skip


def upright(image: Image.Image) -> Image.Image:
    """Return `image` in RGB with 8 bits, turned as its EXIF orientation demands.

    A second call changes nothing. Transparent parts become white, whatever colour they hide.

    Raises:
        ValueError: If the brightness of the pixels is not defined (floats beyond [0, 1], 32-bit integers).
    """
    image.load()
    turn = TURNS.get(_orientation(image))
    picture = _rgb(image)
    if turn is None:
        return picture
    picture = picture.transpose(turn)
    picture.info = {}  # with the orientation, by which a second call would turn the picture again
    return picture


@contextmanager
def _no_warning_of_exif() -> Iterator[None]:
    """Hide Pillow's warning about a damaged EXIF block, which is read as upright."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)
        yield


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) where none can be read."""
    try:
        value: Any = image.getexif().get(ORIENTATION, 1)
        return int(value[0] if isinstance(value, tuple) else value)
    except Exception:  # of a damaged EXIF block Pillow raises nearly every type there is; the pixels are unharmed
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    colours = image.convert("RGBA")
    opacity = colours.getchannel("A")
    if opacity.getextrema()[0] == 255:
        return colours.convert("RGB")
    picture = Image.new("RGB", image.size, "white")
    picture.paste(colours.convert("RGB"), mask=opacity)
    return picture


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Return grey pixels `(H, W)` uint8 of a picture with more than 8 bits."""
    pixels = np.asarray(image)
    tags: Any = getattr(image, "tag_v2", {})
    if image.mode == "F":
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # NaN is neither
            raise ValueError(
                f"Expected floats in [0, 1] (mode F) but got {pixels.min():g} to {pixels.max():g}. Save the picture "
                "with 8 or 16 bits"
            )
        return (255 * pixels).round().astype(np.uint8)
    if image.mode == "I" and image.format == "TIFF":
        raise ValueError(
            f"Expected 8 or 16 bits a pixel but got 32-bit integers (mode I) of {pixels.min()} to {pixels.max()}. "
            "Save the picture with 8 or 16 bits"
        )
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    if not 8 < bits <= 16:
        bits = 16
    grey = (pixels.clip(0, 2**bits - 1) / ((2**bits - 1) / 255)).round().astype(np.uint8)
    return 255 - grey if tags.get(PHOTOMETRIC) == 0 else grey  # 0: the largest number is black


def crop(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """Return the part of `image` inside `box`; what lies outside the image is left out.

    Raises:
        ValueError: If no pixel of the image lies inside the box.

    Example:
        >>> crop(Image.new("RGB", (10, 10)), (5, 5, 20, 8)).size
        (5, 3)
    """
    width, height = image.size
    edges = [round(min(max(edge, 0), limit)) for edge, limit in zip(box, (width, height) * 2, strict=True)]
    left, upper, right, lower = edges
    if left >= right or upper >= lower:
        raise ValueError(f"Expected a box inside the {width} x {height} image but got {box}. Correct the box")
    return image.crop((left, upper, right, lower))
