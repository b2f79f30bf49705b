"""What a memory knows of itself: how full and how old it is, how far it has drifted, and what it does to the loss."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_memdml.atomic_write import atomic_write
from lightning_memdml.callbacks.memory import MemoryCallback, find_rows
from lightning_memdml.callbacks.training_images import BATCH_SIZE, embed, find_encoder, find_train_set, load_images
from lightning_memdml.callbacks.weight_curves import readable_losses
from lightning_memdml.losses import PairLoss
from lightning_memdml.memory.momentum_encoder import BatchNorm, MomentumEncoder
from lightning_memdml.memory.rows import as_rows, unit_rows
from lightning_memdml.runs import run_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PAIRS = 2**22  # weighed at once in a report: 64 anchors against 65,536 rows


class _Rows(NamedTuple):
    """A memory as a step found it."""

    embeddings: Tensor
    labels: Tensor
    indices: Tensor
    ages: Tensor  # in optimiser steps
    total: int  # over all ranks, which is more than here where every rank keeps a share


class MemoryReport(Callback):
    """Reports at an interval what the memory of `MemoryCallback` is like, as numbers, a table and one picture.

    All of it describes the memory as the step found it, before the step's own batch entered; of a `ShardedMemory` the
    rank's share, except `rows` and `fill`.

    **Numbers**, logged as `memory/...`:

    - `rows`, and `fill`, their share of the memory's size;
    - `age_mean`, `age_max`: optimiser steps since a row was stored, or last updated;
    - `classes`, and `class_coverage`, their share of the training classes, if there is a training set that can be
      indexed;
    - `drift`: 1 minus the cosine between a row and what the encoder that writes the rows makes of the same image now;
      the mean over `sample` random rows. `drift_young` and `drift_old` are those of the youngest and of the oldest
      quarter of the sample. Images are opened anew, as for validation where the data module has a `val_set`, without
      dropout, and normalised as `MemoryCallback(encoder_batch_norm=)` says. So the drift of a fresh row is not 0, but
      what its augmentation made of it: read `drift_old` against `drift_young`;
    - `network_drift`, with a momentum encoder: the same against the network itself, from which the anchors come;
    - `positives`, `negatives`: pairs of an anchor with the memory whose weight is not 0, per anchor, over the first
      anchors of the rank's batch (as many as make 4 million pairs), against all rows;
    - `share_of_loss`: the memory term, weight included, divided by itself plus the in-batch term.

    What there is no way to know is left out: drift without images that can be found by `indices`, pairs and share
    without a `PairLoss` as `loss` (and `memory_loss`) of the module.

    **Files.** `memory/report.csv` and `memory/report.png` in the run's folder, with all reports so far, also those of a
    run before its resume. W&B is given the picture, if it logs the run.

    Args:
        every_n_steps: Optimiser steps from one report to the next, at least 1. A report costs a forward of `sample`
            images (two with a momentum encoder), one loss, and half a second for the picture.
        sample: Rows recomputed for the drift, at least 4; 0 leaves the drift out.
        dirpath: Folder of the files; by default `memory` in the run's folder.
        loss: The loss to read, for a module that does not hold it as `loss`.

    Attributes:
        reports: All reports so far, each a dictionary of numbers.

    Raises:
        ValueError: If an argument is out of range; in `fit`, if there is no `MemoryCallback`.

    Example:
        >>> MemoryReport(every_n_steps=200).reports
        []
    """

    def __init__(
        self, every_n_steps: int = 500, sample: int = 256, dirpath: str | None = None, loss: PairLoss | None = None
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Expected `every_n_steps` of at least 1 optimiser step but got {every_n_steps}.")
        if sample != 0 and sample < 4:
            raise ValueError(f"Expected `sample` of at least 4 rows, or 0 for no drift, but got {sample}.")
        self.every_n_steps = every_n_steps
        self.sample = sample
        self.dirpath = dirpath
        self.loss = loss
        self.reports: list[dict[str, float]] = []
        self._found: _Rows | None = None
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start without reports, unless the same Trainer goes on or a checkpoint brings some."""
        if stage == "fit" and (trainer.global_step == 0 or trainer.ckpt_path is not None):
            self.reports = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the memory, and say what will be left out; a resumed run keeps its rhythm."""
        self._memory_callback(trainer)
        self._step = trainer.global_step
        if self.sample and find_train_set(trainer) is None:
            rank_zero_info("Memory: no drift is reported, as there is no training set whose images can be found again.")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the memory as the step finds it, if the step may be reported: it is written before this hears of it."""
        memory: Any = self._memory_callback(trainer).memory
        rows = getattr(memory, "share", memory)  # those that this rank holds
        self._found = None
        if len(rows) and self._due(trainer.global_step + len(trainer.optimizers)):
            was_read = rows.was_read
            embeddings, labels, indices = rows.read()
            rows.was_read = was_read  # by the training, which is what is watched over
            ages = trainer.global_step - rows.steps
            self._found = _Rows(embeddings.clone(), labels.clone(), indices.clone(), ages, len(memory))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report, if the optimiser stepped and it is time."""
        if not self._due(trainer.global_step):
            return
        self._step = trainer.global_step
        if self._found is None or (not outputs and pl_module.automatic_optimization):
            return
        found, self._found = self._found, None
        batch_rows = as_rows(**find_rows(type(self).__name__, pl_module, outputs))
        report = self._describe(trainer, found)
        report |= self._drift(trainer, pl_module, found)
        report |= self._effect(pl_module, found, *batch_rows)
        self.reports.append({"step": trainer.global_step, **report})
        pl_module.log_dict({f"memory/{name}": value for name, value in report.items()})
        self._save(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The reports so far."""
        return {"reports": self.reports}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the reports of a checkpoint."""
        self.reports = list(state_dict["reports"])

    def _memory_callback(self, trainer: Any) -> MemoryCallback:
        for callback in trainer.callbacks:
            if isinstance(callback, MemoryCallback):
                return callback
        raise ValueError(
            "MemoryReport reports on a memory, but there is none; pass "
            "`Trainer(callbacks=[MemoryCallback(size=8192), MemoryReport()])`."
        )

    def _due(self, step: int) -> bool:
        return step // self.every_n_steps > self._step // self.every_n_steps

    def _describe(self, trainer: Trainer, found: _Rows) -> dict[str, float]:
        size = self._memory_callback(trainer).memory.size or 1
        ages = found.ages.double()
        report = {
            "rows": found.total,
            "fill": found.total / size,
            "age_mean": float(ages.mean()),
            "age_max": float(ages.max()),
        }
        report["classes"] = len(found.labels.unique())
        labels = getattr(find_train_set(trainer), "labels", None)
        if isinstance(labels, Tensor):
            report["class_coverage"] = report["classes"] / len(labels.unique())
        return report

    def _drift(self, trainer: Trainer, pl_module: LightningModule, found: _Rows) -> dict[str, float]:
        images = _as_validated(trainer, find_train_set(trainer)) if self.sample else None
        if images is None:
            return {}
        usable = ((found.indices >= 0) & (found.indices < len(images))).nonzero().flatten()
        if len(usable) < 4:
            return {}
        # Random, but without touching the training's random numbers, and the same on all ranks.
        generator = torch.Generator().manual_seed(self._step)
        chosen = usable[torch.randperm(len(usable), generator=generator)[: self.sample].to(usable.device)]
        callback = self._memory_callback(trainer)
        network = find_encoder(pl_module, callback.encoder)
        writers: dict[str, nn.Module | MomentumEncoder] = {"drift": network}
        if callback.keys is not None:
            writers = {"drift": callback.keys, "network_drift": network}
        now = _embed_again(trainer, writers, images, found.indices[chosen], callback.encoder_batch_norm)
        if now is None:
            return {}
        drifts = {name: 1 - (rows * found.embeddings[chosen].float()).sum(dim=1) for name, rows in now.items()}
        by_age = drifts["drift"][found.ages[chosen].argsort(stable=True)]
        quarter = len(by_age) // 4
        report = {name: float(drift.mean()) for name, drift in drifts.items()}
        return report | {
            "drift_young": float(by_age[:quarter].mean()),
            "drift_old": float(by_age[-quarter:].mean()),
        }

    def _effect(
        self, pl_module: LightningModule, found: _Rows, embeddings: Tensor, labels: Tensor, indices: Tensor
    ) -> dict[str, float]:
        """Return how many pairs with the memory have a weight, and the memory's share of the loss."""
        losses = readable_losses(pl_module, self.loss)
        embeddings, usable = unit_rows(embeddings)
        embeddings, labels, indices = embeddings[usable], labels[usable], indices[usable]
        if "memory" not in losses or not len(labels):
            return {}
        if not getattr(pl_module, "memory_excludes_own_image", True):
            indices = torch.full_like(indices, -1)
        references = (found.embeddings.float(), found.labels)
        first = slice(0, max(1, MAX_PAIRS // len(found.labels)))
        weights = losses["memory"].pair_weights(
            embeddings[first], labels[first], *references, indices=indices[first], ref_indices=found.indices
        )
        counts = [float((side != 0).sum(dim=1).float().mean()) for side in weights]
        report = dict(zip(("positives", "negatives"), counts, strict=True))
        if "batch" in losses:
            with torch.no_grad():
                batch = losses["batch"](embeddings, labels, indices=indices)
                memory = losses["memory"](embeddings, labels, *references, indices=indices, ref_indices=found.indices)
            weight = getattr(pl_module, "memory_weight", 1.0)
            term = abs(float(memory)) * (weight(self._step) if callable(weight) else weight)
            report["share_of_loss"] = term / max(term + abs(float(batch)), 1e-12)
        return report

    def _save(self, trainer: Any) -> None:
        """Write table and picture, on rank 0: all ranks know the numbers, but none waits for another."""
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        folder = run_folder(trainer) / "memory" if self.dirpath is None else Path(self.dirpath)
        picture, table = folder / "report.png", folder / "report.csv"
        with atomic_write(table) as unfinished, unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for report in self.reports for name in report)))
            writer.writeheader()
            writer.writerows(self.reports)
        with atomic_write(picture) as unfinished:
            plot_reports(self.reports).savefig(unfinished, dpi=150)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("memory/report", [str(picture)], step=trainer.global_step)


