"""Images that cannot be opened: found and listed before an index is built, or images are embedded, without them."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from tqdm import tqdm

from lightning_memdml.data import RetrievalDataModule
from lightning_memdml.data.images import ImageDataset
from lightning_memdml.inference.sources import NamedImages


def damaged_images(*sets: ImageDataset) -> list[str]:
    """Open all images, print those that are missing or damaged with the reason, and return their paths.

    Args:
        *sets: Data sets of images; what an earlier one holds is not opened again.
    """
    places: list[tuple[ImageDataset, int]] = []
    seen: set[str] = set()
    for images in sets:
        places += [(images, position) for position, path in enumerate(images.paths) if path not in seen]
        seen.update(images.paths)

    def problem(place: tuple[ImageDataset, int]) -> str | None:
        images, position = place
        try:
            images.open(position)
        except OSError as error:
            return str(error.__cause__ or error)
        return None

    with ThreadPool(min(8, os.cpu_count() or 1)) as threads:
        reasons = threads.imap(problem, places, chunksize=16)
        found = list(tqdm(reasons, "opening images", len(places), delay=1, leave=False))
    skipped = {
        images.paths[position]: reason
        for (images, position), reason in zip(places, found, strict=True)
        if reason is not None
    }
    for path, reason in skipped.items():
        print(f"skipped: {path}: {reason}")
    print(f"{len(skipped):,} of {len(places):,} images skipped.")
    return list(skipped)


def without_skipped(chosen: NamedImages, skipped: Any) -> NamedImages:
    """Return the images without those of some paths.

    Args:
        chosen: All images.
        skipped: Their paths; anything but a list leaves all.
    """
    if not isinstance(skipped, list) or not skipped:
        return chosen
    kept = _kept(chosen.images, {path for path in skipped if isinstance(path, str)})
    part = chosen.images.part(kept, chosen.images.transform)
    return NamedImages(part, [chosen.classes[position] for position in kept.tolist()])


def _kept(images: ImageDataset, skipped: Collection[str]) -> Tensor:
    """Return the positions of the images whose path is not skipped."""
    return torch.tensor([place for place, path in enumerate(images.paths) if path not in skipped], dtype=torch.long)


@contextmanager
def offer_to_skip(purpose: str) -> Iterator[None]:
    """Name `--skip_damaged` in the error of an image that cannot be opened.

    Args:
        purpose: What the command does with the images, such as `index`.

    Raises:
        OSError: If the block opens such an image.
    """
    try:
        yield
    except OSError as error:
        unreadable = re.findall("(?:Cannot read the|The) image .*", str(error))  # after the traceback of a worker
        if not unreadable:
            raise
        described = unreadable[-1].partition(" Replace it or take")[0]
        raise OSError(f"{described} To {purpose} the others, pass --skip_damaged true.") from error


class SkipDamaged(Callback):
    """Leaves test images that cannot be opened out of `Trainer.predict`, and lists them."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the images on one rank, after the data module has listed them, and leave some out on all ranks.

        Raises:
            ValueError: If the data module is not one of this package.
        """
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, RetrievalDataModule):
            raise ValueError(
                f"Expected a data module of this package for --skip_damaged but got {type(data).__name__}. Leave the "
                "option out."
            )
        sets = [data.query_set] if data.gallery_set is data.query_set else [data.query_set, data.gallery_set]
        found = damaged_images(*sets) if trainer.is_global_zero else []
        skipped = set(trainer.strategy.broadcast(found))
        parts = []
        for images in sets:
            kept = _kept(images, skipped)
            parts.append(images.part(kept, images.transform, images.indices[kept]))
        data.query_set, data.gallery_set = parts[0], parts[-1]
