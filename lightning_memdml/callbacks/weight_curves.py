"""Reports on the pair weights of a training: pictures, tables, and numbers for the logger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_memdml.callbacks.run_pictures import log_picture
from lightning_memdml.checks import check_types
from lightning_memdml.curves import LossInputs, Reading, read_weights, save_readings
from lightning_memdml.losses import PairLoss
from lightning_memdml.memory.rows import as_rows, unit_rows
from lightning_memdml.memory_term import step_embeddings
from lightning_memdml.readable_repr import options_repr
from lightning_memdml.runs import run_folder


class WeightCurveLogger(Callback):
    """Measures the weights of the pairs of a training: in the batch, and of the batch against the memory.

    At an interval it weighs the pairs of the current batch again, with the losses of the module: in the batch with
    `pl_module.loss`, and against the rows of `pl_module.memory` at the start of the step with `pl_module.memory_loss`,
    or `pl_module.loss` if there is none. The weights are those of the loss of one anchor: before `memory_weight`, and
    before the mean over the batch. The training is not changed.

    **Files.** `weights/batch_0000500.png` and `weights/memory_0000500.png` in the run's folder, each with a `.csv` of
    curves and sampled pairs and a `_histogram.csv` of all pairs. W&B and TensorBoard receive the pictures, if they log
    the run.

    **Numbers.** `weights/batch_positives`, `weights/batch_negatives`: pairs whose weight is not 0, per anchor.
    `weights/batch_positive_mass`, `weights/batch_negative_mass`: the sum of weights, per anchor. The same with
    `memory_`. They describe the rank's own batch. A logger receives them at the steps of
    `Trainer(log_every_n_steps=)`.

    `training_step` returns embeddings and labels as for `MemoryCallback`; the order of the two callbacks does not
    matter. Rows that are NaN, infinite or zero are left out, as in the memory.

    Args:
        every_n_steps: Optimiser steps from one measurement to the next, at least 1. A measurement takes about a second,
            most of it for the pictures.
        dirpath: Folder of the files; by default `weights` in the run's folder.
        loss: The loss, in the batch and against the memory, for a module that does not hold it as `loss`.

    Raises:
        ValueError: If `every_n_steps` is below 1; in `fit`, if there is no `PairLoss`, or `training_step` returned no
            embeddings and labels.

    Example:
        >>> WeightCurveLogger(every_n_steps=500).every_n_steps
        500
    """

    __repr__ = options_repr

    def __init__(self, every_n_steps: int = 1000, dirpath: str | None = None, loss: PairLoss | None = None) -> None:
        check_types(WeightCurveLogger.__init__, locals())
        if every_n_steps < 1:
            raise ValueError(
                f"Expected `every_n_steps` of at least 1 optimiser step but got {every_n_steps}. Pass 1000."
            )
        self.every_n_steps = every_n_steps
        self.dirpath = dirpath
        self.loss = loss
        self._references: tuple[Tensor, Tensor, Tensor] | None = None
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module without a pair loss at the start of the training; a resumed run keeps its interval."""
        self._losses(pl_module)
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Copy the memory, if a measurement may follow: other callbacks write it before `on_train_batch_end`."""
        memory = getattr(pl_module, "memory", None)
        self._references = None
        if memory is not None and len(memory) and self._due(trainer.global_step + len(trainer.optimizers)):
            self._references = copy_rows(memory)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure the weights, if the optimiser stepped and the interval has passed."""
        if not self._due(trainer.global_step) or (not outputs and pl_module.automatic_optimization):
            return
        self._step = trainer.global_step
        embeddings, labels, indices = as_rows(**step_embeddings(type(self).__name__, pl_module, outputs))
        embeddings, usable = unit_rows(embeddings)  # in fp32 under any precision, as the memory stores them
        batch_rows = (embeddings[usable], labels[usable], indices[usable])
        for term, reading in self._read(pl_module, *batch_rows).items():
            pl_module.log_dict({f"weights/{term}_{name}": value for name, value in reading.per_anchor().items()})
            self._save(trainer, term, reading)
        self._references = None

    def _due(self, step: int) -> bool:
        return step // self.every_n_steps > self._step // self.every_n_steps

    def _read(
        self, pl_module: LightningModule, embeddings: Tensor, labels: Tensor, indices: Tensor
    ) -> dict[str, Reading]:
        pairs = {"batch": LossInputs(embeddings, labels, indices=indices)}
        if self._references is not None:
            ref_embeddings, ref_labels, ref_indices = self._references
            pairs["memory"] = LossInputs(embeddings, labels, ref_embeddings, ref_labels, indices, ref_indices)
        losses = self._losses(pl_module)
        return {term: read_weights(losses[term], pairs[term]) for term in pairs if term in losses}

    def _losses(self, pl_module: LightningModule) -> dict[str, PairLoss]:
        """Return the pair loss of each term."""
        losses = find_pair_losses(pl_module, self.loss)
        if not losses:
            found = getattr(pl_module, "loss", None) if self.loss is None else self.loss
            raise ValueError(
                f"Expected a PairLoss, which has pair weights, as `{type(pl_module).__name__}.loss` but got "
                f"{type(found).__name__}. Pass `WeightCurveLogger(loss=ContrastiveLoss())`."
            )
        return losses

    def _save(self, trainer: Any, term: str, reading: Reading) -> None:
        """Write the files, on rank 0 and without waiting for other ranks."""
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        folder = run_folder(trainer) / "weights" if self.dirpath is None else Path(self.dirpath)
        picture, *_ = save_readings([reading], folder, f"{term}_{trainer.global_step:07d}")
        log_picture(trainer, f"weights/{term}", picture)


def copy_rows(memory: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return copies of the embeddings, labels and indices that this rank holds.

    `was_read` stays as it is: the callback warns if the training itself does not read the memory.
    """
    rows = getattr(memory, "share", memory)  # those of this rank
    was_read = rows.was_read
    embeddings, labels, indices = rows.read()
    rows.was_read = was_read
    return embeddings.clone(), labels.clone(), indices.clone()


def find_pair_losses(pl_module: LightningModule, given: PairLoss | None) -> dict[str, PairLoss]:
    """Return the pair losses of a module, by the terms `batch` and `memory`.

    Args:
        pl_module: Holds them as `loss` and, if the memory has its own, `memory_loss`.
        given: The loss of both, for a module that does not hold them so.
    """
    batch = getattr(pl_module, "loss", None) if given is None else given
    memory = getattr(pl_module, "memory_loss", None) if given is None else given
    losses = {"batch": batch, "memory": batch if memory is None else memory}
    return {term: loss for term, loss in losses.items() if isinstance(loss, PairLoss)}
