"""A training from which nothing about classes can be learned, as a control."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_memdml.checks import check_types


class ShuffleLabels(Callback):
    """Shuffles the training labels, as a control.

    A comparison that cannot tell a training with shuffled labels from one with true labels shows nothing. Every class
    keeps its number of training images. Labels of validation and test stay as they are.

    Args:
        seed: Seed of the shuffle.

    Raises:
        TypeError: If the data module has no `train_set` with a tensor `labels`.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[ShuffleLabels()], logger=False, enable_checkpointing=False)
    """

    def __init__(self, seed: int = 0) -> None:
        check_types(ShuffleLabels.__init__, locals())
        self.seed = seed
        self._shuffled: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the training set by one with shuffled labels, before its loader is made."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        train_set = getattr(data, "train_set", None)
        if stage != "fit" or (train_set is not None and train_set is self._shuffled):
            return
        labels = getattr(train_set, "labels", None)
        if not isinstance(labels, Tensor):
            raise TypeError(
                "Expected a data module whose `train_set` has a tensor `labels`, one integer per image, but got "
                f"{type(data).__name__}. Use a data module of this package, or add `train_set`."
            )
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))
        self._shuffled = copy(train_set)
        self._shuffled.labels = labels[order]
        data.train_set = self._shuffled
