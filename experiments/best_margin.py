"""Compares ways to train, each with the margin that suits it: chosen on validation classes, scored on test classes.

Every configuration is one arm. For each arm and each margin one run is trained with `--search_seed`, and scored on the
validation classes, which are no training classes; then the arm is trained with its best margin (by MAP@R) and each of
`--seeds`, and its last step scored on the test classes. The margin is that of the memory's loss where there is one, and
else that of the batch. Every run is written to `--record` when it ends, and is not repeated if it stands there.

    python experiments/best_margin.py experiments/glyphs_*.yaml --record runs/glyphs.jsonl
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare import SCORES, StepClock, build, spread

MARGINS = (0.5, 0.6, 0.7, 0.8, 0.9)
TALKATIVE = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed")
Run = dict[str, Any]


def train(config: str, arguments: Sequence[str], seed: int, margin: float, stage: str) -> dict[str, float]:
    """Train one arm, and return its scores at `stage`, `val` or `test`, in percent."""
    loss = "memory_loss" if "memory_loss:" in Path(config).read_text() else "loss"
    quiet = ("--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false")
    cli = build(config, [*quiet, *arguments, f"--model.{loss}.init_args.margin={margin}"], seed)
    clock = StepClock()
    cli.trainer.callbacks.append(clock)
    cli.trainer.fit(cli.model, cli.datamodule)
    cli.trainer.limit_val_batches = 1.0
    score = cli.trainer.validate if stage == "val" else cli.trainer.test
    results = score(cli.model, cli.datamodule, verbose=False)[0]
    return {**{name: 100 * results[f"{stage}/{name}"] for name in SCORES}, "ms_per_step": clock.milliseconds()}


class Records:
    """The runs that are done, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.runs = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def run(self, config: str, arguments: Sequence[str], seed: int, margin: float, stage: str) -> Run:
        """Return a run, trained now unless it is recorded."""
        name = {"arm": Path(config).stem, "stage": stage, "seed": seed, "margin": margin, "arguments": list(arguments)}
        for done in self.runs:
            if name.items() <= done.items():
                return done
        start = time.perf_counter()
        done = {**name, **train(config, arguments, seed, margin, stage)}
        print(f"{done['arm']}, margin {margin}, seed {seed}: {stage} MAP@R {done['map_at_r']:.1f}", flush=True)
        self.runs.append({**done, "seconds": round(time.perf_counter() - start, 1)})
        with self.path.open("a") as file:
            file.write(json.dumps(self.runs[-1]) + "\n")
        return done


def searched(searches: dict[str, list[Run]]) -> str:
    """Return the search as Markdown: the validation MAP@R of every margin."""
    margins = [run["margin"] for run in next(iter(searches.values()))]
    head = f"| arm | {' | '.join(f'margin {margin}' for margin in margins)} |\n|---|{'---|' * len(margins)}"
    rows = []
    for arm, runs in searches.items():
        best = max(run["map_at_r"] for run in runs)
        cells = (f"{run['map_at_r']:.1f}" for run in runs)
        marked = (f"**{cell}**" if run["map_at_r"] == best else cell for cell, run in zip(cells, runs, strict=True))
        rows.append(f"| {arm} | {' | '.join(marked)} |")
    return "\n".join([head, *rows])


def scored(results: dict[str, list[Run]]) -> str:
    """Return the scores on test classes as Markdown, mean and sample standard deviation over seeds."""
    lines = [
        "| arm | margin | seeds | Recall@1 % | MAP@R % | R-precision % | ms per step |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, runs in results.items():
        cells = [spread([run[name] for run in runs]) for name in SCORES]
        step = statistics.median(run["ms_per_step"] for run in runs)
        lines.append(f"| {arm} | {runs[0]['margin']} | {len(runs)} | {' | '.join(cells)} | {step:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Search, then score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", help="one configuration file per arm")
    parser.add_argument("--margins", type=float, nargs="+", default=MARGINS)
    parser.add_argument("--search_seed", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--record", type=Path, required=True, help="a file of finished runs, made or gone on with")
    options, arguments = parser.parse_known_args()
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
    records = Records(options.record)
    searches, results = {}, {}
    for config in options.configs:
        runs = [records.run(config, arguments, options.search_seed, margin, "val") for margin in options.margins]
        best = max(runs, key=lambda run: run["map_at_r"])["margin"]
        searches[Path(config).stem] = runs
        results[Path(config).stem] = [records.run(config, arguments, seed, best, "test") for seed in options.seeds]
    print(f"\nMAP@R in percent on validation classes, seed {options.search_seed}:\n\n{searched(searches)}")
    if options.seeds:
        print(f"\nOn test classes, with the best margin of each:\n\n{scored(results)}")


if __name__ == "__main__":
    main()
