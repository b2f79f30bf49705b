"""What a study is going to run: every configuration is parsed, and the budgets are compared, before the first run."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from unittest import mock

import yaml

from lightning_memdml.study.study_file import Config, Study, Values, with_values

Stage = Literal["search", "test"]
Record = dict[str, Any]
#: Builds learner, data and Trainer: `lightning_memdml.cli.MemdmlCLI`, given by who calls, as nothing imports the CLI.
CLI = Callable[..., Any]

# What a run is alike with and without: no part of what it measures.
COSMETIC = {
    "trainer": (
        "logger", "default_root_dir", "enable_progress_bar", "enable_model_summary", "enable_checkpointing",
        "num_sanity_val_steps", "enable_autolog_hparams", "model_registry", "profiler", "log_every_n_steps",
    ),
    "data": ("num_workers", "cache_dir", "pixel_cache", "pixel_cache_gb"),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training with its score.

    Attributes:
        stage: `search` is scored on validation classes, `test` on test classes.
        arm: Its arm.
        data: Its data set.
        seed: Its seed.
        choice: What the search has chosen, or is trying.
        config: The whole configuration, defaults included.
        key: Hash of all that decides the result. A finished run is the same run if its key is.
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
        """Name of the file of the finished run."""
        return f"{self.stage}-{self.data}-{self.arm}-seed{self.seed}-{self.key[:10]}.json"

    @property
    def images(self) -> int:
        """Number of images it trains on, for which it takes its time."""
        budget = budget_of(self.config, self.arm)
        return budget.steps * budget.images_per_step

    def in_words(self) -> str:
        """Return the run in a few words."""
        tried = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in self.choice.items())
        return f"{self.arm} on {self.data}, seed {self.seed}" + (f", {tried}" if tried else "")


class Budget(NamedTuple):
    """What a run takes."""

    steps: int
    images_per_step: int


def budget_of(config: Config, arm: str) -> Budget:
    """Return the optimiser steps of a configuration, and the images of each.

    Raises:
        ValueError: If the number of steps is not set outright, or several devices share a run.
    """
    trainer, data = config["trainer"], config["data"].get("init_args", {})
    if (trainer.get("max_steps") or -1) < 1 or trainer.get("max_epochs") not in (None, -1):
        raise ValueError(
            f"Arm {arm!r}: expected `trainer.max_steps` above 0 and `trainer.max_epochs: -1`, as arms are compared at "
            f"equal optimiser steps, but got max_steps={trainer.get('max_steps')} and "
            f"max_epochs={trainer.get('max_epochs')}."
        )
    if trainer.get("devices") not in ("auto", 1, "1", [0]) or trainer.get("num_nodes") not in (None, 1):
        raise ValueError(
            f"Arm {arm!r}: expected one device for each run but got devices={trainer['devices']}; leave it out, and "
            "pass `--processes N`, which spreads the runs over the GPUs there are."
        )
    if "batch_size" not in data:
        raise ValueError(f"Arm {arm!r}: expected `data.batch_size`, to compare budgets, but the data module has none.")
    return Budget(trainer["max_steps"], data["batch_size"] * (trainer.get("accumulate_grad_batches") or 1))


def check_budgets(study: Study, budgets: dict[tuple[str, str], Budget]) -> None:
    """Check that all arms of a data set have equal budgets.

    Args:
        study: Says what is equal.
        budgets: Of each (data set, arm).

    Raises:
        ValueError: If they have not; the message lists them.
    """
    for data in study.data:
        found = {arm: budgets[data, arm] for arm in study.arms}
        if study.equal == "images":
            if len({budget.steps * budget.images_per_step for budget in found.values()}) > 1:
                raise ValueError(
                    f"Expected `max_steps` times the batch size to be equal in all arms (`equal: images`), but on "
                    f"{data!r} they are: {_listed(found)}."
                )
        elif len(set(found.values())) > 1:
            raise ValueError(
                f"Expected equal optimiser steps and images per step in all arms, but on {data!r} they are: "
                f"{_listed(found)}. If the batch size is the question, say `equal: images` in the study file, and give "
                "each arm the `max_steps` that makes the images in all equal."
            )


def _listed(budgets: dict[str, Budget]) -> str:
    return "; ".join(f"{arm} {steps:,} steps of {images:,} images" for arm, (steps, images) in budgets.items())


class Plan:
    """What a study has to run. Every configuration is parsed before the first run, so that none fails at night.

    Args:
        study: The study.
        cli: Builds what a configuration says.
        options: Options of the command line for all runs, such as ``--data.path images.npz``.

    Raises:
        ValueError: If a configuration is wrong, naming arm and option; if budgets differ; or if an arm has no use for
            an option of the search.
    """

    def __init__(self, study: Study, cli: CLI, options: Sequence[str] = ()) -> None:
        self.study = study
        self._parse = _parser(cli, options)
        self._resolved: dict[str, Config] = {}
        self._sources = {file.stem: file.read_bytes() for file in sorted(study.path.parent.glob("*.py"))}
        budgets: dict[tuple[str, str], Budget] = {}
        for data in study.data:
            for arm in study.arms:
                for choice in self.choices(arm, data):
                    budget = budget_of(self.resolve(arm, data, choice), arm)
                    if budgets.setdefault((data, arm), budget) != budget:
                        raise ValueError(f"Expected a search that leaves the budget alone, but {choice} changes it.")
        check_budgets(study, budgets)

    def choices(self, arm: str, data: str) -> list[Values]:
        """Return what the search tries for an arm; one empty choice if there is no search."""
        search = self.study.search
        return [{}] if search is None else search.choices(self.study.config(arm, data), arm)

    def search_runs(self) -> list[Run]:
        """Return the runs on validation classes."""
        search = self.study.search
        if search is None:
            return []
        return [
            self._run("search", arm, data, search.seed, choice)
            for data in self.study.data
            for arm in self.study.arms
            for choice in self.choices(arm, data)
        ]

    def test_runs(self, searched: Sequence[Record]) -> list[Run]:
        """Return the runs on test classes, each arm with what scored best on the validation classes.

        All arms of a seed come before the next seed: what an interrupted study has done can be compared.
        """
        best = {
            (data, arm): self.best_choice(arm, data, searched) for data in self.study.data for arm in self.study.arms
        }
        return [
            self._run("test", arm, data, seed, best[data, arm])
            for seed in self.study.seeds
            for data in self.study.data
            for arm in self.study.arms
        ]

    def best_choice(self, arm: str, data: str, searched: Sequence[Record]) -> Values:
        """Return what scored best; of equals the first.

        Raises:
            ValueError: If a searching run of the arm is missing.
        """
        search = self.study.search
        if search is None:
            return {}
        scores = []
        for choice in self.choices(arm, data):
            key = self._run("search", arm, data, search.seed, choice).key
            record = next((record for record in searched if record["key"] == key), None)
            if record is None:
                raise ValueError(f"The search of {arm!r} on {data!r} is not finished: {choice} has no score.")
            scores.append((record["scores"][search.score], choice))
        return max(scores, key=lambda scored: scored[0])[1]

    def resolve(self, arm: str, data: str, choice: Values) -> Config:
        """Return a whole configuration, defaults included."""
        # Of a grid of numbers the first is parsed, and the others are put into its place: parsing is most of the time.
        parsed = (
            self.choices(arm, data)[0] if all(isinstance(value, int | float) for value in choice.values()) else choice
        )
        text = yaml.safe_dump(with_values(self.study.config(arm, data), parsed), sort_keys=False)
        if text not in self._resolved:
            self._resolved[text] = self._parse(text, f"Arm {arm!r} on {data!r}")
        return with_values(self._resolved[text], choice)

    def logger(self) -> dict[str, Any]:
        """Return the logger that the base configures, which is that of the study: runs have none of their own."""
        arm, data = next(iter(self.study.arms)), next(iter(self.study.data))
        logger = self.resolve(arm, data, self.choices(arm, data)[0])["trainer"].get("logger")
        return logger if isinstance(logger, dict) else {}

    def _run(self, stage: Stage, arm: str, data: str, seed: int, choice: Values) -> Run:
        config = deepcopy(self.resolve(arm, data, choice))
        config["seed_everything"] = seed
        if "seed" in config["data"].get("init_args", {}):
            config["data"]["init_args"]["seed"] = seed
        return Run(stage, arm, data, seed, choice, config, self._key(stage, config))

    def _key(self, stage: Stage, config: Config) -> str:
        config = deepcopy(config)
        for group, names in COSMETIC.items():
            options = config[group] if group == "trainer" else config[group].get("init_args", {})
            for name in names:
                options.pop(name, None)
        text = json.dumps({"stage": stage, **config}, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode())
        for module, source in self._sources.items():
            if re.search(rf'"{re.escape(module)}\.', text):  # a class or function of the user's own, which may change
                digest.update(source)
        return digest.hexdigest()


def _parser(cli: CLI, options: Sequence[str]) -> Callable[[str, str], Config]:
    """Return what turns a configuration into a whole one; wrong names raise, and say whose they are."""

    class ParsedOnly(cli):  # type: ignore[valid-type, misc]
        def instantiate_classes(self) -> None:
            """Build nothing."""

        def _set_seed(self) -> None:
            """Leave the random numbers of this process alone."""

    built: list[Any] = []  # once: a parser takes as long to build as to use

    def parse(text: str, whose: str) -> Config:
        said, arguments = io.StringIO(), ["--config", text, *options]
        try:
            with contextlib.redirect_stderr(said), as_if_alone():
                if built:
                    built[0].parse_arguments(built[0].parser, arguments)
                else:
                    built.append(ParsedOnly(run=False, args=arguments))
                parsed = built[0]
                return yaml.safe_load(parsed.parser.dump(parsed.config, skip_validation=True, skip_unset=False))
        except SystemExit as error:
            raise ValueError(f"{whose}: {said.getvalue().rpartition('error: ')[2].strip()}") from error

    return parse


@contextlib.contextmanager
def as_if_alone() -> Iterator[None]:
    """Hide the command line, about which Lightning would warn, and take back what a run puts in the environment."""
    with mock.patch.object(sys, "argv", sys.argv[:1]), mock.patch.dict(os.environ):
        yield
