"""Trains with several memories, and draws how far their rows drift and what they do to the loss, in one picture.

Every configuration, which holds a `MemoryCallback`, is one arm; further arguments are those of ``memdml fit``.

    python experiments/drift.py glyphs_{memory,momentum,instance} --picture runs/drift.png
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

from matplotlib.figure import Figure

from lightning_memdml import MemoryReport
from lightning_memdml.demo import build_run

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito
LINES = ("-", "--", "-.", ":")
PANELS = {
    "all rows against what their\nencoder makes now": "drift",
    "youngest quarter of them": "drift_young",
    "all rows against what the\nnetwork makes now": "network_drift",
    "weighted negatives\nper anchor": "negatives",
}
Report = dict[str, float]


def train(config: str, arguments: list[str], reports: int, seed: int) -> list[Report]:
    """Train one arm, and return its reports."""
    quiet = ["--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"]
    cli = build_run(config, [*quiet, *arguments], seed)
    with tempfile.TemporaryDirectory() as folder:
        report = MemoryReport(max(1, cli.trainer.max_steps // reports), dirpath=folder)
        cli.trainer.callbacks.append(report)
        cli.trainer.fit(cli.model, cli.datamodule)
    for entry in report.reports:
        entry.setdefault("network_drift", entry["drift"])  # without a momentum encoder the network writes the rows
    return report.reports


def draw(arms: dict[str, list[Report]]) -> Figure:
    """Draw every arm as one line in each panel; drifts are 1 - cosine."""
    figure = Figure(figsize=(7, 1.2 + 1.6 * len(PANELS)), layout="constrained")
    for axes, (title, name) in zip(figure.subplots(len(PANELS), 1, sharex=True), PANELS.items(), strict=True):
        for (arm, reports), color, line in zip(arms.items(), COLORS, LINES, strict=False):
            axes.plot([r["step"] for r in reports], [r[name] for r in reports], line, color=color, label=arm)
        axes.set_ylabel(title, fontsize="small")
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(min(0, axes.get_ylim()[0]), None)
    axes.set_xlabel("optimiser step")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=len(arms), frameon=False)
    return figure


def main() -> None:
    """Train all arms and save the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", help="one configuration file with a MemoryCallback per arm")
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--reports", type=int, default=25, help="reports per run")
    parser.add_argument("--seed", type=int, default=0)
    options, arguments = parser.parse_known_args()
    for quiet in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(quiet).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
    arms = {}
    for config in options.configs:
        arms[Path(config).stem] = train(config, arguments, options.reports, options.seed)
        print(Path(config).stem, {name: round(value, 3) for name, value in arms[Path(config).stem][-1].items()})
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(arms).savefig(options.picture, dpi=150)


if __name__ == "__main__":
    main()
