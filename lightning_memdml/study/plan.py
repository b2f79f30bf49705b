"""The plan of a study: parses every configuration and compares the budgets before the first run."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import yaml

from lightning_memdml.data.sampler import BATCH_SIZE
from lightning_memdml.study.budgets import Budget, budget_of, check_budgets
from lightning_memdml.study.isolation import isolated
from lightning_memdml.study.overrides import Config, Values, reference_config, with_values
from lightning_memdml.study.search import missing_freedoms, unused_keys
from lightning_memdml.study.study_file import Study
from lightning_memdml.verbosity import quiet

Stage = Literal["reference", "search", "test"]
Record = dict[str, Any]
#: Builds learner, data and Trainer: `lightning_memdml.lightning_cli.MemdmlCLI`, which this folder must not import.
CLI = Callable[..., Any]

# Options that do not change what a run measures. They are left out of its key.
COSMETIC = {
    "trainer": (
        "logger", "default_root_dir", "enable_progress_bar", "enable_model_summary", "enable_checkpointing",
        "num_sanity_val_steps", "enable_autolog_hparams", "model_registry", "profiler", "log_every_n_steps",
    ),
    "data": ("num_workers", "cache_dir", "pixel_cache", "pixel_cache_gb", "normalize_on_device"),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training run with its score.

    Attributes:
        stage: `search` is scored on validation classes, `test` on test classes. `reference` is not trained, and scored
            on test classes.
        arm: The arm.
        data: The data set.
        seed: The seed.
        choice: The values that the search tries (stage `search`) or has chosen (stage `test`).
        config: The complete configuration, including defaults.
        key: Hash of everything that decides the result. Two runs with the same key are the same run.
    """

    stage: Stage
    arm: str
    data: str
    seed: int
    choice: Values
    config: Config
    key: str

    @property
    def file_name(self) -> str:
        """File name of the finished run."""
        arm = self.arm.replace(" ", "_")
        return f"{self.stage}-{self.data}-{arm}-seed{self.seed}-{self.key[:10]}.json"

    @property
    def images(self) -> int:
        """Number of images of the training, which is proportional to its time."""
        budget = budget_of(self.config, self.arm)
        return budget.steps * budget.images_per_step

    def in_words(self) -> str:
        """Describe the run in a few words."""
        if self.stage == "reference":
            return f"the network before the training, on {self.data}"
        tried = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in self.choice.items())
        return f"{self.arm} on {self.data}, seed {self.seed}" + (f", {tried}" if tried else "")


class KnownRuns(NamedTuple):
    """The runs of a study, as far as they are known.

    Attributes:
        ready: Runs that can start, or are finished.
        later: Test runs of arms whose search is not finished, with the first choice of the search.
    """

    ready: list[Run]
    later: list[Run]


