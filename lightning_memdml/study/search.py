"""The search of a study: every arm gets the same number of tries on the validation classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from lightning_memdml.study.overrides import Config, Values, find_key


class Search(NamedTuple):
    """A grid of options, searched with the same number of runs in every arm.

    Attributes:
        options: Named options. Each maps configuration keys to lists of values of the same length. In an arm, an option
            sets **every** one of its keys that the arm's configuration sets, to the values of the same position. A key
            is dotted, such as `model.memory_weight`; a class name in it matches only arms that use this class, as in
            `model.loss.TripletLoss.margin`.
        seeds: Seeds of the search runs. A choice is scored by its mean over seeds.
        tries: Number of choices per arm, each run with every seed; `None` is the complete grid of every arm.
        extend: How often an arm may extend the grid by one value where its best choice is at an end.
        score: The score by which the best choice is selected.
    """

    options: dict[str, dict[str, list[Any]]]
    seeds: tuple[int, ...]
    tries: int | None
    extend: int
    score: str

    def places(self, config: Config) -> dict[str, dict[str, list[Any]]]:
        """Return, for each option that an arm has, the places that it sets and their values.

        Example:
            >>> search = Search({"margin": {"loss.A.margin": [1, 2], "loss.B.margin": [3, 4]}}, (0,), None, 0, "r")
            >>> search.places({"loss": {"class_path": "B"}})
            {'margin': {'loss.init_args.margin': [3, 4]}}
        """
        found = {
            option: {place: values for key, values in keys.items() if (place := find_key(config, key)) is not None}
            for option, keys in self.options.items()
        }
        return {option: places for option, places in found.items() if places}

    def grid(self, config: Config) -> list[Values]:
        """Return every combination of the values of an arm's options."""
        columns = [
            [
                {place: values[row] for place, values in places.items()}
                for row in range(len(next(iter(places.values()))))
            ]
            for places in self.places(config).values()
        ]
        return [{place: value for part in parts for place, value in part.items()} for parts in product(*columns)]

    def schedule(self, config: Config) -> list[tuple[Values, int]]:
        """Return the search runs of an arm as pairs of a choice and a seed.

        With `tries`, every arm gets `tries * len(seeds)` runs. From a larger grid, `tries` choices are taken so that
        every value is used about equally often. A smaller grid is repeated with further seeds.
        """
        grid = self.grid(config)
        if self.tries is None or self.tries == len(grid):
            return [(choice, seed) for choice in grid for seed in self.seeds]
        if self.tries < len(grid):
            return [(choice, seed) for choice in spread(grid, self.tries) for seed in self.seeds]
        runs = self.tries * len(self.seeds)
        seeds = [*self.seeds, *range(max(self.seeds) + 1, max(self.seeds) + 1 + runs)]
        return [(choice, seed) for seed in seeds for choice in grid][:runs]

    def ends(self, config: Config, best: Values, tried: Sequence[Values]) -> list[str]:
        """Return the options whose best value is the smallest or the largest number that was tried."""
        return [
            option
            for option, places in self.places(config).items()
            if any(best[place] in (known[0], known[-1]) for place, known in _numbers_tried(places, tried).items())
        ]

    def extension(self, config: Config, best: Values, tried: Sequence[Values]) -> Values | None:
        """Return a choice beyond the end where the best choice is, or `None` if it is inside the grid."""
        places = self.places(config)
        for option in self.ends(config, best, tried):
            numbers = _numbers_tried(places[option], tried)
            choice = best | {place: beyond(known, low=best[place] == known[0]) for place, known in numbers.items()}
            if choice not in tried:
                return choice
        return None


def spread(grid: Sequence[Values], number: int) -> list[Values]:
    """Return `number` choices of a grid that use every value about equally often; the same ones in every call.

    Example:
        >>> grid = [{"a": a, "b": b} for a in (1, 2) for b in (3, 4)]
        >>> chosen = spread(grid, 2)
        >>> sorted(choice["a"] for choice in chosen), sorted(choice["b"] for choice in chosen)
        ([1, 2], [3, 4])
    """
    left = [grid[place] for place in np.random.default_rng(0).permutation(len(grid))]
    used: Counter[tuple[str, str]] = Counter()
    chosen: list[Values] = []
    for _ in range(number):
        best = min(left, key=lambda choice: sum(used[place, repr(value)] ** 2 for place, value in choice.items()))
        left.remove(best)
        used.update((place, repr(value)) for place, value in best.items())
        chosen.append(best)
    return sorted(chosen, key=grid.index)


def beyond(values: Sequence[float], low: bool) -> float:
    """Continue sorted numbers by one at their low or high end, by their step or by their ratio.

    Example:
        >>> beyond([0.5, 0.65, 0.8], low=False), beyond([0.001, 0.003], low=True)
        (0.95, 0.000333333)
    """
    end, inner = (values[0], values[1]) if low else (values[-1], values[-2])
    even_steps = len(values) > 2 and np.allclose(np.diff(values, 2), 0, atol=0.01 * (values[-1] - values[0]))
    by_factors = not even_steps and values[0] > 0 and values[-1] / values[0] >= 2
    extended = end * end / inner if by_factors else 2 * end - inner
    return float(f"{extended:.6g}")


def _numbers_tried(places: dict[str, list[Any]], tried: Sequence[Values]) -> dict[str, list[float]]:
    """Return the sorted numbers that were tried at each place; places with other values are left out."""
    found = {
        place: {*values, *(choice[place] for choice in tried)}
        for place, values in places.items()
        if all(isinstance(value, int | float) for value in values)
    }
    return {place: sorted(values) for place, values in found.items() if len(values) > 1}


def unused_keys(search: Search, configs: Sequence[Config]) -> dict[str, list[str]]:
    """Return, for each option, its keys that no configuration has."""
    return {
        option: [key for key in keys if all(find_key(config, key) is None for config in configs)]
        for option, keys in search.options.items()
    }


def missing_freedoms(search: Search, configs: dict[str, Config]) -> dict[str, list[str]]:
    """Return, for each arm, the searched options that another arm has and this one lacks.

    Args:
        search: The search.
        configs: Arm -> configuration.
    """
    has = {arm: set(search.places(config)) for arm, config in configs.items()}
    searched = [option for option in search.options if any(option in options for options in has.values())]
    lacking = {arm: [option for option in searched if option not in has[arm]] for arm in configs}
    return {arm: options for arm, options in lacking.items() if options}
