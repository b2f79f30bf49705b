"""Keeps opened images on disk as pixels, so that later epochs neither decode nor shrink them."""

from __future__ import annotations

import errno
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from hashlib import blake2b
from importlib.metadata import version
from io import FileIO
from pathlib import Path
from stat import S_ISREG
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lightning_memdml.data.pictures import upright
from lightning_memdml.data.records import Record

HEADER = struct.Struct("<16sIHH")  # which file it was made of, checksum of the pixels, height, width
PAGE = 4096
FORMAT = 2  # part of the file's name: raise it when the layout changes


class PixelCache:
    """Opens images like the function it is put around, shrinks them, and keeps the pixels in one file.

    Every image has its place in the file, which all processes that read the same list of images share: workers, ranks
    and later runs. An image is taken from the file only if the size and time of its source are unchanged, and the
    checksum of the pixels was right when this process first read them. Otherwise it is opened again. So a changed
    source, a killed run, a full disk, or two writers at once do no harm. The file is sparse: it takes as much of the
    disk as has been written, and all files in the folder together take at most `max_bytes` (processes that write at
    once may exceed it by an image each). Images that find no room, that are more than twice as long as wide, or that
    are no files of their own are opened every time.

    The operating system keeps the pages of the file in memory as long as nothing else needs it. Keep the file on a
    local disk: other machines make their own.

    Args:
        open_image: Function of a row that returns its image.
        records: The records; the image of row `i` is that of `records[i]`.
        shrink: Turns an upright RGB image into a uint8 tensor `(3, H, W)`; always in the same way.
        side: Shorter side of what `shrink` returns.
        folder: Where the file lies; made if it is not there.
        max_bytes: How much of the disk the files in the folder may take together.
        interpolation: How `shrink` resizes.

    Raises:
        ValueError: If `max_bytes` is below 1.
        OSError: If the folder cannot be written to, or another file than a cache has the name of this one.
    """

    def __init__(
        self,
        open_image: Callable[[int], Image.Image | Tensor],
        records: Sequence[Record],
        shrink: Callable[[Any], Tensor],
        side: int,
        folder: Path,
        max_bytes: int,
        interpolation: str = "bilinear",
    ) -> None:
        if max_bytes < 1:
            raise ValueError(
                f"Expected a cache of at least 1 byte but got {max_bytes}. Pass a larger `pixel_cache_gb`."
            )
        self.open_image = open_image
        self.shrink = shrink
        self.paths = [record.path for record in records]
        self.max_bytes = max_bytes
        # All headers lie together: to find that a place is empty must not touch a page for each.
        self.start = _pages(len(records) * HEADER.size)
        self.slot = _pages(6 * side * side)
        self.path = folder / f"{_fingerprint(records, side, interpolation)}.pixels"
        folder.mkdir(parents=True, exist_ok=True)
        self._process: int | None = None
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open file out, of which every process has its own."""
        return {**self.__dict__, "_process": None, "_file": None}

    def __call__(self, row: int) -> Image.Image | Tensor:
        """Return the image of a row, shrunk, `(3, H, W)` uint8."""
        try:
            status = os.stat(self.paths[row])
        except OSError:
            return self.open_image(row)  # which names what is missing, or finds the image in an archive
        source = blake2b(struct.pack("<qq", status.st_mtime_ns, status.st_size), digest_size=16).digest()
        self._open()
        image = self._read(row, source)
        if image is None:
            opened = self.open_image(row)
            image = self.shrink(opened if isinstance(opened, Tensor) else upright(opened))
            self._write(row, source, image)
        return image

    def taken(self) -> int:
        """Return the bytes of the disk that the files in the folder take."""
        return sum(_blocks(file.lstat()) for file in self.path.parent.glob("*.pixels"))

    def _open(self) -> None:
        """Open the file, unless this process has; it is made if it is not there, sparse and with all places."""
        if self._process == os.getpid():
            return
        self._file = _open_own(self.path)
        length = self.start + len(self.paths) * self.slot
        if self._file.seek(0, os.SEEK_END) != length:
            self._file.truncate(length)
        self._sound = bytearray(len(self.paths))
        self._full = False
        self._elsewhere = self.taken() - _blocks(os.fstat(self._file.fileno()))
        self._process = os.getpid()

    def _read(self, row: int, source: bytes) -> Tensor | None:
        # Read, not mapped: if the file is cut or the disk fails, a map would kill the process.
        header = bytearray(HEADER.size)
        if not self._fill(header, row * HEADER.size):
            return None
        written, checksum, height, width = HEADER.unpack(header)
        size = 3 * height * width
        if written != source or not 0 < size <= self.slot:
            return None
        pixels, after = torch.empty(height, width, 3, dtype=torch.uint8), bytearray(HEADER.size)
        content = pixels.numpy().data.cast("B")
        # The checksum, taken once by each process, finds what a crash of the machine left unwritten. The header, which
        # is erased first and written last, finds what was written while it was read.
        if not self._fill(content, self.start + row * self.slot):
            return None
        if not self._sound[row] and zlib.crc32(content) != checksum:
            return None
        if not self._fill(after, row * HEADER.size) or after != header:
            return None
        self._sound[row] = 1
        return pixels.permute(2, 0, 1)

    def _fill(self, buffer: bytearray | memoryview, start: int) -> bool:
        """Fill `buffer` from the file, and return whether the file was long enough."""
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [buffer], start) == len(buffer)
        self._file.seek(start)
        return self._file.readinto(buffer) == len(buffer)

    def _write(self, row: int, source: bytes, image: Tensor) -> None:
        channels, height, width = image.shape
        if self._full or channels != 3 or image.numel() > self.slot:
            return
        if self._elsewhere + _blocks(os.fstat(self._file.fileno())) + _pages(image.numel()) + PAGE > self.max_bytes:
            self._full = True
            return
        pixels = image.permute(1, 2, 0).contiguous().numpy().data.cast("B")
        try:
            self._put(row * HEADER.size, bytes(HEADER.size))
            self._put(self.start + row * self.slot, pixels)
            self._put(row * HEADER.size, HEADER.pack(source, zlib.crc32(pixels), height, width))
        except OSError as error:
            self._full = True
            warnings.warn(
                f"Cannot keep opened images in {self.path} ({error}). Further images are opened every time; free some "
                "disk, or pass another `pixel_cache`.",
                stacklevel=2,
            )

    def _put(self, start: int, content: Any) -> None:
        if hasattr(os, "pwrite"):
            written = os.pwrite(self._file.fileno(), content, start)
        else:
            self._file.seek(start)
            written = self._file.write(content)
        if written != len(content):
            raise OSError("the disk is full")


def _open_own(path: Path) -> FileIO:
    """Open a cache for reading and writing; made if it is not there.

    In a folder that others can write to, the name may have been taken by a link to a file that must not be written.

    Raises:
        OSError: If the name is that of a link, or of no regular file.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    flags |= getattr(os, "O_NONBLOCK", 0)  # a pipe of this name would wait for ever
    advice = "Remove it, or pass another `pixel_cache`."
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink() or error.errno in (errno.ELOOP, errno.ENXIO):
            raise OSError(f"Expected a pixel cache but got a link or a device, {path}. {advice}") from error
        raise OSError(f"Cannot write the pixel cache {path} ({error.strerror}). Pass another `pixel_cache`.") from error
    status = os.fstat(descriptor)
    if not S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise OSError(f"Expected a pixel cache but got a file that has other names too, {path}. {advice}")
    return FileIO(descriptor, "r+")


def _pages(size: int) -> int:
    """Return `size`, rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def _blocks(status: os.stat_result) -> int:
    """Return the bytes a file takes of the disk: of a sparse one what has been written."""
    return 512 * status.st_blocks if hasattr(status, "st_blocks") else status.st_size


def _fingerprint(records: Sequence[Record], side: int, interpolation: str) -> str:
    """Return a name for the pixels of these images: other images, boxes, sizes or decoders have another."""
    resized = f"{side}" if interpolation == "bilinear" else f"{side} {interpolation}"
    digest = blake2b(f"{FORMAT} {resized} {version('pillow')} {version('torchvision')}".encode(), digest_size=16)
    for record in records:
        digest.update(f"\n{os.path.abspath(record.path)} {record.box}".encode(errors="surrogateescape"))
    return digest.hexdigest()
