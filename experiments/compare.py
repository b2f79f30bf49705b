"""Trains the same thing in several ways over several seeds, and prints one table.

Every configuration is one arm. All arms of a seed start from the same weights and see the same batches; the number of
steps is the configuration's. Scores are those of the last step on the test classes, which training never sees; nothing
is selected on them.

    python experiments/compare.py glyphs_batch glyphs_memory --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from lightning_memdml.lightning_cli import MemdmlCLI
from lightning_memdml.retrieval import retrieval_examples, save_gallery

QUIET = ("--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_model_summary=false")
SCORES = ("recall_at_1", "map_at_r", "r_precision")


class StepClock(Callback):
    """Takes the time of every training step, data and optimizer included."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def milliseconds(self) -> float:
        """Return the median time between the ends of two steps."""
        steps = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        return 1000 * statistics.median(steps) if steps else float("nan")


def build(config: str, arguments: Sequence[str], seed: int) -> MemdmlCLI:
    """Return learner, data and Trainer as ``memdml fit`` would make them, without a log."""
    sys.argv = sys.argv[:1]  # LightningCLI warns about a command line beside `args`
    own = (f"--seed_everything={seed}", f"--data.seed={seed}")
    return MemdmlCLI(run=False, args=["--config", config, *QUIET, *arguments, *own])


def run(config: str, arguments: Sequence[str], seed: int, train: bool = True) -> tuple[dict[str, float], MemdmlCLI]:
    """Train one arm with one seed, and return its scores on the test classes."""
    cli = build(config, arguments, seed)
    clock = StepClock()
    cli.trainer.callbacks.append(clock)
    if train:
        cli.trainer.fit(cli.model, cli.datamodule)
    results = cli.trainer.test(cli.model, cli.datamodule, verbose=False)[0]
    scores = {name: 100 * results[f"test/{name}"] for name in SCORES}
    return {**scores, "ms_per_step": clock.milliseconds()}, cli


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Return mean and sample standard deviation of each arm as Markdown."""
    lines = [
        "| arm | seeds | Recall@1 % | MAP@R % | R-precision % | ms per step |",
        "|---|---|---|---|---|---|",
    ]
    for arm, runs in rows.items():
        cells = [spread([run[name] for run in runs]) for name in SCORES]
        step = statistics.median(run["ms_per_step"] for run in runs)
        lines.append(f"| {arm} | {len(runs)} | {' | '.join(cells)} | {'-' if step != step else f'{step:.1f}'} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Return ``mean +- sample standard deviation``, or the one value."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def save_picture(cli: MemdmlCLI, path: Path) -> None:
    """Save test queries and their nearest neighbours, the hardest failures first."""
    batches = cli.trainer.predict(cli.model, cli.datamodule)
    embeddings, labels = (torch.cat([batch[name] for batch in batches]) for name in ("embeddings", "labels"))
    test_set = cli.datamodule.query_set
    examples = retrieval_examples(embeddings, labels, order="random")
    save_gallery(path, examples, test_set.picture, class_names=cli.datamodule.classes)


def main() -> None:
    """Run all arms and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", help="one configuration file per arm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--untrained", action="store_true", help="also score the first arm before training")
    parser.add_argument("--picture", type=Path, help="save queries and neighbours of the last arm here")
    parser.add_argument("--output", type=Path, help="save the table here")
    options, arguments = parser.parse_known_args()
    for path in filter(None, (options.picture, options.output)):
        path.parent.mkdir(parents=True, exist_ok=True)  # now, not after the training
    for quiet in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(quiet).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:
        if options.untrained:
            scores, _ = run(options.configs[0], arguments, seed, train=False)
            rows.setdefault("before training", []).append(scores)
        for config in options.configs:
            print(f"{Path(config).stem}, seed {seed}", flush=True)
            scores, cli = run(config, arguments, seed)
            rows.setdefault(Path(config).stem, []).append(scores)
            print({name: round(value, 1) for name, value in scores.items()}, flush=True)
    print("\n" + table(rows))
    if options.output:
        options.output.write_text(table(rows) + "\n")
    if options.picture:
        save_picture(cli, options.picture)
        print(f"\nQueries and their nearest neighbours: {options.picture}")


if __name__ == "__main__":
    main()
