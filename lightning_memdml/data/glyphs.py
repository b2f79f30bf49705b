"""A data set of characters drawn in many fonts. Nothing is downloaded: the fonts are part of matplotlib."""

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
from lightning_memdml.checks import check_types
from lightning_memdml.data import transforms
from lightning_memdml.data.module import RetrievalDataModule
from lightning_memdml.data.paths import local_path
from lightning_memdml.data.records import Record

CATEGORIES = ("Lu", "Ll", "Lo", "Nd")  # Unicode categories: capital, small and other letters, decimal digits
MIN_FACES = 12  # a character is used if at least this many faces contain it
MAX_COSINE = 0.96  # two characters whose shapes have a higher cosine similarity count as one
SHAPE_SIDE = 48  # shapes are compared as squares of this many pixels
VERSION = 1  # part of the name of the cache file; raise it when the pictures change


class GlyphDataModule(RetrievalDataModule):
    """Characters of many scripts, drawn in the 16 DejaVu and STIX faces of matplotlib.

    There are 1,052 classes: the letters and digits that at least 12 faces contain. Each has 12 pictures, each in
    another face and slightly distorted. Of characters of nearly the same shape (Latin A and Greek Alpha, 0 and o) only
    the first is used. The network is trained on 60 % of the characters and tested on the others. The pictures are drawn
    once, in seconds, and then read from a cache.

    Images are `(1, image_size, image_size)` float in [0, 1], the character 1 and the background 0. In training,
    `RandomAffine` rotates, scales and shifts a batch at a time.

    Args:
        num_classes: Number of characters, the first in Unicode order; by default all.
        images_per_character: Pictures of each character, 2 to 12.
        train_fraction: Share of the characters used for training, in (0, 1).
        cache_dir: Folder of the drawn pictures; by default `$LIGHTNING_MEMDML_CACHE`, else
            `~/.cache/lightning_memdml`.
        image_size: Side of the pictures in pixels.
        num_workers: Processes per loader. The images are in memory, so 0 is the fastest.

    Raises:
        ValueError: If an argument is out of range, or there are fewer than `num_classes` characters.

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
        check_types(GlyphDataModule.__init__, locals())
        super().__init__(image_size=image_size, num_workers=num_workers, **kwargs)
        if num_classes is not None and num_classes < 4:
            raise ValueError(
                f"Expected `num_classes` of at least 4, two for training and two for testing, but got {num_classes}. "
                "Pass 4 or more, or leave it out for all characters."
            )
        if not 2 <= images_per_character <= MIN_FACES:
            raise ValueError(
                f"Expected `images_per_character` in [2, {MIN_FACES}] but got {images_per_character}. Pass a number in "
                "this range."
            )
        if not 0 < train_fraction < 1:
            raise ValueError(f"Expected `train_fraction` in (0, 1) but got {train_fraction}. Pass 0.6, for example.")
        self.num_classes = num_classes
        self.images_per_character = images_per_character
        self.train_fraction = train_fraction
        self.cache_dir = cache_dir

    def prepare_data(self) -> None:
        """Draw the pictures if they are not in the cache. Lightning calls this once per machine."""
        if self.read_images is None:
            _ = self.glyphs

    @cached_property
    def glyphs(self) -> Glyphs:
        """All pictures, read from the cache or drawn."""
        folder = self.cache_dir or os.environ.get("LIGHTNING_MEMDML_CACHE") or "~/.cache/lightning_memdml"
        path = local_path(folder, "cache_dir")
        return load_glyphs(path, self.image_size, self.images_per_character, self.num_classes)

    def records(self) -> Iterator[Record]:
        """Yield a record for each picture. The training characters are the same for every seed."""
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
        """Return the random affine map for small pictures."""
        return transforms.RandomAffine()

    def default_test_transform(self) -> Callable[[Any], Any]:
        """Return the scaling of pixels to [0, 1]."""
        return v2.ToDtype(torch.float32, scale=True)


class Glyphs(NamedTuple):
    """Pictures of characters.

    Attributes:
        images: `(N, 1, S, S)` uint8, the character 255 and the background 0.
        characters: The character on each picture.
        faces: The name of the face of each picture.
    """

    images: Tensor
    characters: list[str]
    faces: list[str]


def load_glyphs(folder: Path, image_size: int, images_per_character: int, num_classes: int | None) -> Glyphs:
    """Read the pictures from the cache in `folder`. If they are not there, draw them and write them to the cache."""
    versions = f"v{VERSION}-matplotlib{version('matplotlib')}-pillow{version('pillow')}"
    path = folder / f"glyphs-{num_classes or 'all'}x{images_per_character}-{image_size}px-{versions}.npz"
    glyphs = read_cache(path)
    if glyphs is None:
        glyphs = draw_glyphs(image_size, images_per_character, num_classes)
        write_cache(path, glyphs)
    return glyphs


def read_cache(path: Path) -> Glyphs | None:
    """Read the pictures of a cache file. Return `None` if there is no file; warn and return `None` if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return Glyphs(torch.from_numpy(stored["images"]), stored["characters"].tolist(), stored["faces"].tolist())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        rank_zero_warn(f"The cached characters in {path} are damaged ({error}). They are drawn again.")
        return None


