"""The progress bar of a run: steps of the whole training, and the loss of each term per pair."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from lightning_memdml.losses import PairLoss
from lightning_memdml.run_display.score_lines import total_steps

REFRESH = 0.2  # seconds between two readings of the loss, which waits for a GPU
AVERAGED = 25  # readings


class StepBar(ProgressBar):
    """Shows the steps of the whole training in one bar, whatever its epochs, and each evaluation in a bar of its own.

    Beside the steps stands the loss of each term, averaged over the last seconds. A loss that is a sum over pairs is
    divided by the number of references, so that it does not grow with the batch or with the memory; a loss that is the
    logarithm of such a sum is shown as it is. In a file or a pipe there is no bar.

    Example:
        >>> bar = StepBar()
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm[Any] | None = None
        self._evaluation: tqdm[Any] | None = None
        self._is_enabled = True
        self._read_at = 0.0
        self._recent: dict[str, deque[float]] = {}

    def disable(self) -> None:
        """Show nothing, as on all ranks but the first."""
        self._is_enabled = False

    def enable(self) -> None:
        """Show bars again."""
        self._is_enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bars."""
        tqdm.write(" ".join(map(str, args)))

    # ------------------------------------------------------------------ training
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar of the training, at the step of a resumed run."""
        self._recent = {}
        self._bar = self._new("step", total_steps(trainer), "step", trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, and read the loss once in a while."""
        bar, now = self._bar, time.monotonic()
        if bar is None or bar.disable or now < self._read_at + REFRESH:
            return
        self._read_at = now
        for name, value in losses_per_pair(trainer, pl_module, outputs).items():
            self._recent.setdefault(name, deque(maxlen=AVERAGED)).append(value)
        means = {name: f"{sum(values) / len(values):.3g}" for name, values in self._recent.items()}
        bar.set_postfix(means, refresh=False)
        bar.update(trainer.global_step - bar.n)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar at the last step."""
        if self._bar is not None:
            self._bar.update(trainer.global_step - self._bar.n)
            self._bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close all bars, so that the error stands below them."""
        for bar in (self._evaluation, self._bar):
            if bar is not None:
                bar.close()

    # ------------------------------------------------------------------ evaluation
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a bar, which is shown if the validation takes more than a second."""
        self._start(
            "validation", trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        )

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        """Move the bar."""
        self._move()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._stop()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a bar."""
        self._start("test", trainer.num_test_batches)

    def on_test_batch_end(self, *_: Any, **__: Any) -> None:
        """Move the bar."""
        self._move()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._stop()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a bar."""
        self._start("embedding", trainer.num_predict_batches)

    def on_predict_batch_end(self, *_: Any, **__: Any) -> None:
        """Move the bar."""
        self._move()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._stop()

    def _start(self, name: str, batches: Any) -> None:
        total = sum(batches) if batches else None
        self._evaluation = self._new(name, total if total != float("inf") else None, "batch", leave=False, delay=1)

    def _move(self) -> None:
        if self._evaluation is not None:
            self._evaluation.update()

    def _stop(self) -> None:
        if self._evaluation is not None:
            self._evaluation.close()

    def _new(self, name: str, total: Any, unit: str, initial: int = 0, **options: Any) -> tqdm[Any]:
        hidden = True if not self._is_enabled else None  # None: hidden where the output is no terminal
        shape = "{desc} {n_fmt}/{total_fmt} {bar:20} {elapsed}<{remaining}, {rate_fmt}{postfix}"
        return tqdm(
            desc=name, total=total, unit=f" {unit}", initial=initial, file=sys.stderr, disable=hidden,
            dynamic_ncols=True, bar_format=shape, **options,
        )  # fmt: skip


def losses_per_pair(trainer: Trainer, pl_module: Any, outputs: Any) -> dict[str, float]:
    """Return the loss of the batch and, if there is a memory with rows, of the memory; see `StepBar`.

    Args:
        trainer: Whose `callback_metrics` hold the losses of this step.
        pl_module: With `loss`, and `memory_loss` and `memory` if there is one.
        outputs: What `training_step` returned.
    """
    logged, memory = trainer.callback_metrics, getattr(pl_module, "memory", None)
    name = "train/loss" if memory is None else "train/batch_loss"
    labels = outputs.get("labels") if isinstance(outputs, dict) else None
    if name not in logged or labels is None:
        return {}
    loss = getattr(pl_module, "loss", None)
    found = _per_pair("batch loss", float(logged[name]), loss, len(labels) - 1)
    if memory is not None and len(memory) and "train/memory_loss" in logged:
        own = getattr(pl_module, "memory_loss", None)
        found |= _per_pair("memory loss", float(logged["train/memory_loss"]), own or loss, len(memory))
    return found


def _per_pair(name: str, value: float, loss: Any, references: int) -> dict[str, float]:
    """Divide the loss of an anchor by the number of references, if it is a sum over pairs."""
    is_sum = isinstance(loss, PairLoss) and not any(part.exponential for part in (loss, *loss.parts))
    return {f"{name} per pair": value / max(1, references)} if is_sum else {name: value}
