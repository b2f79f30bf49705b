"""`memdml demo`: trains the same thing in several ways over several seeds, and prints one table."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from lightning_memdml.atomic_write import atomic_write
from lightning_memdml.lightning_cli import MemdmlCLI
from lightning_memdml.plain_parser import PlainParser
from lightning_memdml.retrieval import retrieval_examples, save_gallery
from lightning_memdml.verbosity import quiet

DESCRIPTION = """\
Train on characters drawn from fonts, without and with a memory: a table of scores, and a picture of queries and their
neighbours. It takes about a minute on two CPU cores and downloads nothing.

  memdml demo
  memdml demo --seeds 0 1 2 --untrained
  memdml demo --configs glyphs_memory glyphs_momentum --trainer.max_steps 500

With each seed, all configurations start from the same weights and see the same batches. The number of steps is that of
the configuration. Scores are those of the last step on the test classes, which are never trained on, and on which
nothing is selected. Other options are passed to all runs, as to `memdml fit`."""
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


def demo(arguments: list[str]) -> None:
    """Run `memdml demo` with what follows it on the command line."""
    parser = PlainParser("memdml demo", DESCRIPTION)
    parser.add_argument(
        "--configs",
        nargs="+",
        default=["glyphs_batch", "glyphs_memory"],
        help="configurations to compare, as `memdml fit --config` takes them; by default glyphs_batch glyphs_memory",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run per configuration and seed")
    parser.add_argument("--untrained", action="store_true", help="also score the first configuration before training")
    parser.add_argument(
        "--picture", type=Path, default=Path("runs/demo.png"), help="queries and neighbours of the last run"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo.md"), help="file for the table")
    given, options = parser.parse_known_args(arguments)
    names = arm_names(given.configs)
    _refuse_repeats("--seeds", given.seeds)
    for path in (given.picture, given.output):
        path.parent.mkdir(parents=True, exist_ok=True)  # now, not after the training
    with quiet():
        rows, cli = _train_all(given, options, names)
    table = comparison_table(rows)
    print(f"\n{table}\n")
    with atomic_write(given.output) as unfinished:
        unfinished.write_text(f"{table}\n", encoding="utf-8")
    save_picture(cli, given.picture)
    print(f"The table: {given.output}\nQueries and their nearest neighbours: {given.picture}")


def _train_all(
    given: argparse.Namespace, options: list[str], names: dict[str, str]
) -> tuple[dict[str, list[dict[str, float]]], MemdmlCLI]:
    """Return the scores of every arm, one entry per seed, and the last run."""
    for config in given.configs:
        build_run(config, options, given.seeds[0])  # errors in any of them appear before the first run
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in given.seeds:
        if given.untrained:
            scores, _ = score_arm(given.configs[0], options, seed, train=False)
            rows.setdefault("before training", []).append(scores)
        for config in given.configs:
            print(f"{names[config]}, seed {seed}", flush=True)
            scores, cli = score_arm(config, options, seed)
            rows.setdefault(names[config], []).append(scores)
    return rows, cli


def arm_names(configs: Sequence[str]) -> dict[str, str]:
    """Return configuration -> name of its arm: the file name, or the whole path where two files have the same name.

    Example:
        >>> arm_names(["glyphs_batch", "one/config.yaml", "two/config.yaml"])
        {'glyphs_batch': 'glyphs_batch', 'one/config.yaml': 'one/config.yaml', 'two/config.yaml': 'two/config.yaml'}

    Raises:
        ValueError: If a configuration is named twice.
    """
    _refuse_repeats("--configs", configs)
    stems = [Path(config).stem for config in configs]
    return {config: stem if stems.count(stem) == 1 else config for config, stem in zip(configs, stems, strict=True)}


def _refuse_repeats(option: str, values: Sequence[Any]) -> None:
    """Refuse the same run twice, which would count as two in the table."""
    repeated = [value for value in dict.fromkeys(values) if values.count(value) > 1]
    if repeated:
        raise ValueError(
            f"Expected `{option}` without repeats but got {repeated[0]} {values.count(repeated[0])} times. "
            "Name each once. Other seeds train it again."
        )


def build_run(config: str, arguments: Sequence[str], seed: int) -> MemdmlCLI:
    """Return learner, data and Trainer as `memdml fit` would make them, without a log.

    Args:
        config: What `--config` takes.
        arguments: Further options of `memdml fit`.
        seed: Of the weights and of the data.
    """
    sys.argv = sys.argv[:1]  # LightningCLI warns about a command line beside `args`
    own = (f"--seed_everything={seed}", f"--data.seed={seed}")
    return MemdmlCLI(run=False, args=["--config", config, *QUIET, *arguments, *own])


def score_arm(
    config: str, arguments: Sequence[str], seed: int, train: bool = True
) -> tuple[dict[str, float], MemdmlCLI]:
    """Train one arm with one seed, and return its scores on the test classes in percent, and what was trained."""
    cli = build_run(config, arguments, seed)
    clock = StepClock()
    trainer: Any = cli.trainer
    trainer.callbacks.append(clock)
    if train:
        trainer.fit(cli.model, cli.datamodule)
    results = trainer.test(cli.model, cli.datamodule, verbose=False)[0]
    scores = {name: 100 * results[f"test/{name}"] for name in SCORES}
    return {**scores, "ms_per_step": clock.milliseconds()}, cli


def comparison_table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Return mean and sample standard deviation of each arm as Markdown.

    Args:
        rows: Name of an arm -> the scores of its runs in percent, and their milliseconds per step.

    Example:
        >>> run = {"recall_at_1": 68.94, "map_at_r": 33.4, "r_precision": 43.8, "ms_per_step": 12.3}
        >>> print(comparison_table({"memory": [run]}).splitlines()[-1])
        | memory | 1 | 68.9 | 33.4 | 43.8 | 12.3 |
    """
    lines = [
        "| arm | seeds | Recall@1 % | MAP@R % | R-precision % | ms per step |",
        "|---|---|---|---|---|---|",
    ]
    for arm, runs in rows.items():
        cells = [_spread([run[name] for run in runs]) for name in SCORES]
        step = statistics.median(run["ms_per_step"] for run in runs)
        lines.append(f"| {arm} | {len(runs)} | {' | '.join(cells)} | {'-' if step != step else f'{step:.1f}'} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    """Return mean and sample standard deviation, or the one value."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def save_picture(cli: MemdmlCLI, path: Path) -> None:
    """Save some test queries and their nearest neighbours, drawn at random."""
    data: Any = cli.datamodule
    batches: Any = cli.trainer.predict(cli.model, data)
    embeddings, labels = (torch.cat([batch[name] for batch in batches]) for name in ("embeddings", "labels"))
    examples = retrieval_examples(embeddings, labels, order="random")
    save_gallery(path, examples, data.query_set.picture, class_names=data.classes)
