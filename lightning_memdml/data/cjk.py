"""Chinese and Korean characters: a data set with as many classes and images as Stanford Online Products."""

from __future__ import annotations

import os
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from PIL import ImageFont
from torch import Tensor
from torchvision.transforms import v2
from tqdm import tqdm

from lightning_memdml.atomic_write import atomic_write
from lightning_memdml.checks import check_types
from lightning_memdml.data import transforms
from lightning_memdml.data.glyphs import distort, draw_centred
from lightning_memdml.data.module import RetrievalDataModule
from lightning_memdml.data.paths import local_path
from lightning_memdml.data.records import Record

HAN, HANGUL = range(0x4E00, 0xA000), range(0xAC00, 0xD7A4)
TRAIN_CLASSES, TEST_CLASSES = 11_318, 11_316
TRAIN_IMAGES, TEST_IMAGES = 59_551, 60_502
SIZES = range(2, 13)  # images of a class
SKEW = 1.95  # of the sizes: small classes are more frequent, as in Stanford Online Products
BATCH = 500  # pictures that are distorted at a time
VERSION = 1  # part of the cache's name: raise it when the pictures change


class Font(NamedTuple):
    """A font that draws the characters.

    Attributes:
        name: Its full name.
        file: The name of its file.
        number: Its place in the file, which may hold several fonts.
        scripts: The characters it is used for.
        licence: Under which it may be used and passed on.
        package: Where Debian and Ubuntu have it.
    """

    name: str
    file: str
    number: int
    scripts: tuple[range, ...]
    licence: str
    package: str


FONTS = (
    Font("Noto Sans CJK SC", "NotoSansCJK-Regular.ttc", 2, (HAN, HANGUL), "OFL 1.1", "fonts-noto-cjk"),
    Font("Noto Serif CJK SC", "NotoSerifCJK-Regular.ttc", 2, (HAN, HANGUL), "OFL 1.1", "fonts-noto-cjk"),
    Font("WenQuanYi Zen Hei", "wqy-zenhei.ttc", 0, (HAN, HANGUL), "GPL 2, font exception", "fonts-wqy-zenhei"),
    Font("WenQuanYi Micro Hei", "wqy-microhei.ttc", 0, (HAN, HANGUL), "Apache 2.0", "fonts-wqy-microhei"),
    Font("AR PL UKai CN", "ukai.ttc", 0, (HAN,), "Arphic Public License", "fonts-arphic-ukai"),
    Font("AR PL UMing CN", "uming.ttc", 0, (HAN,), "Arphic Public License", "fonts-arphic-uming"),
    Font("NanumMyeongjo", "NanumMyeongjo.ttf", 0, (HANGUL,), "OFL 1.1", "fonts-nanum"),
    Font("Un Gungseo", "UnGungseo.ttf", 0, (HANGUL,), "GPL 2", "fonts-unfonts-core"),
    Font("Un Pilgi", "UnPilgi.ttf", 0, (HANGUL,), "GPL 2", "fonts-unfonts-core"),
)
MIN_FONTS = 2  # of each script, so that a class is drawn in more than one way


