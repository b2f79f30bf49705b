"""Images that cannot be opened: found and listed before an index is built without them."""

from __future__ import annotations

import os
from collections.abc import Collection
from multiprocessing.pool import ThreadPool
from typing import Any

import torch
from tqdm import tqdm

from lightning_memdml.data.images import ImageDataset
from lightning_memdml.inference.sources import NamedImages


def damaged_images(images: ImageDataset) -> list[str]:
    """Open all images, print those that are missing or damaged with the reason, and return their paths."""

    def problem(position: int) -> str | None:
        try:
            images.open(position)
        except OSError as error:
            return str(error.__cause__ or error)
        return None

    with ThreadPool(min(8, os.cpu_count() or 1)) as threads:
        reasons = threads.imap(problem, range(len(images)), chunksize=16)
        found = list(tqdm(reasons, "opening images", len(images), delay=1, leave=False))
    skipped = {path: reason for path, reason in zip(images.paths, found, strict=True) if reason is not None}
    for path, reason in skipped.items():
        print(f"skipped: {path}: {reason}")
    print(f"{len(skipped):,} of {len(images):,} images skipped.")
    return list(skipped)


def without_skipped(chosen: NamedImages, skipped: Any) -> NamedImages:
    """Return the images without those of some paths.

    Args:
        chosen: All images.
        skipped: Their paths; anything but a list leaves all.
    """
    if not isinstance(skipped, list) or not skipped:
        return chosen
    paths: Collection[str] = {path for path in skipped if isinstance(path, str)}
    kept = [position for position, path in enumerate(chosen.images.paths) if path not in paths]
    part = chosen.images.part(torch.tensor(kept, dtype=torch.long), chosen.images.transform)
    return NamedImages(part, [chosen.classes[position] for position in kept])
