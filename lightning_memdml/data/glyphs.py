"""The embedded data set: characters in many fonts. Nothing is downloaded; the fonts ship inside matplotlib."""

from __future__ import annotations

import os
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

from lightning_memdml.atomic_write import atomic_write
from lightning_memdml.data import transforms
from lightning_memdml.data.module import RetrievalDataModule
from lightning_memdml.data.paths import local_path
from lightning_memdml.data.records import Record

CATEGORIES = ("Lu", "Ll", "Lo", "Nd")  # Unicode's capital, small and other letters, and digits
MIN_FACES = 12  # a character is used if so many fonts have it
LOOK_ALIKE = 0.96  # cosine of two characters, each stretched to a square, from which they count as one
VERSION = 1  # part of the cache's name: raise it when the pictures change


class GlyphDataModule(RetrievalDataModule):
    """Characters of many scripts, drawn in the 16 DejaVu and STIX faces that ship with matplotlib.

    1,052 letters and digits that at least 12 faces have, 12 pictures each: another face every time, bent a little.
    Of characters that look alike (Latin A and Greek Alpha, 0 and o) only the first is used. The network trains on 60 %
    of the characters and is tested on the others, which it has never seen. Drawn once in seconds, then read from
    a cache.

    Images are `(1, image_size, image_size)` float in [0, 1], ink 1. Training turns, scales and shifts them
    (`RandomAffine`), a batch at a time.

    Args:
        num_classes: Number of characters, the first in Unicode order; by default all.
        images_per_character: Pictures of each character, 2 to 12.
        train_fraction: Share of the characters that trains.
        cache_dir: Folder of the drawn pictures; by default `$LIGHTNING_MEMDML_CACHE`, else
            `~/.cache/lightning_memdml`.
        image_size: Side of the pictures in pixels.
        num_workers: Processes per loader. The images are in memory, so 0 is the fastest.

    Raises:
        ValueError: If there are fewer than 4 characters, or as many as asked for cannot be drawn.

    Example:
        >>> glyphs = GlyphDataModule(num_classes=20, batch_size=8, images_per_class=2)
        >>> images, labels, indices = next(iter(glyphs.train_dataloader()))
        >>> images.shape, len(labels.unique())
        (torch.Size([8, 1, 28, 28]), 4)
    """

    def __init__(
        self,
        num_classes: int | None = None,
        images_per_character: int = 12,
        train_fraction: float = 0.6,
        cache_dir: str | None = None,
        image_size: int = 28,
        num_workers: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size=image_size, num_workers=num_workers, **kwargs)
        if num_classes is not None and num_classes < 4:
            raise ValueError(f"Expected `num_classes` of 4 or more (two to train, two to test) but got {num_classes}.")
        if not 2 <= images_per_character <= MIN_FACES:
            raise ValueError(f"Expected `images_per_character` in [2, {MIN_FACES}] but got {images_per_character}.")
        if not 0 < train_fraction < 1:
            raise ValueError(f"Expected `train_fraction` in (0, 1) but got {train_fraction}.")
        self.num_classes = num_classes
        self.images_per_character = images_per_character
        self.train_fraction = train_fraction
        self.cache_dir = cache_dir

    def prepare_data(self) -> None:
        """Draw the pictures, once per machine, if the cache does not hold them."""
        _ = self.glyphs

    @cached_property
    def glyphs(self) -> Glyphs:
        """All pictures, from the cache or drawn now."""
        folder = self.cache_dir or os.environ.get("LIGHTNING_MEMDML_CACHE") or "~/.cache/lightning_memdml"
        return cached_glyphs(
            local_path(folder, "cache_dir"), self.image_size, self.images_per_character, self.num_classes
        )

    def records(self) -> Iterator[Record]:
        """Yield a record per picture; which characters train is fixed, whatever the seed."""
        characters = list(dict.fromkeys(self.glyphs.characters))
        order = np.random.default_rng(0).permutation(len(characters))
        train = {characters[i] for i in order[: round(self.train_fraction * len(characters))]}
        for character, face in zip(self.glyphs.characters, self.glyphs.faces, strict=True):
            path = f"U+{ord(character):04X}/{face}"
            yield Record(path, label=character, role="train" if character in train else "test")

    def images(self, records: Sequence[Record]) -> Tensor:
        """Return the pictures `(N, 1, image_size, image_size)`, uint8."""
        return self.glyphs.images

    def default_train_transform(self) -> Callable[[Any], Any]:
        """Return the random affine map for small drawings."""
        return transforms.RandomAffine()

    def default_test_transform(self) -> Callable[[Any], Any]:
        """Return the scaling of pixels to [0, 1]."""
        return v2.ToDtype(torch.float32, scale=True)


