"""Embeds many images into a file, and resumes after an interruption."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from lightning_memdml.atomic_write import atomic_write, named_if_full
from lightning_memdml.data.images import ImageDataset
from lightning_memdml.inference.evaluation import embed_images
from lightning_memdml.retrieval.index import EMBEDDINGS, normalise_in_place
from lightning_memdml.retrieval.index_folder import write_header
from lightning_memdml.whitening import Whitening

PROGRESS = "progress.json"
BATCHES_PER_SAVE = 20


@torch.inference_mode()
def embed_to_file(
    model: nn.Module,
    images: ImageDataset,
    folder: Path,
    checkpoint: str,
    *,
    flip: bool = False,
    whitening: Whitening | None = None,
    batch_size: int = 128,
    num_workers: int = 0,
    device: str = "cpu",
) -> np.memmap:
    """Embed images in order, into `embeddings.npy` of a folder, as unit rows.

    Rows of an earlier, interrupted call are kept if it had the same images, transform, checkpoint and options. An image
    file that has changed since is not embedded again.

    Args:
        model: Maps images to embeddings `(B, D)`; in evaluation mode.
        images: The images.
        folder: Where to write; it is made.
        checkpoint: Digest of the model's weights.
        flip: Average the embedding of each image with that of its mirrored copy.
        whitening: Whiten the embeddings.
        batch_size: Images per batch.
        num_workers: Processes that open and transform images.
        device: Where the model runs.

    Returns:
        The embeddings `(N, D)` float32, on disk; changes to them stay in memory.

    Raises:
        OSError: If an image is missing or damaged, or the disk is full. The message names the file.
        ValueError: If there is no image, or the model gives NaN or infinity.
    """
    if not len(images):
        raise ValueError("Expected at least one image to embed but got none. Pass images.")
    folder.mkdir(parents=True, exist_ok=True)
    identity = fingerprint(images, checkpoint, flip=flip, whitening=whitening)
    done, dim = _kept(folder, len(images), identity)
    loader = DataLoader(Subset(images, range(done, len(images))), batch_size=batch_size, num_workers=num_workers)
    model = model.to(device)
    bar = tqdm(total=len(images), initial=done, desc="embedding", unit="image")
    path = folder / EMBEDDINGS
    with bar, named_if_full(path, replaces=False), path.open("r+b" if done else "w+b") as file:
        if done:
            file.seek(write_header(file, (len(images), dim)) + 4 * dim * done)
        try:
            for number, (batch, _, _) in enumerate(loader, start=1):
                embeddings = embed_images(model, batch.to(device), flip).float().cpu()
                _require_finite(embeddings, images, done)
                embeddings = embeddings if whitening is None else whitening(embeddings)
                if not done:
                    write_header(file, (len(images), embeddings.shape[1]))
                file.write(normalise_in_place(embeddings.clone().numpy()).data)
                done += len(embeddings)
                bar.update(len(embeddings))
                if number % BATCHES_PER_SAVE == 0:
                    _save_progress(folder, file, done, identity)
        finally:
            _save_progress(folder, file, done, identity)
    return np.load(path, mmap_mode="c", allow_pickle=False)


def fingerprint(
    images: ImageDataset, checkpoint: str, *, flip: bool = False, whitening: Whitening | None = None
) -> str:
    """Return a digest of the images' names, their labels, the transform, the checkpoint, and how rows are made."""
    transform = re.sub(r" at 0x[0-9a-f]+", "", repr(images.transform))
    parts = [checkpoint, transform, json.dumps(images.paths), json.dumps(images.labels.tolist())]
    parts += ["flip"] if flip else []
    parts += [] if whitening is None else [whitening.digest()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _kept(folder: Path, count: int, identity: str) -> tuple[int, int]:
    """Return how many rows an earlier run left that can be kept, and their dimension."""
    try:
        progress = json.loads((folder / PROGRESS).read_text())
        with (folder / EMBEDDINGS).open("rb") as file:
            np.lib.format.read_magic(file)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
            written = (file.seek(0, os.SEEK_END) - start) // (4 * shape[-1])
    except (OSError, ValueError, IndexError, ZeroDivisionError):
        return 0, 0  # there are none, or they are damaged
    if progress.get("fingerprint") != identity or len(shape) != 2 or shape[0] != count or fortran or dtype != "<f4":
        return 0, 0
    return min(written, max(0, int(progress.get("done", 0)))), shape[1]


def _save_progress(folder: Path, file: BinaryIO, done: int, identity: str) -> None:
    """Record how many rows are done, after they are on the disk."""
    file.flush()
    os.fsync(file.fileno())
    with atomic_write(folder / PROGRESS) as temporary:
        temporary.write_text(json.dumps({"fingerprint": identity, "done": done}))


def _require_finite(embeddings: Tensor, images: ImageDataset, first: int) -> None:
    bad = (~embeddings.isfinite().all(dim=1)).nonzero().squeeze(1).tolist()
    if bad:
        names = ", ".join(images.paths[first + row] for row in bad[:5])
        raise ValueError(
            f"Expected finite embeddings but the model gives NaN or infinity for {names}. Look at these images, or at "
            "the checkpoint."
        )
