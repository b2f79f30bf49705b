"""Check a data set before training: its files, its sets, its problems, and a contact sheet."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from PIL import Image, ImageDraw, ImageFont

from lightning_memdml.data.images import ImageDataset
from lightning_memdml.data.module import Problem, RetrievalDataModule
from lightning_memdml.data.paths import shown

PROBLEMS_SHOWN = 10
ENTRIES_SHOWN = 20
CLASSES, IMAGES, CELL, GAP, TITLE, LABEL = 8, 3, 112, 6, 30, 18  # of the contact sheet: numbers, then pixels
INK, FAINT, PAPER, WRONG = "#1d2433", "#6b7486", "#ffffff", "#c8323c"


def tree_of(root: Path) -> Iterator[str]:
    """Yield what lies in a folder, a line per entry of the first two levels, with the number of files below folders."""
    for entry in sorted(root.iterdir())[:ENTRIES_SHOWN]:
        yield f"  {_entry(entry)}"
        inner = sorted(entry.iterdir()) if entry.is_dir() else []
        yield from (f"    {_entry(path)}" for path in inner[:ENTRIES_SHOWN] if path.is_dir())
        if sum(path.is_dir() for path in inner) > ENTRIES_SHOWN:
            yield "    ..."


def _entry(path: Path) -> str:
    if not path.is_dir():
        size = f"{path.stat().st_size:,} bytes" if path.exists() else "a broken link"
        return f"{shown(path.name)} ({size})"
    return f"{shown(path.name)}/ ({sum(len(files) for _, _, files in os.walk(path)):,} files)"


def class_sizes(images: ImageDataset) -> str:
    """Return how many images the classes have, in a line.

    Example:
        >>> import torch
        >>> class_sizes(ImageDataset(lambda position: Image.new("L", (8, 8)), list("abc"), torch.tensor([0, 0, 1])))
        '1 to 2 images per class, median 1.5'
    """
    sizes = images.labels.unique(return_counts=True)[1].tolist()
    if min(sizes) == max(sizes):
        return f"{min(sizes):,} images per class"
    return f"{min(sizes):,} to {max(sizes):,} images per class, median {median(sizes):g}"


def sets_of(module: RetrievalDataModule) -> dict[str, ImageDataset]:
    """Return the sets that are not empty, by what they are for.

    Raises:
        ValueError: If all are empty.
    """
    module.setup()
    sets = {"train": module.train_set, "validation": module.val_set}
    if module.gallery_set is module.query_set:
        sets["test, both query and gallery"] = module.query_set
    else:
        sets |= {"query": module.query_set, "gallery": module.gallery_set}
    sets = {name: images for name, images in sets.items() if len(images)}
    if not sets:
        raise ValueError(f"Expected images in {type(module).__name__} but it has none. Check its paths.")
    return sets


def describe(module: RetrievalDataModule) -> Iterator[str]:
    """Yield the lines of a report: the files, the sets, and how the sampler treats short classes."""
    root = getattr(module, "root", None)
    if isinstance(root, Path) and root.is_dir():
        yield f"{type(module).__name__} in {shown(root)}"
        yield from tree_of(root)
    for name, images in sets_of(module).items():
        yield f"{name}: {len(images):,} images of {len(images.labels.unique()):,} classes, {class_sizes(images)}"
    if not len(module.train_set):
        yield "train: no images, so that it can be tested on, but not trained on"
    wanted = module.images_per_class
    sizes = module.train_set.labels.unique(return_counts=True)[1]
    if short := int((sizes < wanted).sum()):
        yield f"  {short:,} training classes have less than {wanted} images; a batch repeats images of these evenly"


def in_words(problems: Sequence[Problem]) -> Iterator[str]:
    """Yield the lines of the report on problems."""
    yield f"{len(problems):,} problem{'' if len(problems) == 1 else 's'}" if problems else "no problems"
    yield from (f"  {problem.path}: {problem.reason}" for problem in problems[:PROBLEMS_SHOWN])
    if len(problems) > PROBLEMS_SHOWN:
        kinds = Counter(problem.reason.replace(problem.path, "it").split(":")[0] for problem in problems).most_common(5)
        yield f"  ...; most often: {', '.join(f'{kind} ({count:,})' for kind, count in kinds)}"


def contact_sheet(module: RetrievalDataModule) -> Image.Image:
    """Return a picture of some images of each set: a column per class, classes evenly spaced over their order."""
    sets = sets_of(module)
    height = TITLE + LABEL + IMAGES * (CELL + GAP) + GAP
    sheet = Image.new("RGB", (GAP + CLASSES * (CELL + GAP), height * len(sets)), PAPER)
    for row, (name, images) in enumerate(sets.items()):
        _draw_set(sheet, row * height, f"{name}: {len(images):,} images", images, module.classes)
    return sheet


def _draw_set(sheet: Image.Image, top: int, title: str, images: ImageDataset, names: Sequence[int | str]) -> None:
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, top + GAP), title, fill=INK, font=ImageFont.load_default(15))
    labels = images.labels.unique().tolist()
    count = min(CLASSES, len(labels))
    for column, label in enumerate(labels[int((i + 0.5) * len(labels) / count)] for i in range(count)):
        left = GAP + column * (CELL + GAP)
        draw.text((left, top + TITLE), _short(str(names[label])), fill=FAINT, font=ImageFont.load_default(11))
        for row, position in enumerate((images.labels == label).nonzero()[:IMAGES, 0].tolist()):
            corner = (left, top + TITLE + LABEL + row * (CELL + GAP))
            try:
                picture = images.picture(position).convert("RGB")
            except OSError:  # which `verify` names; here it is shown to be missing
                draw.rectangle((*corner, corner[0] + CELL - 1, corner[1] + CELL - 1), outline=WRONG, width=2)
                middle = (corner[0] + CELL // 2, corner[1] + CELL // 2)
                draw.text(middle, "unreadable", fill=WRONG, anchor="mm", font=ImageFont.load_default(14))
                continue
            # `ImageOps.contain` of older versions of Pillow makes thin pictures 0 pixels high.
            width, height = (max(1, round(side * CELL / max(picture.size))) for side in picture.size)
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(picture, (corner[0] + (CELL - picture.width) // 2, corner[1] + (CELL - picture.height) // 2))


def _short(name: str) -> str:
    """Return a name that fits over a column. Long names keep their end, which differs between classes more often."""
    return name if len(name) <= 18 else f"...{name[-15:]}"