def _as_validated(trainer: Any, images: Any | None) -> Any | None:
    """Return the training images with the transform of validation, where the data module says which that is."""
    validated = getattr(getattr(trainer.datamodule, "val_set", None), "transform", None)
    if images is None or validated is None or not hasattr(images, "transform"):
        return images
    clean = copy(images)
    clean.transform = validated
    return clean


def _embed_again(
    trainer: Trainer,
    writers: dict[str, nn.Module | MomentumEncoder],
    images: Any,
    indices: Tensor,
    batch_norm: BatchNorm,
) -> dict[str, Tensor] | None:
    """Return the rows each writer makes of these images now; None if the data set numbers its images otherwise."""
    rows: dict[str, list[Tensor]] = {name: [] for name in writers}
    batches = [part.tolist() for part in indices.split(BATCH_SIZE)]
    for wanted, (inputs, _, given) in zip(batches, load_images(trainer, images, batches), strict=True):
        if given.tolist() != wanted:
            return None
        for name, writer in writers.items():
            rows[name].append(unit_rows(embed(trainer, writer, inputs, batch_norm).float())[0])
    return {name: torch.cat(parts) for name, parts in rows.items()}


def plot_reports(reports: Sequence[dict[str, float]]) -> Figure:
    """Draw drift, pairs with a weight, and shares over the optimiser steps; a panel without numbers is left out.

    Args:
        reports: As `MemoryReport` collects them, at least one.

    Raises:
        ValueError: If there are none.
    """
    if not reports:
        raise ValueError("Expected at least one report to draw but got none.")
    from matplotlib.figure import Figure  # not pyplot: no window, no state that outlives the figure

    names = {name for report in reports for name in report}
    panels = [panel for panel in PANELS if names & set(panel.lines)]
    figure = Figure(figsize=(7, 0.6 + 1.9 * len(panels)), layout="constrained")
    drawn = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for panel, axes in zip(panels, drawn, strict=True):
        _draw(axes, panel, reports)
    drawn[-1].set_xlabel("optimiser step")
    return figure


