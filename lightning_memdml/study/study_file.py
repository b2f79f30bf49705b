"""The study file: which arms, data sets and seeds, what is searched, and which claims are put to the test."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from lightning_memdml.backbones import nearest
from lightning_memdml.study.statistics import EXPECTATIONS, Expectation

Config = dict[str, Any]
Values = dict[str, Any]  # configuration key, with dots -> value

# `parts` is a place for YAML anchors.
KEYS = ("title", "base", "parts", "arms", "data", "seeds", "search", "equal", "scores", "confidence", "claims")
SEARCH_KEYS = ("options", "seed", "score")
CLAIM_KEYS = ("says", "compare", "with", "expects", "by", "score", "data")
SCORES = ("map_at_r", "recall_at_1", "r_precision")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]*")


class Claim(NamedTuple):
    """A statement about the difference between two groups of arms, fixed before any run.

    Attributes:
        name: Its key in the file.
        says: The statement in words.
        compare: The arms whose mean is compared.
        with_: The arms whose mean it is compared with.
        expects: Where the difference is said to be, see `statistics.judge`.
        by: The smallest difference that counts, in points (hundredths of the score).
        score: Of which score.
        data: On which data sets.
    """

    name: str
    says: str
    compare: tuple[str, ...]
    with_: tuple[str, ...]
    expects: Expectation
    by: float
    score: str
    data: tuple[str, ...]


class Search(NamedTuple):
    """A small grid, the same for every arm, from which each arm takes what is best on the validation classes.

    Attributes:
        options: Named options; of each the keys that it may mean, and their values. An arm searches the first key that
            its configuration names: `model.memory_weight`, or with a class `model.loss.TripletLoss.margin`.
        seed: Seed of the searching runs.
        score: By which the choice is made.
    """

    options: dict[str, dict[str, list[Any]]]
    seed: int
    score: str

    def choices(self, config: Config, arm: str) -> list[Values]:
        """Return what an arm tries: every combination of the values of its keys.

        Raises:
            ValueError: If an option means nothing in the arm's configuration.
        """
        grids = []
        for option, keys in self.options.items():
            found = [(place, values) for key, values in keys.items() if (place := find_key(config, key)) is not None]
            if not found:
                raise ValueError(
                    f"The search option {option!r} names {', '.join(keys)}, but the configuration of the arm {arm!r} "
                    "sets none of them; set one there, or add a key that the arm has."
                )
            place, values = found[0]
            grids.append([(place, value) for value in values])
        return [dict(pairs) for pairs in product(*grids)]


@dataclass(frozen=True)
class Study:
    """What a study file says.

    Attributes:
        path: The file.
        title: A heading.
        base: The configuration that all arms share.
        arms: Name -> nested overrides of the base, already merged into one.
        data: Name of a data set -> nested overrides; one without overrides if the file names none.
        seeds: Seeds of the runs that are scored.
        search: The search, if there is one.
        equal: What all arms of a data set take equally much of: optimiser `steps`, each of as many images; or `images`
            in all, where the batch size is the question.
        scores: The scores of the tables, the first is that of the figures.
        confidence: Of intervals, and of all verdicts together.
        claims: The claims.
        rule: What decides the verdicts, as it stands in the file.
    """

    path: Path
    title: str
    base: Config
    arms: dict[str, Config]
    data: dict[str, Config]
    seeds: tuple[int, ...]
    search: Search | None
    equal: Literal["steps", "images"]
    scores: tuple[str, ...]
    confidence: float
    claims: tuple[Claim, ...]
    rule: dict[str, Any]

    @property
    def rule_key(self) -> str:
        """Hash of what decides the verdicts: every run notes under which rule it was made."""
        return hashlib.sha256(json.dumps(self.rule, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def config(self, arm: str, data: str) -> Config:
        """Return the configuration of an arm on a data set: the base, then the data set, then the arm."""
        return merged(merged(self.base, self.data[data]), self.arms[arm])


def read_study(path: Path | str) -> Study:
    """Read a study file.

    Raises:
        ValueError: If it is no YAML, or something in it is missing, misspelt or repeated; the message says where.
    """
    path = Path(path)
    said = _read_yaml(path)
    _check_keys(said, KEYS, str(path))
    for key in ("base", "arms", "seeds"):
        if key not in said:
            raise ValueError(f"{path}: expected `{key}`, which a study needs, but there is none.")
    arms = {name: _overrides(over, f"arms: {name}") for name, over in _named(said["arms"], "arms").items()}
    data = {name: _overrides(over, f"data: {name}") for name, over in _named(said.get("data", {}), "data").items()}
    data = data or {_data_name(path, said["base"]): {}}
    confidence = said.get("confidence", 0.95)
    if not isinstance(confidence, float) or not 0.5 < confidence < 1:
        raise ValueError(f"Expected `confidence` in (0.5, 1), such as 0.95, but got {confidence!r}.")
    if (equal := said.get("equal", "steps")) not in ("steps", "images"):
        raise ValueError(f"Expected `equal` to be steps or images but got {equal!r}.")
    scores = tuple(_listed(said.get("scores", list(SCORES))))
    claims = [
        _claim(name, claim, arms, data, scores) for name, claim in _named(said.get("claims", {}), "claims").items()
    ]
    return Study(
        path=path,
        title=str(said.get("title", path.stem)),
        base=_read_yaml(path.parent / str(said["base"])),
        arms=arms,
        data=data,
        seeds=_seeds(said["seeds"]),
        search=_search(said["search"]) if said.get("search") else None,
        equal=equal,
        scores=scores,
        confidence=confidence,
        claims=tuple(claims),
        rule={"confidence": confidence, "claims": said.get("claims", {})},
    )


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(
                    f"{node.start_mark.name}, line {node.start_mark.line + 1}: {key!r} stands there twice."
                )
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"Expected a YAML file but there is no {path}.")
    try:
        with path.open(encoding="utf-8") as file:
            said = yaml.load(file, _StrictLoader)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected YAML in {path} but: {error}") from error
    if not isinstance(said, dict):
        raise ValueError(f"Expected a mapping in {path} but got {type(said).__name__}.")
    return said


def _data_name(path: Path, base: Any) -> str:
    """Return a name for the data set of a study that names none: that of its class."""
    data = _read_yaml(path.parent / str(base)).get("data", "data")
    return class_name(data).removesuffix("DataModule") or "data"


def _check_keys(said: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in said:
        if key not in known:
            raise ValueError(
                f"{where}: there is no key {key!r}.{nearest(str(key), known)} There are {', '.join(known)}."
            )


def _named(said: Any, key: str) -> dict[str, Any]:
    """Check a mapping of names, which become names of files."""
    if not isinstance(said, dict) or (key == "arms" and not said):
        raise ValueError(f"Expected `{key}` to be a mapping from names but got {said!r}.")
    for name in said:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(
                f"Expected a name in `{key}` of letters, digits and `_.+=-`, beginning with a letter or digit, but got "
                f"{name!r}; put quotes around one of digits only."
            )
    return said


def _overrides(said: Any, where: str) -> Config:
    """Return nested overrides; of a list each is merged over those before it."""
    parts = said if isinstance(said, list) else [{} if said is None else said]
    overrides: Config = {}
    for part in parts:
        if not isinstance(part, dict):
            raise ValueError(f"{where}: expected nested options such as {{model: ...}} but got {part!r}.")
        _check_keys(part, ("seed_everything", "trainer", "model", "data"), where)
        overrides = merged(overrides, part)
    return overrides


def _seeds(said: Any) -> tuple[int, ...]:
    seeds = _listed(said)
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"Expected `seeds` to be distinct whole numbers of at least 0 but got {said!r}.")
    return tuple(seeds)


def _listed(said: Any) -> list[Any]:
    return list(said) if isinstance(said, list) else [said]


def _search(said: Any) -> Search:
    _check_keys(said, SEARCH_KEYS, "search")
    options = {}
    for option, keys in _named(said.get("options", {}), "options").items():
        if not isinstance(keys, dict) or not all(isinstance(values, list) and values for values in keys.values()):
            raise ValueError(
                f"search: {option}: expected a mapping from configuration keys to lists of values, such as "
                f"{{model.optimizer.init_args.lr: [0.001, 0.003]}}, but got {keys!r}."
            )
        sizes = {key: len(values) for key, values in keys.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"search: {option}: every arm has as many tries, so expected as many values of each: {sizes}."
            )
        options[option] = keys
    if not options:
        raise ValueError("search: expected `options`, each with keys and values to try, but there are none.")
    return Search(options, int(said.get("seed", 1000)), str(said.get("score", SCORES[0])))


def _claim(name: str, said: Any, arms: Iterable[str], data: Iterable[str], scores: tuple[str, ...]) -> Claim:
    where = f"claims: {name}"
    if not isinstance(said, dict):
        raise ValueError(f"{where}: expected a mapping with {', '.join(CLAIM_KEYS)} but got {said!r}.")
    _check_keys(said, CLAIM_KEYS, where)
    for key in ("compare", "with", "expects", "by"):
        if key not in said:
            raise ValueError(f"{where}: expected `{key}`, which is to be fixed before the runs, but there is none.")
    compare, with_ = tuple(_listed(said["compare"])), tuple(_listed(said["with"]))
    chosen = tuple(_listed(said.get("data", list(data))))
    for group, known, kind in ((compare + with_, list(arms), "arm"), (chosen, list(data), "data set")):
        for member in group:
            if member not in known:
                raise ValueError(f"{where}: there is no {kind} {member!r}.{nearest(str(member), known)}")
    if said["expects"] not in EXPECTATIONS:
        raise ValueError(
            f"{where}: expected `expects` to be one of {', '.join(EXPECTATIONS)} but got {said['expects']!r}."
        )
    by = said["by"]
    if isinstance(by, bool) or not isinstance(by, int | float) or by < 0 or (by == 0 and said["expects"] == "same"):
        raise ValueError(
            f"{where}: expected `by`, points of the score, of at least 0 (`same`: above 0) but got {by!r}."
        )
    score = str(said.get("score", scores[0]))
    return Claim(name, str(said.get("says", name)), compare, with_, said["expects"], float(by), score, chosen)


# ----------------------------------------------------------------------------------------------------- configurations
def merged(base: Any, over: Any) -> Any:
    """Put overrides over a configuration: mappings are merged key by key, all else is replaced.

    A class with other options keeps those that are not given; another class starts from its own defaults.

    Example:
        >>> merged({"loss": {"class_path": "A", "init_args": {"x": 1, "y": 2}}}, {"loss": {"init_args": {"y": 3}}})
        {'loss': {'class_path': 'A', 'init_args': {'x': 1, 'y': 3}}}
        >>> merged({"loss": {"class_path": "A", "init_args": {"x": 1}}}, {"loss": {"class_path": "B"}})
        {'loss': {'class_path': 'B'}}
    """
    if isinstance(base, str) and isinstance(over, dict) and set(over) == {"init_args"}:
        base = {"class_path": base}  # a class can be given by its name alone
    if not isinstance(base, dict) or not isinstance(over, dict):
        return deepcopy(over)
    if "class_path" in over and class_name(over) != class_name(base):
        return deepcopy(over)
    return deepcopy(base) | {key: merged(base.get(key), value) for key, value in over.items()}


def class_name(said: Any) -> str:
    """Return the name of a class, given by its path or with options, without its modules."""
    path = said.get("class_path", "") if isinstance(said, dict) else said
    return str(path).rpartition(".")[2]


def find_key(config: Config, key: str) -> str | None:
    """Return where in a configuration a key of the search is, with dots; None if the configuration does not name it.

    A class in the key applies where this class is used, and stands for its options, also those left at their default.

    Example:
        >>> config = {"loss": {"class_path": "TripletLoss"}, "dim": 8}
        >>> find_key(config, "dim"), find_key(config, "loss.TripletLoss.margin")
        ('dim', 'loss.init_args.margin')
        >>> find_key(config, "loss.ContrastiveLoss.margin") is None
        True
    """
    *parents, last = key.split(".")
    part: Any = config
    place, optional = [], False
    for parent in parents:
        optional = parent[:1].isupper()  # an option of a class may be left out, any other part has to be there
        if optional and class_name(part) != parent:
            return None
        place.append("init_args" if optional else parent)
        part = part.get(place[-1]) if isinstance(part, dict) else None
    there = isinstance(part, dict) and last in part
    return ".".join([*place, last]) if there or optional else None


def with_values(config: Config, values: Values) -> Config:
    """Return a configuration with values at keys that are written with dots.

    Example:
        >>> with_values({"a": {"b": 1, "c": 2}}, {"a.b": 3})
        {'a': {'b': 3, 'c': 2}}
        >>> with_values({"loss": "A"}, {"loss.init_args.margin": 3})
        {'loss': {'class_path': 'A', 'init_args': {'margin': 3}}}
    """
    for key, value in values.items():
        over: Any = value
        for part in reversed(key.split(".")):
            over = {part: over}
        config = merged(config, over)
    return config
