"""Gives pictures of a run to the loggers that show them."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger


def log_picture(trainer: Trainer, name: str, path: Path) -> None:
    """Give a picture to W&B, if it logs the run.

    Args:
        trainer: Of the run.
        name: Such as `memory/report`.
        path: The picture's file.
    """
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)], step=trainer.global_step)
