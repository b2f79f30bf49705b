"""What a run of a study measures, beside its scores."""

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

from lightning_memdml.callbacks.memory import find_rows
from lightning_memdml.callbacks.memory_report import MemoryReport
from lightning_memdml.callbacks.weight_curves import readable_losses
from lightning_memdml.curves import Pairs, Reading, read_weights
from lightning_memdml.curves.reading import SIDES
from lightning_memdml.memory.rows import as_rows, unit_rows
from lightning_memdml.retrieval.metrics import Samples

POINTS = 50  # of the training curve
BINS = 100  # of similarity in [-1, 1]
QUERIES = 1000  # whose similarities to the gallery are counted, at most
CURVE_STRIDE = 5  # of the 1001 points of an exact curve, every fifth is kept
DIGITS = 6


class DivergedError(RuntimeError):
    """A training made weights that are NaN or infinite."""


def has_diverged(module: nn.Module) -> bool:
    """Whether a weight is NaN or infinite."""
    return not all(bool(parameter.isfinite().all()) for parameter in module.parameters())


class RunRecorder(Callback):
    """Notes what a run does: time, losses, validation scores, pair weights, drift, scores of every test class.

    The training is not changed by it: nothing is drawn at random, and no loss is evaluated before the last step.

    Attributes:
        record: What was noted, ready for JSON.

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
        """Note the time and the loss; keep the last batch."""
        self._ends.append(time.perf_counter())
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            bin_ = (trainer.global_step - 1) * POINTS // max(1, trainer.max_steps)
            _, total, count = self._sums.get(bin_, (0, 0, 0))
            # Added up where it is computed: reading it would wait for a GPU at every step.
            self._sums[bin_] = (trainer.global_step, total + loss.detach().float(), count + 1)
        self._outputs = outputs

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the scores of a validation in the training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            scores = {
                name.removeprefix("val/"): _number(score)
                for name, score in trainer.callback_metrics.items()
                if name.startswith("val/")
            }
            if scores:
                self._validated.append({"step": trainer.global_step, **scores})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop a training that has diverged, whose embeddings cannot be scored.

        Raises:
            DivergedError: If a weight is NaN or infinite.
        """
        if has_diverged(pl_module):
            raise DivergedError(f"A weight was NaN or infinite at step {trainer.global_step}.")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gather what was noted until then."""
        self._gather(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather what was noted, and read the weights of the last batch."""
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
        """Return the median time between the ends of two steps, the first ten left out if there are more than twenty.

        It holds data, forward, backward, optimizer and memory.
        """
        ends = self._ends[10:] if len(self._ends) > 20 else self._ends
        steps = [after - before for before, after in pairwise(ends)]
        return round(1000 * statistics.median(steps), 3) if steps else None

    def _weights(self, pl_module: LightningModule) -> dict[str, Any]:
        """Read the losses on the last batch, and against the memory as it is now."""
        losses = readable_losses(pl_module, None)
        if not losses or not self._outputs:
            return {}
        embeddings, labels, indices = as_rows(**find_rows("The study", pl_module, self._outputs))
        self._outputs = None
        embeddings, usable = unit_rows(embeddings.detach())
        anchors = (embeddings[usable], labels[usable], indices[usable])
        readings = {"batch": read_weights(losses["batch"], Pairs(*anchors[:2], indices=anchors[2]))}
        memory = getattr(pl_module, "memory", None)
        if memory is not None and len(memory):
            ref_embeddings, ref_labels, ref_indices = memory.read()
            pairs = Pairs(*anchors[:2], ref_embeddings.float(), ref_labels, anchors[2], ref_indices)
            readings["memory"] = read_weights(losses["memory"], pairs)
        return {term: pack_reading(reading) for term, reading in readings.items()}

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Note the scores of every class and the similarities, before the learner forgets the embeddings."""
        table = pl_module.test_metrics.ranks().per_class(k=(1,))
        self.record["per_class"] = {name: _numbers(column) for name, column in table.items()}
        self.record["similarity"] = similarity_histograms(pl_module.test_metrics.samples())


def pack_reading(reading: Reading) -> dict[str, Any]:
    """Return a reading as plain numbers: of an exact curve every fifth point, of measured pairs the histogram."""
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
    """Count the similarities of test queries to the references of their own class, and of others.

    Queries are at most a thousand, evenly spread; no image is compared with itself.

    Args:
        samples: From `RetrievalMetrics.samples`.

    Returns:
        `positive` and `negative`, each the number of pairs in 100 bins over [-1, 1].
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
    """Return a plain number that JSON has: no more digits than mean something, and none for NaN and infinity."""
    value = float(value)
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.{DIGITS}g}")
