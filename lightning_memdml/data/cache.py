"""Keeps opened images on disk as pixels, so that later epochs neither decode nor shrink them."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from hashlib import blake2b
from importlib.metadata import version
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lightning_memdml.data.pictures import upright
from lightning_memdml.data.records import Record

HEADER = struct.Struct("<16sIHH")  # which file it was made of, checksum of the pixels, height, width
PAGE = 4096
FORMAT = 1  # part of the file's name: raise it when the layout changes


class PixelCache:
    """Opens images like the function it is put around, shrinks them, and keeps the pixels in one file.

    Every image has its place in the file, which all processes that read the same list of images share: workers, ranks
    and later runs. An image is taken from it only if its source has the size and time it had, and the checksum of the
    pixels was right when this process first read them; otherwise it is opened anew. So a changed source, a killed run,
    or two writers at once do no harm. The file is sparse: it takes as much of the disk as has been written, and all
    files in the folder together take at most `max_bytes` (processes that write at once may exceed it by an image each).
    Images that find no room, that are more than twice as long as wide, or that are no files of their own are opened
    every time.

    The pages of the file are kept in memory by the operating system as long as nothing else needs it. Keep it on a
    local disk: other machines make their own.

    Args:
        open_image: Function of a row that returns its image.
        records: The records; the image of row `i` is that of `records[i]`.
        shrink: Turns an upright RGB image into a uint8 tensor `(3, H, W)`; always in the same way.
        side: Shorter side of what `shrink` returns.
        folder: Where the file lies; made if it is not there.
        max_bytes: How much of the disk the files in the folder may take together.

    Raises:
        ValueError: If `max_bytes` is below 1.
        OSError: If the folder cannot be written to.
    """

    def __init__(
        self,
        open_image: Callable[[int], Image.Image | Tensor],
        records: Sequence[Record],
        shrink: Callable[[Any], Tensor],
        side: int,
        folder: Path,
        max_bytes: int,
    ) -> None:
        if max_bytes < 1:
            raise ValueError(f"Expected a cache of at least 1 byte but got {max_bytes}.")
        self.open_image = open_image
        self.shrink = shrink
        self.paths = [record.path for record in records]
        self.max_bytes = max_bytes
        # All headers lie together: to find that a place is empty must not touch a page for each.
        self.start = _pages(len(records) * HEADER.size)
        self.slot = _pages(6 * side * side)
        self.path = folder / f"{_fingerprint(records, side)}.pixels"
        folder.mkdir(parents=True, exist_ok=True)
        self._process: int | None = None
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the map out, of which every process has its own."""
        return {**self.__dict__, "_process": None, "_map": None}

    def __call__(self, row: int) -> Image.Image | Tensor:
        """Return the image of a row, shrunk, `(3, H, W)` uint8."""
        try:
            status = os.stat(self.paths[row])
        except OSError:
            return self.open_image(row)  # which says what is missing, or knows where in an archive the image is
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
        return sum(_blocks(file.stat()) for file in self.path.parent.glob("*.pixels"))

    def _open(self) -> None:
        """Map the file into memory, unless this process has; made if it is not there, sparse and with all places."""
        if self._process == os.getpid():
            return
        length = self.start + len(self.paths) * self.slot
        with self.path.open("ab") as file:
            file.truncate(length)
        with self.path.open("rb") as file:
            self._map = mmap(file.fileno(), length, access=ACCESS_READ)
        self._sound = bytearray(len(self.paths))
        self._full = False
        self._elsewhere = self.taken() - _blocks(self.path.stat())
        self._process = os.getpid()

    def _read(self, row: int, source: bytes) -> Tensor | None:
        header = HEADER.unpack_from(self._map, row * HEADER.size)
        written, checksum, height, width = header
        size = 3 * height * width
        if written != source or not 0 < size <= self.slot:
            return None
        # A copy: the pages under a view could change while it is in use.
        start = self.start + row * self.slot
        with memoryview(self._map) as content:
            pixels = bytearray(content[start : start + size])
        # Checked once by each process: what a crash of the machine left unwritten is told by the checksum, and what is
        # being written while it is read by the header, which goes first and comes last.
        if not self._sound[row] and zlib.crc32(pixels) != checksum:
            return None
        if HEADER.unpack_from(self._map, row * HEADER.size) != header:
            return None
        self._sound[row] = 1
        return torch.frombuffer(pixels, dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)

    def _write(self, row: int, source: bytes, image: Tensor) -> None:
        channels, height, width = image.shape
        if self._full or channels != 3 or image.numel() > self.slot:
            return
        if self._elsewhere + _blocks(self.path.stat()) + _pages(image.numel()) + PAGE > self.max_bytes:
            self._full = True
            return
        pixels = image.permute(1, 2, 0).contiguous().numpy().data.cast("B")
        # Written, not mapped: where a full disk is an error here, it would kill a process that writes to a map.
        try:
            with self.path.open("r+b", buffering=0) as file:
                file.seek(row * HEADER.size)
                file.write(bytes(HEADER.size))
                file.seek(self.start + row * self.slot)
                written = file.write(pixels)
                file.seek(row * HEADER.size)
                file.write(HEADER.pack(source, zlib.crc32(pixels[:written]), height, width))
        except OSError as error:
            self._full = True
            warnings.warn(f"Opened images are no longer kept in {self.path}: {error}.", stacklevel=2)


def _pages(size: int) -> int:
    """Return `size`, rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def _blocks(status: os.stat_result) -> int:
    """Return the bytes a file takes of the disk: of a sparse one what has been written."""
    return 512 * status.st_blocks if hasattr(status, "st_blocks") else status.st_size


def _fingerprint(records: Sequence[Record], side: int) -> str:
    """Return a name for the pixels of these images: other images, boxes, sizes or decoders have another."""
    digest = blake2b(f"{FORMAT} {side} {version('pillow')} {version('torchvision')}".encode(), digest_size=16)
    for record in records:
        digest.update(f"\n{os.path.abspath(record.path)} {record.box}".encode(errors="surrogateescape"))
    return digest.hexdigest()
