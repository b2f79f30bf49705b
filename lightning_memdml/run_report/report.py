"""Writes the report of a run as one page, and gives it to the loggers that show pages or text."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from lightning_memdml.atomic_write import atomic_write
from lightning_memdml.callbacks.weight_curves import find_pair_losses
from lightning_memdml.html_page import html_page
from lightning_memdml.retrieval.page import GALLERY_STYLE
from lightning_memdml.run_display.score_lines import rounded
from lightning_memdml.run_display.score_table import score_line, scores_of
from lightning_memdml.run_report import sections
from lightning_memdml.run_report.data_section import data_section
from lightning_memdml.run_report.recorder import RunRecorder
from lightning_memdml.run_report.style import REPORT_STYLE

LIBRARIES = ("lightning-memdml", "torch", "torchvision", "lightning")
STAGES = {"val": "validation classes", "test": "test classes"}


def write_report(
    path: Path,
    recorder: RunRecorder,
    trainer: Trainer,
    learner: Any,
    data: Any,
    configuration: str,
    reference: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Write the report of a training or a test, print its path, and log it to W&B and TensorBoard.

    Args:
        path: The file.
        recorder: With the numbers of the run.
        trainer: Of the run.
        learner: With the losses.
        data: The data module.
        configuration: As YAML.
        reference: Scores in [0, 1] of the network before the training: name -> score -> value.
    """
    page = report_page(recorder, trainer, learner, data, configuration, reference or {})
    with atomic_write(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    rank_zero_info(f"Report: {path}")
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            html: Any = wandb.Html(page, inject=False)
            logger.log_metrics({"report": html}, step=trainer.global_step)
        if isinstance(logger, TensorBoardLogger):  # which shows no pages
            stage = "val" if recorder.evaluation is None else recorder.evaluation.stage
            scores = score_line(scores_of(trainer.callback_metrics, stage))  # type: ignore[arg-type]
            logger.experiment.add_text("report", f"{scores} in percent. The report: `{path}`", trainer.global_step)
    return path


def report_page(
    recorder: RunRecorder,
    trainer: Trainer,
    learner: Any,
    data: Any,
    configuration: str,
    reference: Mapping[str, Mapping[str, float]],
) -> str:
    """Return the page; arguments as those of `write_report`."""
    names = getattr(data, "classes", None)
    classes = None if names is None else [str(name) for name in names]
    evaluation = recorder.evaluation
    scored = None if evaluation is None or not len(evaluation.samples.query) else sections.Scored(evaluation, classes)
    is_test = evaluation is not None and evaluation.stage == "test"
    stage = "" if evaluation is None else f" of the {STAGES[evaluation.stage]}"
    if evaluation is not None and not is_test:
        stage += f" at step {evaluation.step:,} of {trainer.global_step:,}"
    parts = []
    if scored is None:
        advice = "There were no validation classes. <code>memdml test</code> writes a report of the test classes."
        parts.append(_section("Scores", f"<p>{advice}</p>"))
    else:
        levels = learner.test_metrics.k if is_test else learner.val_metrics.k
        parts.append(_section(f"Scores{stage}", sections.scores_section(scored, levels, reference)))
        parts.append(_section("Hardest queries first", sections.gallery_section(scored)))
    parts.append(_section("Training", sections.curves_section(recorder)))
    if scored is not None:
        parts.append(_section("Classes", sections.classes_section(scored)))
        parts.append(_section("Map of the embeddings", sections.map_section(scored)))
    losses = find_pair_losses(learner, None)
    if getattr(learner, "memory_loss", None) is None:
        losses.pop("memory", None)  # the same as in the batch
    parts.append(_section("Weights of the pairs", sections.weights_section(losses, scored)))
    parts.append(_section("Data", data_section(sets_of(data), classes)))
    shown = f"<details><summary>All options</summary><pre>{escape(configuration)}</pre></details>"
    parts.append(_section("Configuration", f"<p>{escape(_versions())}</p>{shown}"))
    parameters = sum(parameter.numel() for parameter in learner.parameters())
    steps = "" if is_test else f", {trainer.global_step:,} steps"
    introduction = f"{escape(str(data))}. {rounded(parameters)} parameters{steps}."
    title = "Test report" if is_test else "Training report"
    return html_page(title, introduction, "\n".join(filter(None, parts)), GALLERY_STYLE + REPORT_STYLE)


def sets_of(data: Any) -> dict[str, Any]:
    """Return the sets of a data module that are not empty, by what they are for."""
    found = {"train": "train_set", "validation": "val_set", "query": "query_set", "gallery": "gallery_set"}
    sets = {name: getattr(data, attribute, None) for name, attribute in found.items()}
    if sets["query"] is sets["gallery"]:
        sets["test"] = sets.pop("query")
        del sets["gallery"]
    return {name: images for name, images in sets.items() if images is not None and len(images)}


def _section(title: str, content: str) -> str:
    return f'<section class="part"><h2>{escape(title)}</h2>{content}</section>' if content else ""


def _versions() -> str:
    return ", ".join(
        [*(f"{library} {_version(library)}" for library in LIBRARIES), f"Python {platform.python_version()}"]
    )


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "unknown"
