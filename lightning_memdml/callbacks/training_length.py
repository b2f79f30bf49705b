"""The length of a training from the number of its images."""

from __future__ import annotations

import math

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_memdml.checks import check_types
from lightning_memdml.readable_repr import options_repr
from lightning_memdml.training_images import find_train_set


class TrainingLength(Callback):
    r"""Trains for a number of passes over the training images, within bounds of the number of steps.

    $$
    \text{steps} = \min\big(\text{at\_most}, \max(\text{at\_least}, \lceil \text{passes} \cdot N / B \rceil)\big)
    $$

    N is the number of training images, and B the images of an optimiser step: the batches of all ranks, times
    `accumulate_grad_batches`. A `max_steps` or `max_epochs` of the Trainer comes first: the callback does nothing
    unless both are -1.

    Args:
        passes: How often every image is seen, above 0.
        at_least: Smallest number of optimiser steps.
        at_most: Largest number of optimiser steps, at least `at_least`.

    Raises:
        ValueError: If an argument is out of range, or the number of training images or the batch size is not known.

    Example:
        >>> TrainingLength(passes=8, at_least=300, at_most=5000).steps(images=2400, images_per_step=32)
        600
    """

    __repr__ = options_repr

    def __init__(self, passes: float = 8.0, at_least: int = 300, at_most: int = 5000) -> None:
        check_types(TrainingLength.__init__, locals())
        if not (0 < passes < math.inf and 1 <= at_least <= at_most):
            raise ValueError(
                "Expected `passes` above 0 and 1 <= `at_least` <= `at_most` but got "
                f"{passes}, {at_least} and {at_most}. Pass 8, 300 and 5000, for example."
            )
        self.passes, self.at_least, self.at_most = passes, at_least, at_most

    def steps(self, images: int, images_per_step: int) -> int:
        """Return the number of optimiser steps."""
        return min(self.at_most, max(self.at_least, math.ceil(self.passes * images / images_per_step)))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the length, before the scheduler of the learning rate is made."""
        if stage != "fit" or trainer.max_steps != -1 or trainer.max_epochs != -1:
            return
        images = find_train_set(trainer)
        batch_size = getattr(trainer.datamodule, "batch_size", None)  # type: ignore[attr-defined]
        if images is None or batch_size is None:
            raise ValueError(
                "Expected a data module with a `train_set` and a `batch_size`, from which TrainingLength computes the "
                "number of steps, but got none. Pass `Trainer(max_steps=...)`."
            )
        per_step = batch_size * trainer.world_size * trainer.accumulate_grad_batches
        steps = self.steps(len(images), per_step)
        trainer.fit_loop.epoch_loop.max_steps = steps
        rank_zero_info(
            f"Training for {steps} steps of {per_step} images, {steps * per_step / len(images):.1f} passes over "
            f"{len(images)} images. --trainer.max_steps sets another number."
        )