def write_cache(path: Path, glyphs: Glyphs) -> None:
    """Write a cache file atomically, so that no other process reads an incomplete one. Warn if it is not writable."""
    try:
        with atomic_write(path) as temporary:
            np.savez(temporary, images=glyphs.images.numpy(), characters=glyphs.characters, faces=glyphs.faces)
    except OSError as error:
        rank_zero_warn(f"Cannot write the drawn characters to {path} ({error}). Pass a writable `cache_dir`.")


class Face(NamedTuple):
    """A font file at one size.

    Attributes:
        name: The file name without its extension.
        font: The font at this size.
        characters: The letters and digits that the font contains.
    """

    name: str
    font: ImageFont.FreeTypeFont
    characters: frozenset[str]


def draw_glyphs(image_size: int, images_per_character: int, num_classes: int | None) -> Glyphs:
    """Draw the first `num_classes` distinct characters, `images_per_character` pictures of each in different faces.

    Args:
        image_size: Side S of the pictures in pixels.
        images_per_character: Pictures of each character, at most `MIN_FACES`.
        num_classes: Number of characters; `None` draws all.

    Raises:
        ValueError: If there are fewer than `num_classes` characters.
    """
    faces_of = common_characters(load_faces(size=round(1.4 * image_size)))
    characters = distinct_characters(faces_of, num_classes)
    images, names = [], []
    for character in tqdm(characters, "Drawing characters", delay=1, leave=False):
        order = np.random.default_rng(ord(character)).permutation(len(faces_of[character]))
        chosen = [faces_of[character][i] for i in order[:images_per_character]]
        large = [draw_centred(character, face.font, side=2 * image_size) for face in chosen]
        seeds = [ord(character) * MIN_FACES + i for i in range(images_per_character)]
        images.append(distort(torch.from_numpy(np.stack(large)), seeds))
        names += [face.name for face in chosen]
    repeated = [character for character in characters for _ in range(images_per_character)]
    return Glyphs(torch.cat(images), repeated, names)


def load_faces(size: int) -> list[Face]:
    """Return the text faces of matplotlib at a font size of `size` pixels, `DejaVuSans` first."""
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    folder = Path(get_data_path(), "fonts", "ttf")
    files = [file for family in ("DejaVuSans", "DejaVuSerif", "STIXGeneral") for file in folder.glob(f"{family}*.ttf")]
    files = [file for file in files if not file.stem.endswith("Display")]  # these contain a few ornaments only
    layout = ImageFont.Layout.BASIC  # gives the same pictures with and without the optional library raqm
    return [
        Face(file.stem, ImageFont.truetype(file, size, layout_engine=layout), letters_and_digits(FT2Font(str(file))))
        for file in sorted(files, key=lambda file: (file.stem != "DejaVuSans", file.stem))
    ]


def letters_and_digits(font: Any) -> frozenset[str]:
    """Return the letters and digits that a font contains; it would draw any other character as an empty box."""
    return frozenset(char for char in map(chr, font.get_charmap()) if unicodedata.category(char) in CATEGORIES)


