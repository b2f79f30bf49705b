"""A memory layout in which convolutions are faster."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class ChannelsLast(Callback):
    """Stores the weights of convolutions in the channels-last memory format, which all feature maps then have too.

    The network computes the same numbers within rounding. On a CPU a training step of MobileNetV2 at 129 pixels takes
    about half the time, one of a MobileNetV1 of width 0.25 three quarters. On a GPU it helps under mixed precision.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[ChannelsLast()], logger=False, enable_checkpointing=False)
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Change the layout of all weights with four dimensions."""
        pl_module.to(memory_format=torch.channels_last)
