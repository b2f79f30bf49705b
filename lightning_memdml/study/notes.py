"""Sentences of the plan and the report: how equal the arms are, and what a study is able to show."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_memdml.study.budgets import Budget
from lightning_memdml.study.overrides import Config, class_name
from lightning_memdml.study.results import Results
from lightning_memdml.study.search import unused_keys
from lightning_memdml.study.statistics import detectable_difference
from lightning_memdml.study.study_file import Study

MEMORY_WEIGHT = "model.memory_weight"


def power_in_words(study: Study, noise: float | None = None) -> str:
    """Describe the smallest difference that the seeds of a study can show.

    Args:
        study: The study.
        noise: Standard deviation of the search score between seeds in points, if there was a search.
    """
    seeds = len(study.seeds)
    decided = sum(len(claim.data) + (len(claim.data) > 1) for claim in study.claims)  # with the joint verdict
    if seeds < 2:
        return "One seed decides no claim."
    found = detectable_difference(seeds, max(1, decided), study.confidence)
    text = (
        f"With {seeds} seeds, a claim is decided with a probability of 80 % where the difference exceeds its edge by "
        f"{found:.1f} standard deviations of the paired differences."
    )
    if noise is None or study.search is None or study.search.score != study.scores[0]:
        return text
    # The variance of a difference is at most the sum of both, as runs of one seed share first weights and batches.
    points = found * math.sqrt(2) * noise
    return f"{text} If test scores vary between seeds as in the search, that is up to {points:.1f} points."


def control_in_words(study: Study) -> str:
    """Name the control of a study, or that there is none."""
    if study.control is None:
        return (
            "There is no control: nothing shows that these data sets can detect a difference. "
            "`control: {compare: ARM}` adds one."
        )
    return f"Control: {study.control.compare[0]} must be better than {study.control.with_[0]} on every data set."


def budgets_in_words(study: Study, budgets: Mapping[str, Mapping[str, Budget]]) -> list[str]:
    """Describe what differs between the budgets of the arms; empty if they are equal.

    Args:
        study: The study.
        budgets: Data set -> arm -> budget.
    """
    lines = []
    for of_arms in budgets.values():
        steps = {arm: budget.steps for arm, budget in of_arms.items()}
        images = {arm: budget.steps * budget.images_per_step for arm, budget in of_arms.items()}
        if len(set(steps.values())) > 1:
            lines.append(
                f"The arms take {_range(steps)} steps. One with few steps may end before it has learned anything: "
                "`equal: steps` compares at equal steps."
            )
        if len(set(images.values())) > 1:
            lines.append(f"The arms see {_range(images)} images.")
    return [*dict.fromkeys(lines)]


def _range(counts: Mapping[str, int]) -> str:
    low, high = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    return f"{counts[low]:,} ({low}) to {counts[high]:,} ({high})"


def freedoms_in_words(study: Study, missing: dict[str, list[str]]) -> list[str]:
    """Describe the searched options, and the arms that lack some of them."""
    if study.search is None:
        return []
    lines = [f"Searched: {', '.join(study.search.options)}."]
    for options, arms in _by_value(missing).items():
        subject = f"The arm {arms[0]} has" if len(arms) == 1 else f"The arms {', '.join(arms)} have"
        lines.append(f"{subject} no {options} to search.")
    return lines


def _by_value(options_of: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Group names by their options: options in words -> names."""
    found: dict[str, list[str]] = {}
    for name, options in options_of.items():
        found.setdefault(", ".join(options), []).append(name)
    return found


def gaps_in_words(study: Study) -> list[str]:
    """Describe what a search leaves out: keys that no arm has, and a memory weight that is not searched."""
    if study.search is None:
        return []
    configs = {(arm, data): study.config(arm, data) for data in study.data for arm in study.arms}
    lines = [
        f"No arm has {', '.join(keys)} of the option {option}."
        for option, keys in unused_keys(study.search, [*configs.values()]).items()
        if keys
    ]
    fixed = [
        arm
        for (arm, _), config in configs.items()
        if _has_memory(config) and not any(MEMORY_WEIGHT in places for places in study.search.places(config).values())
    ]
    if fixed:
        arms = ", ".join(dict.fromkeys(fixed))
        lines.append(f"The weight of the memory term is not searched (`{MEMORY_WEIGHT}`): {arms}.")
    return lines


def _has_memory(config: Config) -> bool:
    callbacks = config.get("trainer", {}).get("callbacks") or []
    return "MemoryCallback" in [class_name(one) for one in (callbacks if isinstance(callbacks, list) else [callbacks])]


def ends_in_words(results: Results) -> list[str]:
    """Name the arms whose best try lies at an end of the grid, and how to extend it; empty if there are none."""
    study, several = results.study, len(results.study.data) > 1
    ends = {
        f"{arm} on {data}" if several else arm: options
        for data in study.data
        for arm in study.arms
        if (options := results.ends(arm, data))
    }
    listed = [f"{', '.join(arms)} ({options})" for options, arms in _by_value(ends).items()]
    if study.search is None or not listed:
        return []
    more = study.search.extend + 1
    return [
        f"The best try lies at an end of the grid: {'; '.join(listed)}. A better value may lie beyond it: with "
        f"`extend: {more}` in `search`, the same command tries up to {more} more, and keeps the finished runs."
    ]