class CJKDataModule(RetrievalDataModule):
    """Chinese and Korean characters in nine free fonts: as many classes and images as Stanford Online Products.

    11,318 characters with 59,551 pictures are for training, 11,316 others with 60,502 for testing. A character has 2 to
    12 pictures, each in another font as long as there are fonts, turned and bent a little. The pictures are drawn once,
    in about a minute, and then read from a cache of 130 MB. Which characters these are, and how many pictures each has,
    is the same on every machine with these fonts.

    The fonts are not part of this package: without them, the error names the packages of Debian and Ubuntu that have
    them. Elsewhere copy their files to a folder for fonts of the system or the user. `lightning_memdml.data.cjk.FONTS`
    lists them with their licences.

    Images are `(1, image_size, image_size)` float in [0, 1], ink 1. Training turns, scales and shifts them
    (`RandomAffine`), a batch at a time.

    Args:
        num_classes: Number of characters, at least 4; by default 22,634. A smaller set has the first
            characters of the same order.
        distortion: Strength of the distortion that the pictures are drawn with, at least 0. On 1,131 validation
            classes, 1 leaves room: Recall@1 is 2 % for an untrained `SmallConvNet`, and 38 % after 1,000 steps of 16.
        allow_missing_fonts: Draw with the fonts that there are, at least two for each script. The data set is then
            another one, which is printed.
        cache_dir: Folder of the drawn pictures; by default `$LIGHTNING_MEMDML_CACHE`, else
            `~/.cache/lightning_memdml`.
        image_size: Side of the pictures in pixels.
        num_workers: Processes per loader. The images are in memory, so 0 is the fastest.

    Raises:
        ValueError: If an argument is out of range.
        FileNotFoundError: If fonts are missing; the message names them, and the packages that have them.

    Example:
        >>> data = CJKDataModule(batch_size=16, images_per_class=2)
        >>> data.num_classes
        22634
    """

    def __init__(
        self,
        num_classes: int | None = None,
        distortion: float = 1.0,
        allow_missing_fonts: bool = False,
        cache_dir: str | None = None,
        image_size: int = 32,
        num_workers: int = 0,
        **kwargs: Any,
    ) -> None:
        check_types(CJKDataModule.__init__, locals())
        super().__init__(image_size=image_size, num_workers=num_workers, **kwargs)
        most = TRAIN_CLASSES + TEST_CLASSES
        if num_classes is not None and not 4 <= num_classes <= most:
            raise ValueError(
                f"Expected `num_classes` in [4, {most}] but got {num_classes}. Leave it out for all characters."
            )
        if distortion < 0:
            raise ValueError(f"Expected `distortion` of at least 0 but got {distortion}. Pass 0 for none.")
        self.num_classes = most if num_classes is None else num_classes
        self.distortion = distortion
        self.allow_missing_fonts = allow_missing_fonts
        self.cache_dir = cache_dir

    def prepare_data(self) -> None:
        """Draw the pictures, once per machine, if the cache does not hold them."""
        if self.read_images is None:
            _ = self.pictures

    @cached_property
    def pictures(self) -> Pictures:
        """All pictures, from the cache or drawn now."""
        folder = self.cache_dir or os.environ.get("LIGHTNING_MEMDML_CACHE") or "~/.cache/lightning_memdml"
        fonts = find_fonts(self.allow_missing_fonts)
        return cached_pictures(
            local_path(folder, "cache_dir"), fonts, self.num_classes, self.image_size, self.distortion
        )

    def records(self) -> Iterator[Record]:
        """Yield a record per picture; which characters train is fixed, whatever the seed."""
        for code, font, train in zip(*self.pictures[1:], strict=True):
            yield Record(f"U+{code:04X}/{font}", label=chr(code), role="train" if train else "test")

    def images(self, records: Sequence[Record]) -> Tensor:
        """Return the pictures `(N, 1, image_size, image_size)`, uint8."""
        return self.pictures.images

    def default_train_transform(self) -> Callable[[Any], Any]:
        """Return the random affine map for small drawings."""
        return transforms.RandomAffine()

    def default_test_transform(self) -> Callable[[Any], Any]:
        """Return the scaling of pixels to [0, 1]."""
        return v2.ToDtype(torch.float32, scale=True)


class Pictures(NamedTuple):
    """Pictures of characters: `images` `(N, 1, S, S)` uint8, and of each its code, its font, and whether it trains."""

    images: Tensor
    codes: list[int]
    fonts: list[str]
    train: list[bool]


def find_fonts(allow_missing: bool = False) -> list[tuple[Font, Path]]:
    """Return the fonts of `FONTS` with their files, in the order of `FONTS`.

    Args:
        allow_missing: Whether two fonts for each script are enough.

    Raises:
        FileNotFoundError: If fonts are missing.
    """
    from matplotlib.font_manager import findSystemFonts

    files = {Path(file).name: Path(file) for file in sorted(findSystemFonts())}
    found = [(font, files[font.file]) for font in FONTS if font.file in files]
    missing = [font for font in FONTS if font.file not in files]
    if not missing:
        return found
    packages = " ".join(dict.fromkeys(font.package for font in missing))
    enough = all(sum(script in font.scripts for font, _ in found) >= MIN_FONTS for script in (HAN, HANGUL))
    if not (allow_missing and enough):
        way_out = " Or draw another data set with the fonts that there are: allow_missing_fonts=True." if enough else ""
        raise FileNotFoundError(
            f"Expected the fonts of `CJKDataModule` but did not find {', '.join(font.name for font in missing)}. On "
            f"Debian or Ubuntu, install {packages}; elsewhere, copy {', '.join(font.file for font in missing)} to a "
            f"folder for fonts.{way_out}"
        )
    rank_zero_warn(
        f"Fonts of `CJKDataModule` that are missing: {', '.join(font.name for font in missing)}. Its pictures are not "
        "those of a machine with all fonts: do not compare scores."
    )
    return found


def cached_pictures(
    folder: Path, fonts: Sequence[tuple[Font, Path]], num_classes: int, image_size: int, distortion: float
) -> Pictures:
    """Return the pictures out of the cache in `folder`, drawing them if they are not there.

    The name of the file in the cache changes with the fonts, so that other versions of them are drawn anew.
    """
    drawn_by = f"{VERSION} {version('pillow')} {[(font.name, path.stat().st_size) for font, path in fonts]}"
    digest = blake2b(drawn_by.encode(), digest_size=6).hexdigest()
    path = folder / f"cjk-{num_classes}-{image_size}px-distorted{distortion:g}-{digest}.npz"
    pictures = _read(path)
    if pictures is not None:
        return pictures
    start = time.perf_counter()
    pictures = draw_pictures(fonts, num_classes, image_size, distortion)
    try:
        with atomic_write(path) as temporary:
            np.savez(temporary, **{**pictures._asdict(), "images": pictures.images.numpy()})
    except OSError as error:
        rank_zero_warn(f"Cannot keep the drawn characters in {path} ({error}); pass a writable `cache_dir`.")
    else:
        rank_zero_info(
            f"Drew {len(pictures.codes):,} pictures of {num_classes:,} characters in {time.perf_counter() - start:.0f} "
            f"s with {', '.join(font.name for font, _ in fonts)}. They are kept in {path} "
            f"({path.stat().st_size / 1e6:.0f} MB)."
        )
    return pictures


