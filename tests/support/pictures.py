"""Photographs that tests draw."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def draw_pictures(folder: Path) -> None:
    """Draw four pictures of different sizes in each of eight folders, one per class."""
    generator = np.random.default_rng(0)
    for label in range(8):
        (folder / str(label)).mkdir(parents=True)
        for number in range(4):
            blocks = generator.integers(0, 255, (5, 7, 3), dtype=np.uint8)
            Image.fromarray(blocks).resize((70 + 5 * number, 50)).save(folder / str(label) / f"{number}.png")


def draw_archive(path: Path, classes: int = 14, images: int = 3) -> None:
    """Draw pictures of one colour into an archive of JPEG files, as `TableDataModule` reads it."""
    files = []
    for index in range(classes * images):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 36), (17 * (index // images), 80, 5 * index)).save(buffer, "JPEG")
        files.append(np.frombuffer(buffer.getvalue(), dtype=np.uint8))
    offset = np.cumsum([0, *(len(file) for file in files)])
    np.savez(path, jpeg=np.concatenate(files), offset=offset, label=np.repeat(np.arange(classes), images))
