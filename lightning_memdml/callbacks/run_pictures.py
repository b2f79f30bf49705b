"""Prints where the pictures of a run are, and gives them to the loggers that show them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info


def log_picture(trainer: Trainer, name: str, path: Path) -> None:
    """Print the path of a picture, and give it to W&B and TensorBoard, if they log the run.

    Args:
        trainer: Of the run.
        name: Such as `memory/report`.
        path: The picture's file.
    """
    rank_zero_info(f"Picture: {path}")
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)], step=trainer.global_step)
        if isinstance(logger, TensorBoardLogger):
            from PIL import Image

            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            logger.experiment.add_image(name, pixels, trainer.global_step, dataformats="HWC")
