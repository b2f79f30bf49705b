"""Reports on a memory: fill, age, drift, and its effect on the loss."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_memdml.atomic_write import atomic_write
from lightning_memdml.callbacks.memory import MemoryCallback
from lightning_memdml.callbacks.run_pictures import log_picture
from lightning_memdml.callbacks.weight_curves import copy_rows, find_pair_losses
from lightning_memdml.checks import check_types
from lightning_memdml.csv_table import write_csv
from lightning_memdml.losses import PairLoss
from lightning_memdml.memory.momentum_encoder import BatchNorm, MomentumEncoder
from lightning_memdml.memory.rows import as_rows, unit_rows
from lightning_memdml.memory_term import step_embeddings
from lightning_memdml.picture_style import STYLES, LineStyle, new_figure, plain_axes
from lightning_memdml.readable_repr import options_repr
from lightning_memdml.runs import run_folder
from lightning_memdml.training_images import BATCH_SIZE, embed_batch, find_encoder, find_train_set, load_images

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PAIRS = 2**22  # weighed at once in a report: 64 anchors against 65,536 rows


class _Rows(NamedTuple):
    """The rows of a memory at the start of a step."""

    embeddings: Tensor
    labels: Tensor
    indices: Tensor
    ages: Tensor  # in optimiser steps
    total: int  # over all ranks, which is more than these rows where each rank holds a share


class MemoryReport(Callback):
    """Reports at an interval on the memory of `MemoryCallback`, as numbers, a table and one picture.

    The numbers describe the memory at the start of the step, before the step's own batch entered. Of a `ShardedMemory`
    they describe the rank's share, except `rows` and `fill`.

    **Numbers**, logged as `memory/...`:

    - `rows`, and `fill`, their share of the memory's size;
    - `age_mean`, `age_max`: optimiser steps since a row was stored, or last updated;
    - `classes`, and `class_coverage`, their share of the training classes, if there is a training set that can be
      indexed;
    - `drift`: 1 minus the cosine between a row and the current embedding of the same image by the encoder that writes
      the rows; the mean over `sample` random rows. `drift_young` and `drift_old` are the means over the youngest and
      the oldest quarter of the sample. Images are opened again, with the transform of validation where the data module
      has a `val_set`, without dropout, and with the batch norm of `MemoryCallback(encoder_batch_norm=)`. Because of the
      augmentation of the stored image, the drift of a new row is not 0: compare `drift_old` with `drift_young`;
    - `network_drift`, with a momentum encoder: the same against the network itself, which embeds the anchors;
    - `positives`, `negatives`: pairs of an anchor with the memory whose weight is not 0, per anchor, over the first
      anchors of the rank's batch (at most 4 million pairs), against all rows;
    - `share_of_loss`: the memory term, weight included, divided by the sum of itself and the in-batch term.

    Numbers that cannot be computed are left out: drift without images that can be found by `indices`, and pairs and
    share without a `PairLoss` as `loss` (and `memory_loss`) of the module.

    **Files.** `memory/report.csv` and `memory/report.png` in the run's folder, with all reports so far, also those
    before the run was resumed. W&B and TensorBoard receive the picture, if they log the run.

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

    __repr__ = options_repr

    def __init__(
        self, every_n_steps: int = 500, sample: int = 256, dirpath: str | None = None, loss: PairLoss | None = None
    ) -> None:
        check_types(MemoryReport.__init__, locals())
        if every_n_steps < 1:
            raise ValueError(
                f"Expected `every_n_steps` of at least 1 optimiser step but got {every_n_steps}. Pass 500, for example."
            )
        if sample != 0 and sample < 4:
            raise ValueError(f"Expected `sample` of at least 4 rows, or 0 for no drift, but got {sample}. Pass 256.")
        self.every_n_steps = every_n_steps
        self.sample = sample
        self.dirpath = dirpath
        self.loss = loss
        self.reports: list[dict[str, float]] = []
        self._found: _Rows | None = None
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the reports of another run; those of the same Trainer or of a checkpoint stay."""
        if stage == "fit" and (trainer.global_step == 0 or trainer.ckpt_path is not None):
            self.reports = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is a memory, and print what will be left out; a resumed run keeps its interval."""
        self._memory_callback(trainer)
        self._step = trainer.global_step
        if self.sample and find_train_set(trainer) is None:
            rank_zero_info(
                "Memory: drift is not reported, since there is no training set whose images can be found by index."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Copy the memory, if a report may follow: it is written before `on_train_batch_end` of this callback."""
        memory: Any = self._memory_callback(trainer).memory
        rows = getattr(memory, "share", memory)  # those that this rank holds
        self._found = None
        if len(rows) and self._due(trainer.global_step + len(trainer.optimizers)):
            self._found = _Rows(*copy_rows(memory), trainer.global_step - rows.steps, len(memory))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report, if the optimiser stepped and the interval has passed."""
        if not self._due(trainer.global_step):
            return
        self._step = trainer.global_step
        if self._found is None or (not outputs and pl_module.automatic_optimization):
            return
        found, self._found = self._found, None
        batch_rows = as_rows(**step_embeddings(type(self).__name__, pl_module, outputs))
        report = self._describe(trainer, found)
        report |= self._drift(trainer, pl_module, found)
        report |= self._effect(pl_module, found, *batch_rows)
        self.reports.append({"step": trainer.global_step, **report})
        pl_module.log_dict({f"memory/{name}": value for name, value in report.items()})
        self._save(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the reports so far."""
        return {"reports": self.reports}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the reports of a checkpoint."""
        self.reports = list(state_dict["reports"])

    def _memory_callback(self, trainer: Any) -> MemoryCallback:
        for callback in trainer.callbacks:
            if isinstance(callback, MemoryCallback):
                return callback
        raise ValueError(
            "Expected a MemoryCallback, on whose memory MemoryReport reports, but there is none. Pass "
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
        # A generator of its own: the training's random numbers stay as they are, and all ranks draw the same.
        generator = torch.Generator().manual_seed(self._step)
        chosen = usable[torch.randperm(len(usable), generator=generator)[: self.sample].to(usable.device)]
        callback = self._memory_callback(trainer)
        network = find_encoder(pl_module, callback.encoder)
        writers: dict[str, nn.Module | MomentumEncoder] = {"drift": network}
        if callback.momentum_encoder is not None:
            writers = {"drift": callback.momentum_encoder, "network_drift": network}
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
        """Return the number of weighted pairs with the memory, and the memory's share of the loss."""
        losses = find_pair_losses(pl_module, self.loss)
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
        """Write table and picture, on rank 0 and without waiting for other ranks."""
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        folder = run_folder(trainer) / "memory" if self.dirpath is None else Path(self.dirpath)
        picture, table = folder / "report.png", folder / "report.csv"
        names = list(dict.fromkeys(name for report in self.reports for name in report))
        write_csv(table, names, ([report.get(name) for name in names] for report in self.reports))
        with atomic_write(picture) as temporary:
            plot_reports(self.reports).savefig(temporary, dpi=150)
        log_picture(trainer, "memory/report", picture)


def _as_validated(trainer: Any, images: Any | None) -> Any | None:
    """Return the training images with the transform of validation, where the data module has one."""
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
    """Return the current rows of these images by each encoder; None if the data set has other indices."""
    rows: dict[str, list[Tensor]] = {name: [] for name in writers}
    batches = [part.tolist() for part in indices.split(BATCH_SIZE)]
    for wanted, (inputs, _, given) in zip(batches, load_images(trainer, images, batches), strict=True):
        if given.tolist() != wanted:
            return None
        for name, writer in writers.items():
            rows[name].append(unit_rows(embed_batch(trainer, writer, inputs, batch_norm).float())[0])
    return {name: torch.cat(parts) for name, parts in rows.items()}


def plot_reports(reports: Sequence[dict[str, float]]) -> Figure:
    """Draw drift, weighted pairs and shares over the optimiser steps; a panel without numbers is left out.

    Args:
        reports: As `MemoryReport` collects them, at least one.

    Raises:
        ValueError: If there are none.
    """
    if not reports:
        raise ValueError("Expected at least one report to draw but got none. Train for `every_n_steps` steps first.")
    names = {name for report in reports for name in report}
    panels = [panel for panel in PANELS if names & set(panel.lines)]
    figure = new_figure(7, 0.6 + 1.9 * len(panels))
    drawn = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for panel, axes in zip(panels, drawn, strict=True):
        _draw(axes, panel, reports)
    drawn[-1].set_xlabel("optimiser step")
    return figure


class _Panel(NamedTuple):
    title: str
    lines: dict[str, tuple[str, LineStyle]]  # name of the number -> label and style
    log: bool = False


PANELS = (
    _Panel(
        "drift, 1 - cosine",
        {
            "drift_old": ("oldest quarter", STYLES[1]._replace(line="-")),
            "drift": ("all rows", STYLES[0]._replace(line="--")),
            "drift_young": ("youngest quarter", STYLES[2]._replace(line="-.")),
            "network_drift": ("all, to the network itself", STYLES[4]._replace(line=":")),
        },
    ),
    _Panel(
        "weighted pairs per anchor",
        {
            "positives": ("positives", STYLES[0]._replace(line="-")),
            "negatives": ("negatives", STYLES[1]._replace(line="--")),
        },
        log=True,
    ),
    _Panel(
        "share",
        {
            "share_of_loss": ("of the loss", STYLES[0]._replace(line="-")),
            "fill": ("of the rows filled", STYLES[2]._replace(line="--")),
            "class_coverage": ("of the classes seen", STYLES[3]._replace(line="-.")),
        },
    ),
)


def _draw(axes: Axes, panel: _Panel, reports: Sequence[dict[str, float]]) -> None:
    steps = [report["step"] for report in reports]
    for name, (label, style) in panel.lines.items():
        values = [report.get(name, float("nan")) for report in reports]
        if any(value == value for value in values):
            mark = style.mark if len(reports) < 20 else None  # a single report would be an invisible line
            axes.plot(steps, values, label=label, color=style.color, linestyle=style.line, marker=mark, markersize=3)
    if panel.log:
        from matplotlib.ticker import ScalarFormatter, SymmetricalLogLocator

        axes.set_yscale("symlog", linthresh=1, linscale=0.3)  # log, and 0 has a place
        axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=[1, 2, 5]))
        axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_ylim(0, None)
    axes.set_ylabel(panel.title, fontsize="small")
    plain_axes(axes)
    if axes.get_legend_handles_labels()[0]:  # a panel without a number has no line
        axes.legend(loc="best", frameon=False, fontsize="small")