class Plan:
    """The runs of a study. Every configuration is parsed before the first run, so that errors appear at once.

    Args:
        study: The study.
        cli: Builds learner, data and Trainer from a configuration.
        options: Command-line options for all runs, such as `--data.path images.npz`.

    Attributes:
        budgets: Data set -> arm -> budget.

    Raises:
        ValueError: If a configuration is wrong (the message names arm and option), if arms differ in their budgets or
            in their numbers of tries, or if the search has an option that no arm has.
    """

    def __init__(self, study: Study, cli: CLI, options: Sequence[str] = ()) -> None:
        self.study = study
        self._cli = cli
        self._parse = _parser(cli, options)
        self._resolved: dict[str, Config] = {}
        self._runs: dict[tuple[str, str, str, int, str], Run] = {}
        self._buildable: dict[str, bool] = {}
        self._sources = {file.stem: file.read_bytes() for file in sorted(study.path.parent.glob("*.py"))}
        self._check_search()
        budgets: dict[tuple[str, str], Budget] = {}
        for data in study.data:
            for arm in study.arms:
                for choice, _ in self.schedule(arm, data):
                    budget = budget_of(self.resolve(arm, data, choice), arm)
                    if budgets.setdefault((data, arm), budget) != budget:
                        raise ValueError(
                            f"Expected a search that does not change the budget but {choice} changes it. Leave "
                            "steps and batch size out of the search."
                        )
            self._check_tries(data)
        check_budgets(study, budgets)
        self.budgets = {data: {arm: budgets[data, arm] for arm in study.arms} for data in study.data}

    def _check_search(self) -> None:
        search = self.study.search
        if search is None:
            return
        configs = [self.study.config(arm, data) for arm in self.study.arms for data in self.study.data]
        for option, unused in unused_keys(search, configs).items():
            if len(unused) == len(search.options[option]):
                raise ValueError(
                    f"search: {option}: expected a key of at least one arm but no arm has {', '.join(unused)}. Correct "
                    "it, or leave the option out."
                )

    def _check_tries(self, data: str) -> None:
        tries = {arm: len(self.schedule(arm, data)) for arm in self.study.arms}
        if len(set(tries.values())) > 1:
            listed = ", ".join(f"{arm} {number}" for arm, number in tries.items())
            raise ValueError(
                f"Expected the same number of search runs in every arm but on {data!r} got {listed}. Set `tries` in "
                "`search`: every arm then gets that many choices, spread over its own grid."
            )

    def schedule(self, arm: str, data: str) -> list[tuple[Values, int | None]]:
        """Return the choices of an arm with their search seeds; one empty choice without a search."""
        search = self.study.search
        return [({}, None)] if search is None else [*search.schedule(self.study.config(arm, data))]

    def missing_freedoms(self) -> dict[str, list[str]]:
        """Return, for each arm, the searched options that another arm has and this one lacks."""
        search, found = self.study.search, dict[str, list[str]]()
        if search is None:
            return found
        for data in self.study.data:
            missing = missing_freedoms(search, {arm: self.study.config(arm, data) for arm in self.study.arms})
            for arm, options in missing.items():
                found[arm] = [*dict.fromkeys([*found.get(arm, []), *options])]
        return found

    def reference_runs(self) -> list[Run]:
        """Return the runs that score networks before the training: one for all arms that share network and data."""
        runs: dict[str, Run] = {}
        for data in self.study.data:
            for arm in self.study.arms:
                first = self._run("reference", arm, data, self.study.seeds[0], self.schedule(arm, data)[0][0])
                key = self.key("reference", reference_config(first.config))
                runs.setdefault(key, replace(first, key=key))
        return [*runs.values()]

    def search_runs(self, searched: Sequence[Record] = ()) -> list[Run]:
        """Return the search runs, which are scored on validation classes.

        Args:
            searched: Finished search runs. With `extend` they decide about further runs beyond the ends of the grid.
        """
        if self.study.search is None:
            return []
        return [
            run for data in self.study.data for arm in self.study.arms for run in self._searching(arm, data, searched)
        ]

    def _searching(self, arm: str, data: str, searched: Sequence[Record]) -> list[Run]:
        search, config = self.study.search, self.study.config(arm, data)
        assert search is not None
        runs = [self._run("search", arm, data, seed or 0, choice) for choice, seed in self.schedule(arm, data)]
        further = 0
        refused: list[Values] = []  # beyond the range of an option; another one may be extended
        while further < search.extend:
            scores = mean_scores(runs, searched, search.score)
            tried = [*(one for one, _ in scores), *refused]
            choice = search.extension(config, best_of(scores), tried) if scores else None
            if choice is None:
                break
            more = [self._run("search", arm, data, seed, choice) for seed in search.seeds]
            if self._can_be_built(more[0]):
                runs += more
                further += 1
            else:
                refused.append(choice)
        return runs

    def _can_be_built(self, run: Run) -> bool:
        if run.key not in self._buildable:
            try:
                with contextlib.redirect_stderr(io.StringIO()), isolated(), quiet():
                    self._cli(run=False, args=["--config", yaml.safe_dump(run.config)])
                self._buildable[run.key] = True
            except (SystemExit, ValueError, TypeError):
                self._buildable[run.key] = False
        return self._buildable[run.key]

    def test_runs(self, searched: Sequence[Record]) -> list[Run]:
        """Return the test runs: each arm with its best choice on the validation classes.

        All arms of a seed come before the next seed, so that an interrupted study can be compared.

        Raises:
            ValueError: If search runs are missing.
        """
        chosen = self._chosen(searched)
        for data in self.study.data:
            for arm in self.study.arms:
                if (data, arm) not in chosen:
                    raise ValueError(
                        f"Expected a finished search of {arm!r} on {data!r} but runs of it are missing. Run the study "
                        "again: finished runs are kept."
                    )
        return self._test_runs(chosen)

    def unsearched_test_runs(self, but: Mapping[tuple[str, str], Values] | None = None) -> list[Run]:
        """Return the test runs with the first try of every arm, to list a study whose search is not finished.

        Args:
            but: The choices of (data set, arm) whose search is finished. They are left out.
        """
        pairs = [(data, arm) for data in self.study.data for arm in self.study.arms if (data, arm) not in (but or {})]
        return self._test_runs({(data, arm): self.schedule(arm, data)[0][0] for data, arm in pairs})

    def known_runs(self, finished: Sequence[Record]) -> KnownRuns:
        """Return the runs that can start, given the finished ones, and those that wait for a search.

        An arm waits for its own search only, on each data set.

        Args:
            finished: Records of finished runs of any stage.
        """
        searched = [record for record in finished if record["stage"] == "search"]
        chosen = self._chosen(searched)
        ready = [*self.reference_runs(), *self.search_runs(searched), *self._test_runs(chosen)]
        return KnownRuns(ready, self.unsearched_test_runs(but=chosen))

    def _test_runs(self, choices: Mapping[tuple[str, str], Values]) -> list[Run]:
        return [
            self._run("test", arm, data, seed, choices[data, arm])
            for seed in self.study.seeds
            for data in self.study.data
            for arm in self.study.arms
            if (data, arm) in choices
        ]

    def _chosen(self, searched: Sequence[Record]) -> dict[tuple[str, str], Values]:
        """Return the best choice of each (data set, arm) whose search is finished."""
        search = self.study.search
        pairs = [(data, arm) for data in self.study.data for arm in self.study.arms]
        if search is None:
            return {pair: {} for pair in pairs}
        scores = {
            (data, arm): mean_scores(self._searching(arm, data, searched), searched, search.score)
            for data, arm in pairs
        }
        return {pair: best_of(found) for pair, found in scores.items() if found}

    def resolve(self, arm: str, data: str, choice: Values) -> Config:
        """Return a complete configuration, including defaults."""
        # Only the first choice of a grid of numbers is parsed, and the others replace its values: parsing is slow.
        numbers = all(isinstance(value, int | float) for value in choice.values())
        first, _ = self.schedule(arm, data)[0]
        parsed = first if numbers and choice.keys() == first.keys() else choice
        text = yaml.safe_dump(with_values(self.study.config(arm, data), parsed), sort_keys=False)
        if text not in self._resolved:
            self._resolved[text] = _with_batch_size(self._parse(text, f"Arm {arm!r} on {data!r}"))
        return with_values(self._resolved[text], choice)

    def logger(self) -> dict[str, Any]:
        """Return the logger of the base configuration. It logs the study; runs have no logger of their own."""
        arm, data = next(iter(self.study.arms)), next(iter(self.study.data))
        logger = self.resolve(arm, data, self.schedule(arm, data)[0][0])["trainer"].get("logger")
        return logger if isinstance(logger, dict) else {}

    def _run(self, stage: Stage, arm: str, data: str, seed: int, choice: Values) -> Run:
        place = (stage, arm, data, seed, repr(choice))
        if place not in self._runs:
            config = deepcopy(self.resolve(arm, data, choice))
            config["seed_everything"] = seed
            if "seed" in config["data"].get("init_args", {}):
                config["data"]["init_args"]["seed"] = seed
            self._runs[place] = Run(stage, arm, data, seed, choice, config, self.key(stage, config))
        return self._runs[place]

    def key(self, stage: Stage, config: Config) -> str:
        """Return the hash of everything that decides the result of a run: of its configuration, and of own modules."""
        config = deepcopy(config)
        for group, names in COSMETIC.items():
            options = config[group] if group == "trainer" else config[group].get("init_args", {})
            for name in names:
                options.pop(name, None)
        if stage == "search":
            config["trainer"].pop("limit_test_batches", None)  # a search run is not tested
        text = json.dumps({"stage": stage, **config}, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode())
        for module, source in self._sources.items():
            if re.search(rf'"{re.escape(module)}\.', text):  # a class or function of the user, which may have changed
                digest.update(source)
        return digest.hexdigest()


