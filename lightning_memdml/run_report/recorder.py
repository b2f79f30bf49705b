"""Remembers the numbers of a run for its report: losses and scores by step, and the embeddings of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_memdml.callbacks.gallery_logger import Pictures
from lightning_memdml.retrieval.metrics import Samples
from lightning_memdml.run_display.score_table import scores_of
from lightning_memdml.run_display.step_bar import losses_per_pair


class Evaluation(NamedTuple):
    """The embeddings of an evaluation and where their pictures are.

    Attributes:
        stage: `val` or `test`.
        step: Optimiser step.
        samples: Rows of queries and gallery, each image once.
        sets: The data set of the queries and that of the gallery, which may be one.
        shared_indices: Whether queries and gallery are numbered together.
    """

    stage: str
    step: int
    samples: Samples
    sets: tuple[Any, Any]
    shared_indices: bool

    @property
    def is_one_set(self) -> bool:
        """Whether every image is both query and gallery."""
        return len(self.samples.query) == len(self.samples.gallery) == len(self.samples.labels)

    def positions(self, rows: Tensor, place: int) -> list[int]:
        """Return the positions of rows in the data set of the queries (0) or of the gallery (1).

        Raises:
            ValueError: If the evaluation has no indices.
        """
        if self.samples.indices is None:
            raise ValueError("Expected the index of each image but got none. Pass indices to the metric's `update`.")
        return Pictures(self.sets[place], self.samples.indices[rows].cpu()).positions


class RunRecorder(Callback):
    """Records losses every `log_every_n_steps` steps, scores of each validation, and the last evaluation.

    Attributes:
        losses: Name -> `(step, value)` of each record, per pair as in the progress bar.
        scores: Name -> `(step, value)` of each validation.
        evaluation: The last one; None before the first.

    Example:
        >>> RunRecorder().losses
        {}
    """

    def __init__(self) -> None:
        self.losses: dict[str, list[tuple[int, float]]] = {}
        self.scores: dict[str, list[tuple[int, float]]] = {}
        self.evaluation: Evaluation | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the losses of the step."""
        every = max(1, getattr(trainer, "log_every_n_steps", 50))
        if trainer.global_step % every:
            return
        for name, value in losses_per_pair(trainer, pl_module, outputs).items():
            self.losses.setdefault(name, []).append((trainer.global_step, value))

    # Callbacks come before the module, which resets its metrics at the end of the epoch.

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the embeddings of the validation."""
        if not trainer.sanity_checking:
            self._keep("val", trainer, getattr(pl_module, "val_metrics", None), trainer.val_dataloaders)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the embeddings of the test."""
        self._keep("test", trainer, getattr(pl_module, "test_metrics", None), trainer.test_dataloaders)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the scores of the validation."""
        if trainer.sanity_checking:
            return
        size = None if self.evaluation is None else len(self.evaluation.samples.gallery)
        for name, value in scores_of(trainer.callback_metrics, "val", size).items():  # type: ignore[arg-type]
            self.scores.setdefault(name, []).append((trainer.global_step, value))

    def _keep(self, stage: str, trainer: Trainer, metrics: Any, loaders: Any) -> None:
        if metrics is None or not metrics.update_called:
            return
        loaders = loaders if isinstance(loaders, Sequence) else [loaders]
        rows = metrics.samples()  # of all ranks: every rank takes part
        samples = rows._make(None if column is None else column.cpu() for column in rows)
        sets = loaders[0].dataset, loaders[-1].dataset
        self.evaluation = Evaluation(stage, trainer.global_step, samples, sets, metrics.shared_indices)
