"""The memory of a `MemoryCallback` before the first batch: made, sized to the training set, and its place checked."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_memdml.compat import ranks_start_method
from lightning_memdml.losses.pair_loss import PairLoss
from lightning_memdml.memory.embedding_memory import EmbeddingMemory
from lightning_memdml.memory.protocol import Memory
from lightning_memdml.memory.rows import Storage
from lightning_memdml.training_images import find_train_set

StorageName = Literal["float32", "float16", "bfloat16", "auto"]


def make_memory(size: int | float, dtype: StorageName) -> tuple[EmbeddingMemory, float | None]:
    """Return a memory, and the share of the training images that its size is to be, or None."""
    if dtype not in get_args(StorageName):
        raise ValueError(
            f'Expected `dtype` to be "float32", "float16", "bfloat16" or "auto" but got {dtype!r}. Pass one of these.'
        )
    storage: Storage = "auto" if dtype == "auto" else getattr(torch, dtype)
    if isinstance(size, float) and size > 1 and size.is_integer():
        size = int(size)  # Python 3.10 can cache `int | float` as `float | int`, and jsonargparse then reads 40.0
    if not isinstance(size, float):
        return EmbeddingMemory(size, storage), None
    if not 0 < size <= 1:
        raise ValueError(
            f"Expected `size` of the memory as a number of rows, at least 1, or as a share of the training images in "
            f"(0, 1], but got {size:g}. Pass 8192, for example."
        )
    return EmbeddingMemory(1, storage), size  # of one row until the training set is known


def fit_to_train_set(trainer: Trainer, memory: Memory, share: float) -> None:
    """Set the size of a memory to a share of the training images; a memory of another size is emptied.

    Raises:
        ValueError: If the number of training images is not known.
    """
    images = find_train_set(trainer)
    if images is None:
        raise ValueError(
            f"Expected a training set with a length, as the memory's size is to be {share:g} of the training images, "
            "but their number is not known: there is no data module with a `train_set`, nor a loader with such a "
            "`dataset`. Pass `size=`, a number of rows."
        )
    size = max(1, round(share * len(images)))
    if size != memory.size:
        memory.size = size
        memory.reset()


def check_place(pl_module: LightningModule, memory: Memory) -> None:
    """Raise a `ValueError` if something else is where the memory is to be attached."""
    held = getattr(pl_module, "memory", None)
    if held is not None and held is not memory:
        raise ValueError(
            f"Expected {type(pl_module).__name__} to have no attribute `memory` of its own, where MemoryCallback "
            f"attaches its memory during the fit, but got a {type(held).__name__}. Rename the attribute."
        )


def describe_backends(pl_module: LightningModule) -> str:
    """Return by which backends the pair losses of a module are computed, for the log; nothing if it has none."""
    losses = [loss for loss in pl_module.modules() if isinstance(loss, PairLoss)]
    parts = {part for loss in losses for part in loss.children()}  # the hybrid decides for both
    chosen = {"auto (blocks)" if loss.backend == "auto" else loss.backend for loss in losses if loss not in parts}
    return f"; backend of the losses: {' and '.join(sorted(chosen))}" if chosen else ""


def check_strategy(trainer: Trainer) -> None:
    """Refuse strategies after which memory, optimiser and step are lost.

    Raises:
        ValueError: If the ranks are processes that the program starts and that end with the fit.
    """
    method = ranks_start_method(trainer)
    if method is not None:
        raise ValueError(
            f"Expected a strategy whose ranks keep the memory, such as ddp, but got one with the start method {method} "
            "(ddp_spawn, ddp_fork and ddp_notebook). When its ranks end, memory, optimiser and step are lost. Pass "
            'strategy="ddp" in a script, or devices=1 in a notebook.'
        )
