"""The command `memdml study`: arms x data sets x seeds from one file, with intervals, verdicts and a report."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from lightning_memdml.plain_parser import PlainParser
from lightning_memdml.study.agenda import Agenda
from lightning_memdml.study.notes import (
    budgets_in_words,
    control_in_words,
    ends_in_words,
    freedoms_in_words,
    gaps_in_words,
    power_in_words,
)
from lightning_memdml.study.plan import CLI, Plan, Stage
from lightning_memdml.study.report import draw, write_report
from lightning_memdml.study.results import Results
from lightning_memdml.study.run_folder import RunFolder
from lightning_memdml.study.runner import FailedRunsError, estimate_seconds, run_all
from lightning_memdml.study.study_file import Study, read_study
from lightning_memdml.study.tables import claims_table, scores_table

DESCRIPTION = """\
Train several arms with several seeds at equal budgets, and report which differences are significant.

  memdml study experiments/study/glyphs_a_memory.yaml
  memdml study mine.yaml --data.root my/images
  memdml study experiments/study/glyphs_*.yaml --processes 2

A study file is YAML. It can name functions of modules beside it, such as your weight function `my_weights.hard`.

  base: base.yaml             # a configuration of `memdml fit`, beside this file
  arms:                       # name -> nested overrides of the base
    threshold: {}
    mine: {model: {memory_loss: {init_args: {negative: my_weights.hard}}}}
  seeds: [0, 1, 2, 3, 4]
  claims:                     # written down before any run
    mine_helps: {compare: mine, with: threshold, expects: more, by: 0.5}

Further keys: `data` (name -> overrides), `search` (options, seeds, tries, extend, score), `equal` (budget, steps or
images), `control` (compare, with: a difference that has to be detected on every data set; without `with`, the same arm
with shuffled training labels), `trend` (over, arms: a picture of the arms that differ in one number), `scores`,
`confidence`, `title`, `parts` (a place for YAML anchors).

