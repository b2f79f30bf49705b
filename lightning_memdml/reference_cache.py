"""Keeps what was computed of frozen features, for a later run on the same images, files and weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from lightning_memdml.atomic_write import atomic_write
from lightning_memdml.backbones import Embedder
from lightning_memdml.data import RetrievalDataModule
from lightning_memdml.data.images import ImageDataset, TensorImageDataset

Rows = dict[str, dict[str, float]]
Sums = tuple[Tensor, Tensor, Tensor]


class ReferenceFile:
    """A file with the scores of frozen features, and the sums over those of the training images.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def find(cls, folder: Path, model: Embedder, data: RetrievalDataModule, classes: str) -> ReferenceFile | None:
        """Return the file for these images and this network, or None for images that are not read from files.

        Its name is a hash of the weights and the modules of the network, and of each set the transform, and the labels,
        paths, sizes and times of the files.

        Args:
            folder: The folder of such files.
            model: The network. Of its head only the width counts.
            data: A data module after `setup()`.
            classes: Which classes are scored.
        """
        sets = (data.plain_train_set, data.val_set, data.query_set, data.gallery_set)
        if any(isinstance(images, TensorImageDataset) for images in sets):
            return None
        digest = hashlib.sha256(f"{model} {classes} {torch.__version__}".encode())
        _add_weights(digest, model)
        for images in sets:
            _add_images(digest, images, getattr(data, "path", None))
        return cls(folder / f"{digest.hexdigest()[:32]}.pt")

    def read(self) -> tuple[Rows, Sums | None] | None:
        """Return scores and sums, or None if there is no such file, or it is damaged."""
        try:
            kept = torch.load(self.path, weights_only=True)
            return kept["rows"], kept["sums"]
        except (OSError, RuntimeError, EOFError, UnpicklingError, KeyError, TypeError):
            return None

    def write(self, rows: Rows, sums: Sums | None) -> None:
        """Write scores and sums atomically."""
        with atomic_write(self.path) as unfinished:
            torch.save({"rows": rows, "sums": sums}, unfinished)


def _add_weights(digest: Any, model: Embedder) -> None:
    head = {id(parameter) for parameter in model.head.parameters()}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in head:
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _add_images(digest: Any, images: ImageDataset, archive: Path | None) -> None:
    digest.update(f"{images.transform} {images.labels.tolist()}".encode())
    for path in images.paths:
        file = Path(path)
        # An image within an archive changes with it.
        found = file if file.is_file() else archive
        state = found.stat() if found is not None and found.is_file() else None
        digest.update(f"{path} {state and (state.st_size, state.st_mtime_ns)}".encode())