class Glyphs(NamedTuple):
    """Pictures of characters: `images` `(N, 1, S, S)` uint8, and of each its character and the name of its face."""

    images: Tensor
    characters: list[str]
    faces: list[str]


def cached_glyphs(folder: Path, image_size: int, images_per_character: int, num_classes: int | None) -> Glyphs:
    """Return the pictures out of the cache in `folder`, drawing them if they are not there."""
    drawn_by = f"v{VERSION}-matplotlib{version('matplotlib')}-pillow{version('pillow')}"
    path = folder / f"glyphs-{num_classes or 'all'}x{images_per_character}-{image_size}px-{drawn_by}.npz"
    glyphs = _read(path)
    if glyphs is None:
        glyphs = draw_glyphs(image_size, images_per_character, num_classes)
        _write(path, glyphs)
    return glyphs


def _read(path: Path) -> Glyphs | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return Glyphs(torch.from_numpy(stored["images"]), stored["characters"].tolist(), stored["faces"].tolist())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        rank_zero_warn(f"The cached characters in {path} are damaged ({error}); drawing them again.")
        return None


def _write(path: Path, glyphs: Glyphs) -> None:
    """Write the file atomically, so that no other process reads a part of it."""
    try:
        with atomic_write(path) as temporary:
            np.savez(temporary, images=glyphs.images.numpy(), characters=glyphs.characters, faces=glyphs.faces)
    except OSError as error:
        rank_zero_warn(f"Cannot keep the drawn characters in {path} ({error}); pass a writable `cache_dir`.")


class Face(NamedTuple):
    """A font at one size, and the letters and digits that it has."""

    name: str
    font: ImageFont.FreeTypeFont
    characters: frozenset[str]


def draw_glyphs(image_size: int, images_per_character: int, num_classes: int | None) -> Glyphs:
    """Draw `images_per_character` pictures, each in another face, of the first `num_classes` distinct characters.

    Raises:
        ValueError: If there are fewer characters than asked for.
    """
    faces_of = common_characters(load_faces(em=round(1.4 * image_size)))
    characters = distinct_characters(faces_of, num_classes)
    images, names = [], []
    for character in tqdm(characters, "Drawing characters", delay=1, leave=False):
        order = np.random.default_rng(ord(character)).permutation(len(faces_of[character]))
        chosen = [faces_of[character][i] for i in order[:images_per_character]]
        canvases = [ink(character, face.font, side=2 * image_size) for face in chosen]
        seeds = [ord(character) * MIN_FACES + i for i in range(images_per_character)]
        images.append(bend(torch.from_numpy(np.stack(canvases)), seeds))
        names += [face.name for face in chosen]
    shown = [character for character in characters for _ in range(images_per_character)]
    return Glyphs(torch.cat(images), shown, names)


def load_faces(em: int) -> list[Face]:
    """Return the text faces inside matplotlib with an em of `em` pixels, the plain sans serif first."""
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    folder = Path(get_data_path(), "fonts", "ttf")
    files = [file for family in ("DejaVuSans", "DejaVuSerif", "STIXGeneral") for file in folder.glob(f"{family}*.ttf")]
    texts = [file for file in files if not file.stem.endswith("Display")]  # those are a few ornaments
    layout = ImageFont.Layout.BASIC  # draws the same with and without the optional shaping library
    return [
        Face(file.stem, ImageFont.truetype(file, em, layout_engine=layout), _letters(FT2Font(str(file))))
        for file in sorted(texts, key=lambda file: (file.stem != "DejaVuSans", file.stem))
    ]