class _Line(NamedTuple):
    """Told apart by colour and by line. The colours are those of Okabe and Ito, for every kind of sight."""

    label: str
    color: str
    style: str


class _Panel(NamedTuple):
    title: str
    lines: dict[str, _Line]
    log: bool = False


PANELS = (
    _Panel(
        "drift, 1 - cosine",
        {
            "drift_old": _Line("oldest quarter", "#D55E00", "-"),
            "drift": _Line("all rows", "#0072B2", "--"),
            "drift_young": _Line("youngest quarter", "#009E73", "-."),
            "network_drift": _Line("all, to the network itself", "#000000", ":"),
        },
    ),
    _Panel(
        "weighted pairs per anchor",
        {"positives": _Line("positives", "#0072B2", "-"), "negatives": _Line("negatives", "#D55E00", "--")},
        log=True,
    ),
    _Panel(
        "share",
        {
            "share_of_loss": _Line("of the loss", "#0072B2", "-"),
            "fill": _Line("of the rows filled", "#009E73", "--"),
            "class_coverage": _Line("of the classes seen", "#CC79A7", "-."),
        },
    ),
)


def _draw(axes: Axes, panel: _Panel, reports: Sequence[dict[str, float]]) -> None:
    steps = [report["step"] for report in reports]
    for name, line in panel.lines.items():
        values = [report.get(name, float("nan")) for report in reports]
        if any(value == value for value in values):
            mark = "o" if len(reports) < 20 else None  # a single report would be an invisible line
            axes.plot(
                steps, values, label=line.label, color=line.color, linestyle=line.style, marker=mark, markersize=3
            )
    if panel.log:
        from matplotlib.ticker import ScalarFormatter, SymmetricalLogLocator

        axes.set_yscale("symlog", linthresh=1, linscale=0.3)  # log, and 0 has a place
        axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=[1, 2, 5]))
        axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_ylim(0, None)
    axes.set_ylabel(panel.title, fontsize="small")
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", frameon=False, fontsize="small")
