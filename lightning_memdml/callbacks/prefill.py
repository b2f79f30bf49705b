"""Embeds training images before the first step, so that the memory starts full."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from tqdm import tqdm

from lightning_memdml.memory.momentum_encoder import BatchNorm, MomentumEncoder
from lightning_memdml.memory.rows import as_rows
from lightning_memdml.training_images import BATCH_SIZE, embed_batch, find_train_set, load_images


def prefill_rows(
    trainer: Trainer, encoder: nn.Module | MomentumEncoder, rows: int, batch_norm: BatchNorm
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield this rank's part of batches of random training images, embedded; every rank yields equally often.

    Args:
        trainer: The running Trainer.
        encoder: What makes the embeddings.
        rows: Number of images over all ranks; all images if there are fewer.
        batch_norm: With which statistics the encoder normalises.

    Raises:
        ValueError: If there is no training set that can be indexed.
    """
    images = find_train_set(trainer)
    if images is None:
        raise ValueError(
            "Expected a training set that can be indexed, whose images `prefill` embeds, but there is no data module "
            "with a `train_set`, nor a loader with such a `dataset`. Leave `prefill` out."
        )
    # A fixed seed: all ranks choose the same images, and so does a run that is repeated.
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:rows]
    batches = chosen.tensor_split(math.ceil(len(chosen) / (BATCH_SIZE * trainer.world_size)))
    parts = [batch[trainer.global_rank :: trainer.world_size].tolist() for batch in batches]
    # A rank without a part takes part in the gather, for which it needs to know D: it embeds one image more.
    loaded = load_images(
        trainer, images, [part or batch[:1].tolist() for part, batch in zip(parts, batches, strict=True)]
    )
    shown = tqdm(loaded, "Filling the memory", len(parts), delay=1, disable=not trainer.is_global_zero, leave=False)
    for part, (inputs, labels, indices) in zip(parts, shown, strict=True):
        embeddings, labels, indices = as_rows(embed_batch(trainer, encoder, inputs, batch_norm), labels, indices)
        yield embeddings[: len(part)], labels[: len(part)], indices[: len(part)]