Every finished run is one JSON file. A finished run is repeated only if its configuration, the options of its data, or a
module beside the study file that it names has changed. Other options are passed to all runs, as to `memdml fit`."""


def study(arguments: list[str], cli: CLI) -> None:
    """Run `memdml study`.

    Args:
        arguments: The command-line arguments after `study`.
        cli: Builds learner, data and Trainer of a run: `MemdmlCLI`.

    Raises:
        ValueError: If the study file or one of its configurations is wrong.
        SystemExit: If runs failed, after all others are finished and reported.
    """
    parser = PlainParser("memdml study", DESCRIPTION)
    parser.add_argument("config", nargs="+", metavar="CONFIG", help="one or more study files, run one after the other")
    parser.add_argument(
        "--output", default="runs/study", help="folder for the runs and the report of each file: <output>/<file name>"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="number of runs trained at the same time; each uses one GPU if there are GPUs",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="list the runs and their estimated time without training them"
    )
    parser.add_argument(
        "--report_only", action="store_true", help="write the report of the finished runs without training"
    )
    parser.add_argument(
        "--time_limit",
        type=float,
        metavar="MINUTES",
        help="start no further run after so many minutes; the same command continues later",
    )
    given, options = parser.parse_known_args(arguments)
    if given.processes < 1:
        parser.error(f"Expected --processes of at least 1 but got {given.processes}.")
    if given.time_limit is not None and given.time_limit <= 0:
        parser.error(f"Expected --time_limit, in minutes, above 0 but got {given.time_limit}.")
    asked = {name: getattr(given, name) for name in ("processes", "dry_run", "report_only", "time_limit")}
    # Errors in any file appear before the first run.
    plans = {config: Plan(read_study_beside(config), cli, options) for config in given.config}
    failed = False
    for config, plan in plans.items():
        failed |= not _run_and_report_failures(
            config, cli, options, output=Path(given.output, Path(config).stem), plan=plan, **asked
        )
    if failed:
        sys.exit(1)


def _run_and_report_failures(config: str, *arguments: Any, **options: Any) -> bool:
    """Run a study, print which runs failed, and return whether all succeeded."""
    try:
        run_study(config, *arguments, **options)
    except FailedRunsError as error:
        print(f"error: {config}: {error}", file=sys.stderr)
        return False
    return True


def run_study(
    path: Path | str,
    cli: CLI,
    options: Sequence[str] = (),
    *,
    output: Path | str | None = None,
    processes: int = 1,
    dry_run: bool = False,
    report_only: bool = False,
    time_limit: float | None = None,
    plan: Plan | None = None,
) -> Results:
    """Run a study and write its report.

    Args:
        path: The study file.
        cli: Builds learner, data and Trainer of a run: `lightning_memdml.lightning_cli.MemdmlCLI`.
        options: Options of `memdml fit` for all runs.
        output: Folder for runs and report; by default `runs/study/<file name>`.
        processes: Number of runs trained at the same time, each in its own process with its share of the cores.
            Process i uses GPU i if there are GPUs.
        dry_run: List the runs and their estimated time. Only a few steps of each arm are trained, on one photograph in
            place of all.
        report_only: Write the report of the finished runs without training.
        time_limit: Minutes after which no further run is started. The next call continues.
        plan: The runs of the file with these options, if they were planned already; it takes seconds.

    Returns:
        The results.

    Raises:
        ValueError: If the study file or one of its configurations is wrong.
        FailedRunsError: If runs failed, after all others are finished and reported.
    """
    folder = RunFolder(Path("runs/study", Path(path).stem) if output is None else output)
    plan = plan or Plan(read_study_beside(path), cli, options)
    content = plan.study
    if dry_run:
        _print_plan(plan, cli, folder)
        return Results(content, [])
    failure: FailedRunsError | None = None
    if not report_only:
        deadline = math.inf if time_limit is None else time.monotonic() + 60 * time_limit
        try:
            if not run_all(plan.known_runs, cli, folder, processes, content.rule_key, deadline).is_complete:
                print(f"Stopped after {time_limit:g} minutes. Run the same command again to continue.")
        except FailedRunsError as error:
            failure = error
    agenda = Agenda(plan.known_runs, folder)
    references, searched, records = (
        [agenda.records[run.key] for run in agenda.runs if run.stage == stage and run.key in agenda.records]
        for stage in get_args(Stage)
    )
    results = Results(content, records, searched, plan.missing_freedoms(), references)
    reports = write_report(results, folder.path)
    _print_results(results, reports)
    if others := len(list(folder.runs.glob("*.json"))) - len(records) - len(searched):
        print(f"{others} finished runs in {folder.runs} have other configurations or options and are left out.")
    _log_to_wandb(plan, results, reports)
    if failure is not None:
        raise failure
    return results


def read_study_beside(path: Path | str) -> Study:
    """Read a study file, and make the modules beside it importable."""
    content = read_study(path)
    if (beside := str(content.path.parent.resolve())) not in sys.path:
        sys.path.append(beside)
    return content


def _print_plan(plan: Plan, cli: CLI, folder: RunFolder) -> None:
    """List the runs. Until the search of an arm is finished, its test runs are listed without their choice."""
    agenda = Agenda(plan.known_runs, folder)
    known = {run.key for run in agenda.runs}
    runs = [run for run in agenda.planned if run.stage != "reference"]
    seconds = estimate_seconds(runs, cli, folder)
    left = 0.0
    for run in runs:
        cost = seconds[run.data, run.arm]
        done = run.key in agenda.records
        left += 0 if done else cost
        words = run.in_words() if run.key in known else f"{run.arm} on {run.data}, seed {run.seed}, as searched"
        print(f"{run.stage:6}  {'finished' if done else f'{cost:6.1f} s':>10}  {words}")
    print(
        f"{len(runs)} runs, about {left / 60:.1f} minutes left in one process. For arms without a finished run this "
        "includes the steps of the training only: not the features to which a head is fitted, and not the scoring. The "
        f"network before the training is scored as well: {len(plan.reference_runs())} times."
    )
    study = plan.study
    chosen = {(run.arm, run.data) for run in agenda.runs if run.stage == "test"}  # whose search is finished
    searched = [
        one for one in agenda.records.values() if one["stage"] == "search" and (one["arm"], one["data"]) in chosen
    ]
    results = Results(study, [], searched)
    for line in (
        *freedoms_in_words(study, plan.missing_freedoms()),
        *gaps_in_words(study),
        *budgets_in_words(study, plan.budgets),
        power_in_words(study, results.search_noise()),
        control_in_words(study),
        *ends_in_words(results),
    ):
        print(line)


def _print_results(results: Results, reports: Sequence[Path]) -> None:
    for data in results.study.data:
        print(f"\n{data}\n")
        _print_table(scores_table(results, data))
    judged = results.claims()
    if judged:
        print()
        for row in claims_table(judged).rows:
            print(f"{row[1]:>16}: {row[0]}  [{row[3]}]")
    for line in ends_in_words(results):
        print(f"\n{line}")
    print("\n" + "\n".join(str(report) for report in reports))


def _print_table(table: Any) -> None:
    lines = [table.head, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.head))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _log_to_wandb(plan: Plan, results: Results, reports: Sequence[Path]) -> None:
    """Log tables, pictures and the page to W&B if the base configuration uses its logger."""
    logger = plan.logger()
    if logger.get("class_path", "").rpartition(".")[2] != "WandbLogger":
        return
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    experiment = WandbLogger(**logger.get("init_args", {})).experiment
    judged = results.claims()
    logged: dict[str, Any] = {"study/report": wandb.Html(str(reports[-1]))}
    for data in results.study.data:
        table = scores_table(results, data)
        logged[f"study/scores_{data}"] = wandb.Table(columns=[*table.head], data=table.rows)
    if judged:
        table = claims_table(judged, [*results.study.data])
        logged["study/claims"] = wandb.Table(columns=[*table.head], data=table.rows)
    for name in tqdm(draw(results, judged), "Logging to W&B", delay=1, leave=False):
        logged[f"study/{name}"] = wandb.Image(str(reports[0].parent / "pictures" / f"{name}.png"))
    experiment.log(logged)
    experiment.finish()
