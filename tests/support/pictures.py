"""Photographs that tests draw."""

from __future__ import annotations

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
