"""Embeddings of many images, written to disk as they come; a run that was killed goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from lightning_memdml.data.images import ImageDataset
from lightning_memdml.retrieval.index import EMBEDDINGS

PROGRESS = "progress.json"
KEPT_EVERY = 20  # batches after which what is done is kept


@torch.inference_mode()
def embed(
    model: nn.Module,
    images: ImageDataset,
    folder: Path,
    checkpoint: str,
    *,
    batch_size: int = 128,
    num_workers: int = 0,
    device: str = "cpu",
) -> np.memmap:
    """Embed images in order, into `embeddings.npy` of a folder.

    What an earlier call left there is kept, if it was about the same images, transform and checkpoint; images whose
    file has changed meanwhile are not embedded again.

    Args:
        model: Maps images to embeddings `(B, D)`; in evaluation mode.
        images: The images.
        folder: Where to; it is made.
        checkpoint: Digest of the model's weights.
        batch_size: Images per batch.
        num_workers: Processes that open and transform images.
        device: Where the model runs.

    Returns:
        The embeddings `(N, D)` float32, writable, on disk.

    Raises:
        OSError: If an image is missing or damaged; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    identity = fingerprint(images, checkpoint)
    rows, done = _kept(folder, len(images), identity)
    loader = DataLoader(Subset(images, range(done, len(images))), batch_size=batch_size, num_workers=num_workers)
    model = model.to(device)
    bar = tqdm(total=len(images), initial=done, desc="embedding", unit="image")
    try:
        for number, (batch, _, _) in enumerate(loader, start=1):
            embeddings = model(batch.to(device)).float().cpu()
            if rows is None:
                shape = (len(images), embeddings.shape[1])
                rows = np.lib.format.open_memmap(folder / EMBEDDINGS, "w+", dtype=np.float32, shape=shape)
            _require_finite(embeddings, images, done)
            rows[done : done + len(embeddings)] = embeddings.numpy()
            done += len(embeddings)
            bar.update(len(embeddings))
            if number % KEPT_EVERY == 0:
                _keep(folder, rows, done, identity)
    finally:
        bar.close()
        if rows is not None:
            _keep(folder, rows, done, identity)
    if rows is None:
        raise ValueError("There is no image to embed.")
    return rows


def fingerprint(images: ImageDataset, checkpoint: str) -> str:
    """Return a digest of the images' names, their labels, the transform and the checkpoint."""
    transform = re.sub(r" at 0x[0-9a-f]+", "", repr(images.transform))
    parts = (checkpoint, transform, json.dumps(images.paths), json.dumps(images.labels.tolist()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _kept(folder: Path, count: int, identity: str) -> tuple[np.memmap | None, int]:
    """The embeddings an earlier run left, and how many of them are done."""
    try:
        progress = json.loads((folder / PROGRESS).read_text())
        rows = np.lib.format.open_memmap(folder / EMBEDDINGS, "r+")
    except (OSError, ValueError):
        return None, 0  # there are none, or they are damaged: from the start
    if progress.get("fingerprint") != identity or rows.shape[0] != count or rows.dtype != np.float32:
        return None, 0
    return rows, min(count, max(0, int(progress.get("done", 0))))


def _keep(folder: Path, rows: np.memmap, done: int, identity: str) -> None:
    """Say how far it went, after the rows are on disk."""
    rows.flush()
    written = folder / f".{PROGRESS}"
    written.write_text(json.dumps({"fingerprint": identity, "done": done}))
    os.replace(written, folder / PROGRESS)


def _require_finite(embeddings: Tensor, images: ImageDataset, first: int) -> None:
    bad = (~embeddings.isfinite().all(dim=1)).nonzero().squeeze(1).tolist()
    if bad:
        names = ", ".join(images.paths[first + row] for row in bad[:5])
        raise ValueError(f"The model gives NaN or infinity for {names}: look at these images, or at the checkpoint.")