def _letters(font: Any) -> frozenset[str]:
    """Return the letters and digits that the font's character map has; others would be drawn as an empty box."""
    return frozenset(char for char in map(chr, font.get_charmap()) if unicodedata.category(char) in CATEGORIES)


def common_characters(faces: Sequence[Face]) -> dict[str, list[Face]]:
    """Return the characters that at least `MIN_FACES` faces have, in Unicode order, with these faces."""
    everything = sorted(frozenset[str]().union(*(face.characters for face in faces)))
    faces_of = {character: [face for face in faces if character in face.characters] for character in everything}
    return {character: having for character, having in faces_of.items() if len(having) >= MIN_FACES}


def distinct_characters(faces_of: dict[str, list[Face]], count: int | None) -> list[str]:
    """Return the first `count` characters, without those that look like an earlier one.

    Raises:
        ValueError: If there are less than `count`.
    """
    looks = np.zeros((len(faces_of), 48 * 48), dtype=np.float32)
    chosen: list[str] = []
    for character, faces in faces_of.items():
        look = _stretched(character, faces[0].font.font_variant(size=64))  # the same characters at any image size
        if (looks @ look).max() <= LOOK_ALIKE:
            looks[len(chosen)] = look
            chosen.append(character)
        if len(chosen) == count:
            return chosen
    if count is not None:
        raise ValueError(f"Expected `num_classes` of at most {len(chosen)}, as there are no more, but got {count}.")
    return chosen


def _stretched(character: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """Return the character filling a square, as a vector `(48 * 48,)` of length 1."""
    square = _tight(character, font).resize((48, 48), Image.Resampling.BILINEAR)
    look = np.asarray(square, dtype=np.float32).ravel()
    return look / np.linalg.norm(look)


def _tight(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Return the character cut to its ink, white on black."""
    left, upper, right, lower = font.getbbox(character)
    image = Image.new("L", (round(right - left), round(lower - upper)))
    ImageDraw.Draw(image).text((-left, -upper), character, font=font, fill=255)
    return image.crop(image.getbbox())


def ink(character: str, font: ImageFont.FreeTypeFont, side: int) -> np.ndarray:
    """Return the character in the middle of a square `(1, side, side)`, uint8; shrunk if it would touch the edge."""
    image = _tight(character, font)
    image.thumbnail((round(0.85 * side), round(0.85 * side)))
    canvas = Image.new("L", (side, side))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(canvas)[None]


def bend(canvases: Tensor, seeds: Sequence[int]) -> Tensor:
    """Turn, shear, scale and bend pictures `(N, 1, 2S, 2S)` at random, and halve their size; uint8 in and out."""
    draws = torch.from_numpy(2 * transforms.uniform(seeds, 4 + 2 * 4 * 4) - 1).float()  # (N, 36) in [-1, 1)
    angle, shear, width, height = (draws[:, :4] * torch.tensor([0.25, 0.25, 0.15, 0.15])).unbind(dim=1)
    zero = torch.zeros_like(angle)
    turned = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], dim=1).view(-1, 2, 3)
    sheared = torch.stack([1 + width, shear, zero, 1 + height], dim=1).view(-1, 2, 2)
    grid = F.affine_grid(sheared @ turned, list(canvases.shape), align_corners=False)  # (N, 2S, 2S, 2)
    knots = 0.09 * draws[:, 4:].view(-1, 2, 4, 4)
    waves = F.interpolate(knots, size=canvases.shape[-2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    bent = F.grid_sample(canvases.float(), grid + waves, align_corners=False)
    return F.avg_pool2d(bent, 2).round().to(torch.uint8)