def _read(path: Path) -> Pictures | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            images, *columns = (stored[name] for name in Pictures._fields)
            return Pictures(torch.from_numpy(images), *(column.tolist() for column in columns))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        rank_zero_warn(f"The cached characters in {path} are damaged ({error}); drawing them again.")
        return None


def draw_pictures(fonts: Sequence[tuple[Font, Path]], num_classes: int, image_size: int, distortion: float) -> Pictures:
    """Draw the first `num_classes` characters of a fixed random order.

    Raises:
        ValueError: If the fonts have fewer characters in common.
    """
    fonts_of = common_characters(fonts)
    if len(fonts_of) < num_classes:
        raise ValueError(
            f"Expected fonts with {num_classes} characters in common but got {len(fonts_of)}. Pass a smaller "
            "`num_classes`, or install the versions of the fonts that Debian has."
        )
    loaded = {
        font: ImageFont.truetype(file, round(1.4 * image_size), font.number, layout_engine=ImageFont.Layout.BASIC)
        for font, file in fonts
    }
    order = np.random.default_rng(0).permutation(sorted(fonts_of))[:num_classes]
    train_classes = num_train_classes(num_classes)
    sizes = [
        *class_sizes(train_classes, TRAIN_IMAGES / TRAIN_CLASSES),
        *class_sizes(num_classes - train_classes, TEST_IMAGES / TEST_CLASSES),
    ]
    drawn = []  # code, font, whether it trains, seed of its distortion
    for place, (code, size) in enumerate(zip(order.tolist(), sizes, strict=True)):
        having = [fonts_of[code][i] for i in np.random.default_rng(code).permutation(len(fonts_of[code]))]
        drawn += [(code, having[i % len(having)], place < train_classes, code * SIZES.stop + i) for i in range(size)]
    images = []
    with tqdm(total=len(drawn), desc="Drawing characters", unit=" pictures", delay=1, leave=False) as bar:
        for start in range(0, len(drawn), BATCH):
            part = drawn[start : start + BATCH]
            canvases = np.stack(
                [draw_centred(chr(code), loaded[font], side=2 * image_size) for code, font, _, _ in part]
            )
            images.append(distort(torch.from_numpy(canvases), [seed for *_, seed in part], distortion))
            bar.update(len(part))
    codes, used, train, _ = zip(*drawn, strict=True)
    return Pictures(torch.cat(images), [*codes], [font.name for font in used], [*train])


def common_characters(fonts: Sequence[tuple[Font, Path]]) -> dict[int, list[Font]]:
    """Return the code of each character that all fonts of its script have, with these fonts."""
    from fontTools.ttLib import TTFont

    codes_of = {font: TTFont(file, fontNumber=font.number, lazy=True).getBestCmap().keys() for font, file in fonts}
    found: dict[int, list[Font]] = {}
    for script in (HAN, HANGUL):
        having = [font for font in codes_of if script in font.scripts]
        found |= {code: having for code in script if all(code in codes_of[font] for font in having)}
    return found


def num_train_classes(num_classes: int) -> int:
    """Return the number of characters that train: their share is that of Stanford Online Products.

    Example:
        >>> num_train_classes(22634), num_train_classes(100)
        (11318, 50)
    """
    return round(num_classes * TRAIN_CLASSES / (TRAIN_CLASSES + TEST_CLASSES))


def class_sizes(num_classes: int, mean: float) -> NDArray[np.int64]:
    """Return the number of pictures of each character, 2 to 12 in a fixed random order, with the given mean.

    Example:
        >>> sizes = class_sizes(11_318, 59_551 / 11_318)
        >>> print(sizes.sum(), sizes.min(), sizes.max(), np.median(sizes))
        59551 2 12 4.0
    """
    place = (np.arange(num_classes) + 0.5) / num_classes
    sizes = SIZES.start + np.floor(len(SIZES) * place**SKEW).astype(np.int64)
    surplus = round(mean * num_classes) - int(sizes.sum())
    can_change = np.flatnonzero(sizes < SIZES[-1] if surplus > 0 else sizes > SIZES[0])
    sizes[can_change[:: max(1, len(can_change) // max(1, abs(surplus)))][: abs(surplus)]] += np.sign(surplus)
    return np.random.default_rng(1).permutation(sizes)
