"""Records of a study run beside its scores: time, losses, pair weights, drift, similarities."""

from __future__ import annotations

import math
import statistics
import time
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_memdml.callbacks.memory_report import MemoryReport
from lightning_memdml.callbacks.weight_curves import find_pair_losses
from lightning_memdml.curves import LossInputs, Reading, read_weights
from lightning_memdml.curves.reading import SIDES
from lightning_memdml.memory.rows import as_rows, unit_rows
from lightning_memdml.memory_term import step_embeddings
from lightning_memdml.retrieval.metrics import Samples

POINTS = 50  # of the training curve
BINS = 100  # of similarity in [-1, 1]
QUERIES = 1000  # whose similarities to the gallery are counted, at most
CURVE_STRIDE = 5  # of the 1001 points of an exact curve, every fifth is kept
DIGITS = 6


class DivergedError(RuntimeError):
    """The training produced NaN or infinite weights."""


def has_diverged(module: nn.Module) -> bool:
    """Return whether any weight is NaN or infinite."""
    return not all(bool(parameter.isfinite().all()) for parameter in module.parameters())


class RunRecorder(Callback):
    """Records time, losses, validation scores, pair weights, drift, and the scores of every test class.

    It does not change the training: it uses no random numbers, and evaluates no loss before the last step.

    Attributes:
        record: The recorded values, ready for JSON.

    Example:
        >>> RunRecorder().record
        {}
    """

    def __init__(self) -> None:
        self.record: dict[str, Any] = {}
        self._ends: list[float] = []
        self._sums: dict[int, tuple[int, Any, int]] = {}
        self._validated: list[dict[str, float]] = []
        self._outputs: Any = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the time and the loss; keep the last batch."""
        self._ends.append(time.perf_counter())
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            bin_ = (trainer.global_step - 1) * POINTS // max(1, trainer.max_steps)
            _, total, count = self._sums.get(bin_, (0, 0, 0))
            # Summed on its device: reading the value would synchronise with the GPU at every step.
            self._sums[bin_] = (trainer.global_step, total + loss.detach().float(), count + 1)
        self._outputs = outputs

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the scores of a validation during training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            scores = {
                name.removeprefix("val/"): _number(score)
                for name, score in trainer.callback_metrics.items()
                if name.startswith("val/")
            }
            if scores:
                self._validated.append({"step": trainer.global_step, **scores})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop a diverged training, whose embeddings cannot be scored.

        Raises:
            DivergedError: If a weight is NaN or infinite.
        """
        if has_diverged(pl_module):
            raise DivergedError(
                f"Expected finite weights but got NaN or infinity at step {trainer.global_step}. Lower the learning "
                "rate."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Collect the record of an interrupted training."""
        self._gather(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the record, and read the pair weights of the last batch."""
        self._gather(trainer)
        self.record["weights"] = self._weights(pl_module)

    def _gather(self, trainer: Trainer) -> None:
        self.record |= {
            "steps": trainer.global_step,
            "ms_per_step": self.milliseconds(),
            "training": [{"step": step, "loss": _number(total / count)} for step, total, count in self._sums.values()],
            "validation": self._validated,
            "memory": [
                {name: _number(value) for name, value in report.items()}
                for callback in trainer.callbacks  # type: ignore[attr-defined]
                if isinstance(callback, MemoryReport)
                for report in callback.reports
            ],
        }

    def milliseconds(self) -> float | None:
        """Return the median time of a step: data, forward, backward, optimiser and memory.

        The first ten steps are left out if there are more than twenty.
        """
        ends = self._ends[10:] if len(self._ends) > 20 else self._ends
        steps = [after - before for before, after in pairwise(ends)]
        return round(1000 * statistics.median(steps), 3) if steps else None

    def _weights(self, pl_module: LightningModule) -> dict[str, Any]:
        """Read the pair weights of the losses in the last batch, and against the current memory."""
        losses = find_pair_losses(pl_module, None)
        if not losses or not self._outputs:
            return {}
        embeddings, labels, indices = as_rows(**step_embeddings("The study", pl_module, self._outputs))
        self._outputs = None
        embeddings, usable = unit_rows(embeddings.detach())
        anchors = (embeddings[usable], labels[usable], indices[usable])
        readings = {"batch": read_weights(losses["batch"], LossInputs(*anchors[:2], indices=anchors[2]))}
        memory = getattr(pl_module, "memory", None)
        if memory is not None and len(memory):
            ref_embeddings, ref_labels, ref_indices = memory.read()
            pairs = LossInputs(*anchors[:2], ref_embeddings.float(), ref_labels, anchors[2], ref_indices)
            readings["memory"] = read_weights(losses["memory"], pairs)
        return {term: pack_reading(reading) for term, reading in readings.items()}

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Record the scores of every class and the similarities, before the learner resets its metrics."""
        table = pl_module.test_metrics.ranks().per_class(k=(1,))
        self.record["per_class"] = {name: _numbers(column) for name, column in table.items()}
        self.record["similarity"] = similarity_histograms(pl_module.test_metrics.samples())


def pack_reading(reading: Reading) -> dict[str, Any]:
    """Convert a reading to plain numbers: every fifth point of an exact curve, the histogram of measured pairs."""
    packed: dict[str, Any] = {"loss": reading.loss, "anchors": reading.anchors, "references": reading.references}
    for side in SIDES:
        curve, measured = reading.side(side)
        packed[side] = {
            "curve": None if curve is None else _numbers(curve.weight[::CURVE_STRIDE]),
            "divided": curve is not None and curve.divided,
            "pairs": None if measured is None else measured.pairs.tolist(),
            "mass": None if measured is None else _numbers(measured.mass),
        }
    return packed


@torch.no_grad()
def similarity_histograms(samples: Samples) -> dict[str, list[int]]:
    """Count the similarities of test queries to images of their own class and of other classes.

    At most 1,000 evenly spaced queries are used. No image is compared with itself.

    Args:
        samples: From `RetrievalMetrics.samples`.

    Returns:
        For `positive` and `negative`, the number of pairs in each of 100 bins over [-1, 1].
    """
    rows = F.normalize(samples.embeddings)
    query = samples.query[:: max(1, math.ceil(len(samples.query) / QUERIES))]
    counts = {"positive": torch.zeros(BINS), "negative": torch.zeros(BINS)}
    for part in query.split(100):
        similarity = rows[part] @ rows[samples.gallery].T
        same = samples.labels[part][:, None] == samples.labels[samples.gallery]
        own = part[:, None] == samples.gallery
        if samples.indices is not None:
            own = own | (samples.indices[part][:, None] == samples.indices[samples.gallery])
        for side, mask in (("positive", same & ~own), ("negative", ~same & ~own)):
            counts[side] += torch.histc(similarity[mask].float().cpu(), BINS, -1, 1)
    return {side: count.long().tolist() for side, count in counts.items()}


def _numbers(column: Tensor) -> list[float]:
    return [_number(value) for value in column.tolist()]


def _number(value: Any) -> Any:
    """Return a number that JSON can hold, with six significant digits; `None` for NaN and infinity."""
    value = float(value)
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.{DIGITS}g}")
