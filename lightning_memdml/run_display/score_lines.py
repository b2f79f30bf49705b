"""Prints the scores of a run: a line after every validation, and a table at the end of `validate` and `test`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from lightning_memdml.run_display.score_table import score_line, score_table, scores_of

STAGES = {"val": "Validation classes", "test": "Test classes"}


def total_steps(trainer: Trainer) -> int | None:
    """Return how many optimiser steps a training takes as a whole; None where that is not known."""
    steps = trainer.estimated_stepping_batches
    return None if math.isinf(steps) else int(steps)


def rounded(count: int) -> str:
    """Return a large number as a person would write it.

    Example:
        >>> rounded(224896), rounded(23508032), rounded(912)
        ('225 thousand', '23.5 million', '912')
    """
    if count < 10_000:
        return f"{count:,}"
    return f"{count / 1e3:.0f} thousand" if count < 999_500 else f"{count / 1e6:.1f} million"


class ScoreLines(Callback):
    """Prints what a training starts from, the scores of each validation in a line, and the scores of a test in a table.

    Attributes:
        has_trained: Whether a training has begun.

    Example:
        >>> ScoreLines().has_trained
        False
    """

    def __init__(self) -> None:
        self.has_trained = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the size of the network and of the data, and the step from which a resumed run continues."""
        self.has_trained = True
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in pl_module.parameters()]
        total, trained = sum(size for size, _ in sizes), sum(size for size, wanted in sizes if wanted)
        part = "all trained" if trained == total else f"{rounded(trained)} trained"
        data: Any = getattr(trainer, "datamodule", None)
        if data is not None:
            rank_zero_info(f"{data}.")
        rank_zero_info(f"Network: {rounded(total)} parameters, {part}.")
        if trainer.global_step:
            rank_zero_info(f"Resumed at step {trainer.global_step:,} from {trainer.ckpt_path}.")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print a line in a training, a table at the end of `validate`."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        scores = scores_of(trainer.callback_metrics, "val", _gallery_size(trainer.val_dataloaders))  # type: ignore[arg-type]
        if not scores:
            return
        if trainer.state.fn == "fit":
            steps = total_steps(trainer)
            counted = f"{trainer.global_step:,}" + ("" if steps is None else f"/{steps:,}")
            tqdm.write(f"step {counted}  {score_line(scores)}")
        else:
            tqdm.write(score_table(STAGES["val"], scores))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table of the test."""
        if trainer.is_global_zero:
            scores = scores_of(trainer.callback_metrics, "test", _gallery_size(trainer.test_dataloaders))  # type: ignore[arg-type]
            tqdm.write(score_table(STAGES["test"], scores))


def _gallery_size(loaders: Any) -> int | None:
    """Return the number of images in the last loader, which is the gallery; None for a stream."""
    last = loaders[-1] if isinstance(loaders, Sequence) else loaders
    try:
        return len(last.dataset)
    except (AttributeError, TypeError):
        return None