def mean_scores(runs: Sequence[Run], searched: Sequence[Record], score: str) -> list[tuple[Values, float]]:
    """Return every choice of an arm with its mean validation score over seeds; empty if a run is missing."""
    found = {record["key"]: record["scores"][score] for record in searched}
    if any(run.key not in found for run in runs):
        return []
    by_choice: dict[str, tuple[Values, list[float]]] = {}
    for run in runs:
        by_choice.setdefault(repr(run.choice), (run.choice, []))[1].append(found[run.key])
    return [(choice, sum(scores) / len(scores)) for choice, scores in by_choice.values()]


def _with_batch_size(config: Config) -> Config:
    """Set the default size of batches: one that is not set would shrink where classes are few, and budgets differ."""
    options = config["data"].get("init_args", {})
    if "batch_size" in options and options["batch_size"] is None:
        options["batch_size"] = BATCH_SIZE
    return config


def best_of(scores: Sequence[tuple[Values, float]]) -> Values:
    """Return the choice with the best score; the first of equal ones."""
    return max(scores, key=lambda scored: scored[1])[0]


def _parser(cli: CLI, options: Sequence[str]) -> Callable[[str, str], Config]:
    """Return a function that completes a configuration with defaults; its errors name the owner of a wrong option."""

    class ParsedOnly(cli):  # type: ignore[valid-type, misc]
        def instantiate_classes(self) -> None:
            """Build nothing."""

    built: list[Any] = []  # one parser for all: to build it takes as long as to use it

    def parse(text: str, owner: str) -> Config:
        # Without a seed, Lightning does not touch the random numbers of this process. Every run sets its own later.
        printed, arguments = io.StringIO(), ["--config", text, *options, "--seed_everything=false"]
        try:
            with contextlib.redirect_stderr(printed), isolated():
                if built:
                    built[0].parse_arguments(built[0].parser, arguments)
                else:
                    built.append(ParsedOnly(run=False, args=arguments))
                parsed = built[0]
                return yaml.safe_load(parsed.parser.dump(parsed.config, skip_validation=True, skip_unset=False))
        except SystemExit as error:
            raise ValueError(f"{owner}: {printed.getvalue().rpartition('error: ')[2].strip()}") from error

    return parse
