"""A few steps of an arm, to estimate what its runs cost: no head is fitted, and one photograph is opened."""

from __future__ import annotations

import time
from copy import copy
from typing import Any

from PIL import Image
from torch import Tensor

from lightning_memdml.callbacks.memory import MemoryCallback
from lightning_memdml.data.images import ImageDataset, TensorImageDataset

OPENINGS = 3  # of one photograph: the first one waits for the disk


def prepare_probe(trainer: Any, learner: Any, data: Any) -> float:
    """Leave out what comes before the first step, and let one photograph stand in for all.

    To open all training images, as a fitted head and a memory that is filled first do, takes minutes. A memory stores
    rows from the first step on, so that its term is part of the time.

    Args:
        trainer: The Trainer of the probe.
        learner: The learner.
        data: The data module; one of this package is set up already, and others stay as they are.

    Returns:
        The milliseconds that the training process takes to open the images of a step. 0 if they are in memory, or if
        other processes open them.
    """
    learner.head_init = "default"
    for callback in trainer.callbacks:
        if isinstance(callback, MemoryCallback):
            callback.prefill, callback.start_step = False, 0
    images = getattr(data, "train_set", None)
    if not isinstance(images, ImageDataset) or isinstance(images, TensorImageDataset) or not len(images):
        return 0.0
    times = []
    for _ in range(OPENINGS):
        start = time.perf_counter()
        picture = images.open(0)
        times.append(1000 * (time.perf_counter() - start))
    data.train_set = copy(images)
    data.train_set.open_image = StandIn(picture)
    return 0.0 if data.num_workers else min(times) * data.batch_size


class StandIn:
    """Gives one image for every row.

    Args:
        image: The image.
    """

    def __init__(self, image: Image.Image | Tensor) -> None:
        self.image = image

    def __call__(self, row: int) -> Image.Image | Tensor:
        """Return the image."""
        return self.image