def common_characters(faces: Sequence[Face]) -> dict[str, list[Face]]:
    """Return the characters that at least `MIN_FACES` faces contain, in Unicode order, each with these faces."""
    characters = sorted(frozenset[str]().union(*(face.characters for face in faces)))
    faces_of = {character: [face for face in faces if character in face.characters] for character in characters}
    return {character: found for character, found in faces_of.items() if len(found) >= MIN_FACES}


def distinct_characters(faces_of: dict[str, list[Face]], count: int | None) -> list[str]:
    """Return the first `count` characters, skipping each whose shape is nearly that of an earlier one.

    Raises:
        ValueError: If there are fewer than `count`.
    """
    shapes = np.zeros((len(faces_of), SHAPE_SIDE**2), dtype=np.float32)
    chosen: list[str] = []
    for character, faces in faces_of.items():
        # Compared at one font size, so that the characters are the same for every image size.
        shape = shape_of(character, faces[0].font.font_variant(size=64))
        if (shapes @ shape).max() <= MAX_COSINE:
            shapes[len(chosen)] = shape
            chosen.append(character)
        if len(chosen) == count:
            return chosen
    if count is not None:
        raise ValueError(
            f"Expected `num_classes` of at most {len(chosen)}, the number of distinct characters, but got {count}. "
            f"Pass {len(chosen)} or less."
        )
    return chosen


def shape_of(character: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """Return the character resized to a square, as a vector `(SHAPE_SIDE ** 2,)` of length 1."""
    square = draw_cropped(character, font).resize((SHAPE_SIDE, SHAPE_SIDE), Image.Resampling.BILINEAR)
    shape = np.asarray(square, dtype=np.float32).ravel()
    return shape / np.linalg.norm(shape)


def draw_cropped(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Draw a character white on black, without a margin around it."""
    left, upper, right, lower = font.getbbox(character)
    image = Image.new("L", (round(right - left), round(lower - upper)))
    ImageDraw.Draw(image).text((-left, -upper), character, font=font, fill=255)
    return image.crop(image.getbbox())


def draw_centred(character: str, font: ImageFont.FreeTypeFont, side: int) -> np.ndarray:
    """Draw a character in the middle of a square `(1, side, side)` uint8; shrink it to at most 85 % of the side."""
    image = draw_cropped(character, font)
    image.thumbnail((round(0.85 * side), round(0.85 * side)))
    canvas = Image.new("L", (side, side))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(canvas)[None]


def distort(images: Tensor, seeds: Sequence[int], strength: float = 1.0) -> Tensor:
    """Rotate, shear, scale and warp pictures at random, and halve their size.

    Args:
        images: `(N, 1, 2S, 2S)` uint8.
        seeds: The seed of each picture, which alone decides how it is distorted.
        strength: Factor of all distortions; 0 is none.

    Returns:
        `(N, 1, S, S)` uint8.
    """
    draws = torch.from_numpy(2 * transforms.uniform(seeds, 4 + 2 * 4 * 4) - 1).float()  # (N, 36) in [-1, 1)
    draws *= strength
    angle, shear, width, height = (draws[:, :4] * torch.tensor([0.25, 0.25, 0.15, 0.15])).unbind(dim=1)
    zero = torch.zeros_like(angle)
    rotation = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], dim=1).view(-1, 2, 3)
    scale_and_shear = torch.stack([1 + width, shear, zero, 1 + height], dim=1).view(-1, 2, 2)
    grid = F.affine_grid(scale_and_shear @ rotation, list(images.shape), align_corners=False)  # (N, 2S, 2S, 2)
    # A smooth displacement: random on a grid of 4 x 4 points, interpolated between them.
    points = 0.09 * draws[:, 4:].view(-1, 2, 4, 4)
    displacement = F.interpolate(points, size=images.shape[-2:], mode="bicubic", align_corners=True)
    warped = F.grid_sample(images.float(), grid + displacement.permute(0, 2, 3, 1), align_corners=False)
    return F.avg_pool2d(warped, 2).round().to(torch.uint8)
