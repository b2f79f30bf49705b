"""The study file: arms, data sets, seeds, the search, and the claims to be decided."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from lightning_memdml.backbones import nearest
from lightning_memdml.config_merging import StrictLoader
from lightning_memdml.study.overrides import Config, class_name, merged, with_callback
from lightning_memdml.study.search import Search
from lightning_memdml.study.statistics import EXPECTATIONS, Expectation

# The key `parts` is not read: it holds YAML anchors.
KEYS = (
    "title", "base", "parts", "arms", "data", "seeds", "search", "equal", "scores", "confidence", "control", "claims",
    "trend",
)  # fmt: skip
SEARCH_KEYS = ("options", "seeds", "tries", "extend", "score")
CONTROL_KEYS = ("compare", "with")
TREND_KEYS = ("over", "arms")
CLAIM_KEYS = ("says", "compare", "with", "expects", "by", "score", "data")
SCORES = ("map_at_r", "recall_at_1", "r_precision")
SHUFFLED = {"class_path": "lightning_memdml.callbacks.ShuffleLabels"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]*")


class Claim(NamedTuple):
    """A statement about the difference between two groups of arms, written down before any run.

    Attributes:
        name: Its key in the file.
        says: The statement in words.
        compare: The first group of arms; the mean of its scores is compared.
        with_: The second group of arms, whose mean is subtracted.
        expects: The expected region of the difference, see `statistics.judge`.
        by: The smallest difference that counts, in points (hundredths of the score).
        score: The score that is compared.
        data: The data sets of the comparison.
    """

    name: str
    says: str
    compare: tuple[str, ...]
    with_: tuple[str, ...]
    expects: Expectation
    by: float
    score: str
    data: tuple[str, ...]


class Trend(NamedTuple):
    """Arms that differ in one number, such as the size of the memory. The report draws their scores over it.

    Attributes:
        over: What the number is, in words.
        arms: Number -> arm, in increasing order. The others are compared with the first.
    """

    over: str
    arms: dict[float, str]


@dataclass(frozen=True)
class Study:
    """The content of a study file.

    Attributes:
        path: The file.
        title: The heading of the report.
        base: The configuration that all arms share.
        arms: Name -> nested overrides of the base, already merged into one.
        data: Name of a data set -> nested overrides. A file without data sets has one without overrides.
        seeds: Seeds of the scored runs.
        search: The search, or `None`.
        equal: What all arms of a data set share: the whole `budget` (optimiser steps and images per step), or for
            questions about the batch size only the `steps`, or only the `images` in total.
        scores: The scores of the tables. The figures show the first.
        confidence: Confidence of intervals, and of all verdicts jointly.
        control: A planted difference that every data set must detect, or `None`.
        shuffled: The arm that is another one with shuffled training labels, if the control is one.
        claims: The claims.
        trend: Arms that differ in one number, or `None`.
        rule: The part of the file that decides the verdicts.
    """

    path: Path
    title: str
    base: Config
    arms: dict[str, Config]
    data: dict[str, Config]
    seeds: tuple[int, ...]
    search: Search | None
    equal: Literal["budget", "steps", "images"]
    scores: tuple[str, ...]
    confidence: float
    control: Claim | None
    shuffled: str | None
    claims: tuple[Claim, ...]
    trend: Trend | None
    rule: dict[str, Any]

    @property
    def rule_key(self) -> str:
        """Hash of the rule that decides the verdicts. Every run stores it, so that a later change is visible."""
        return hashlib.sha256(json.dumps(self.rule, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def config(self, arm: str, data: str) -> Config:
        """Return the configuration of an arm on a data set: the base, then the data set, then the arm."""
        config = merged(merged(self.base, self.data[data]), self.arms[arm])
        return with_callback(config, SHUFFLED) if arm == self.shuffled else config


def read_study(path: Path | str) -> Study:
    """Read a study file.

    Raises:
        ValueError: If the file is not YAML, or a key is missing, misspelt or repeated. The message names the place.
    """
    path = Path(path)
    content = _read_yaml(path)
    _check_keys(content, KEYS, str(path))
    for key in ("base", "arms", "seeds"):
        if key not in content:
            raise ValueError(f"{path}: expected the key `{key}` but it is missing. Add it to the file.")
    arms = {name: _overrides(value, f"arms: {name}") for name, value in _named(content["arms"], "arms").items()}
    data = {name: _overrides(value, f"data: {name}") for name, value in _named(content.get("data", {}), "data").items()}
    data = data or {_data_name(path, content["base"]): {}}
    confidence = content.get("confidence", 0.95)
    if not isinstance(confidence, float) or not 0.5 < confidence < 1:
        raise ValueError(f"Expected `confidence` in (0.5, 1) but got {confidence!r}. Write 0.95, for example.")
    if (equal := content.get("equal", "budget")) not in ("budget", "steps", "images"):
        raise ValueError(f"Expected `equal` to be budget, steps or images but got {equal!r}. Write one of these.")
    scores = tuple(_as_list(content.get("scores", list(SCORES))))
    named_claims = _named(content.get("claims", {}), "claims")
    control, shuffled = content.get("control"), None
    if isinstance(control, dict) and "with" not in control and isinstance(compared := control.get("compare"), str):
        if compared in arms:
            shuffled = f"{compared} with shuffled labels"
            arms[shuffled] = arms[compared]
        control = {**control, "with": shuffled or compared}  # `_claim` refuses an arm that is unknown
    return Study(
        path=path,
        title=str(content.get("title", path.stem)),
        base=_read_yaml(path.parent / str(content["base"])),
        arms=arms,
        data=data,
        seeds=_seeds(content["seeds"]),
        search=_search(content["search"]) if content.get("search") else None,
        equal=equal,
        scores=scores,
        confidence=confidence,
        control=_control(control, arms, data, scores) if control else None,
        shuffled=shuffled,
        claims=tuple(_claim(name, claim, arms, data, scores) for name, claim in named_claims.items()),
        trend=_trend(content["trend"], arms) if content.get("trend") else None,
        rule={name: content[name] for name in ("claims", "control") if content.get(name)} | {"confidence": confidence},
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"Expected a YAML file but there is no file {path}. Check the path.")
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, StrictLoader)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected YAML in {path} but it cannot be parsed: {error}. Correct the file.") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected a mapping in {path} but got {type(content).__name__}. Write `key: value` lines.")
    return content


def _data_name(path: Path, base: Any) -> str:
    """Name the data set of a study without the key `data` after its class."""
    data = _read_yaml(path.parent / str(base)).get("data", "data")
    return class_name(data).removesuffix("DataModule") or "data"


def _check_keys(content: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in content:
        if key not in known:
            raise ValueError(
                f"{where}: expected one of the keys {', '.join(known)} but got {key!r}."
                f"{nearest(str(key), known, ' Remove it, or correct its indentation.')}"
            )


def _named(content: Any, key: str) -> dict[str, Any]:
    """Check a mapping whose keys become parts of file names."""
    if not isinstance(content, dict) or (key == "arms" and not content):
        raise ValueError(
            f"Expected `{key}` to be a mapping from names but got {content!r}. Write a `name:` for each, indented."
        )
    for name in content:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(
                f"Expected a name in `{key}` of letters, digits and `_.+=-` that begins with a letter or digit but got "
                f"{name!r}. Put a name of digits only in quotes."
            )
    return content


def _overrides(content: Any, where: str) -> Config:
    """Return nested overrides. The elements of a list are merged in their order."""
    parts = content if isinstance(content, list) else [{} if content is None else content]
    overrides: Config = {}
    for part in parts:
        if not isinstance(part, dict):
            raise ValueError(
                f"{where}: expected nested options such as {{model: ...}} but got {part!r}. Write some, or {{}}."
            )
        _check_keys(part, ("seed_everything", "trainer", "model", "data"), where)
        overrides = merged(overrides, part)
    return overrides


def _seeds(content: Any) -> tuple[int, ...]:
    seeds = _as_list(content)
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"Expected `seeds` to be distinct whole numbers of at least 0 but got {content!r}. "
            "Write [0, 1, 2], for example."
        )
    return tuple(seeds)


def _as_list(content: Any) -> list[Any]:
    return list(content) if isinstance(content, list) else [content]


def _search(content: Any) -> Search:
    if not isinstance(content, dict):
        raise ValueError(f"search: expected a mapping with `options` but got {content!r}. Indent its keys below it.")
    _check_keys(content, SEARCH_KEYS, "search")
    options = {}
    for option, keys in _named(content.get("options", {}), "options").items():
        if not isinstance(keys, dict) or not all(isinstance(values, list) and values for values in keys.values()):
            raise ValueError(
                f"search: {option}: expected a mapping from configuration keys to lists of values, such as "
                f"{{model.optimizer.init_args.lr: [0.001, 0.003]}}, but got {keys!r}. Put the values in a list."
            )
        sizes = {key: len(values) for key, values in keys.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"search: {option}: expected the same number of values for every key, because every arm has the same "
                f"number of tries, but got {sizes}. Make the lists equally long."
            )
        options[option] = keys
    if not options:
        raise ValueError(
            "search: expected `options`, each with keys and values to try, but there are none. Add some, or "
            "remove `search`."
        )
    tries, extend = content.get("tries"), content.get("extend", 0)
    for name, value, least in (("tries", tries, 1), ("extend", extend, 0)):
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(
                f"search: expected `{name}` to be a whole number of at least {least} but got {value!r}. Correct it."
            )
    return Search(options, _seeds(content.get("seeds", [1000])), tries, extend, str(content.get("score", SCORES[0])))


def _control(content: Any, arms: Iterable[str], data: Iterable[str], scores: tuple[str, ...]) -> Claim:
    """Return the control as a claim: the arm `compare` must be better than the arm `with` on every data set."""
    if isinstance(content, dict):
        _check_keys(content, CONTROL_KEYS, "control")
        content = {**content, "expects": "more", "by": 0}
    return _claim("control", content, arms, data, scores)


def _trend(content: Any, known: Iterable[str]) -> Trend:
    if not isinstance(content, dict):
        raise ValueError(
            f"trend: expected a mapping with {', '.join(TREND_KEYS)} but got {content!r}. Indent its keys below it."
        )
    _check_keys(content, TREND_KEYS, "trend")
    over, arms = content.get("over"), content.get("arms")
    if not isinstance(over, str) or not over.strip():
        raise ValueError(f"trend: expected `over`, what the number is in words, but got {over!r}. Write it as a text.")
    if not isinstance(arms, dict) or len(arms) < 2 or not all(map(_is_number, arms)):
        raise ValueError(
            "trend: expected `arms` to be a mapping from at least two numbers to arms, such as "
            f"{{0: batch, 512: memory}}, but got {arms!r}. Name two arms or more."
        )
    _check_members(arms.values(), known, "arm", "trend")
    return Trend(over, dict(sorted(arms.items())))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _check_members(members: Iterable[Any], known: Iterable[str], kind: str, where: str) -> None:
    known = list(known)
    for member in members:
        if member not in known:
            raise ValueError(
                f"{where}: expected one of the {kind}s {', '.join(known)} but got {member!r}."
                f"{nearest(str(member), known, ' Name one of these.')}"
            )


def _claim(name: str, content: Any, arms: Iterable[str], data: Iterable[str], scores: tuple[str, ...]) -> Claim:
    where = name if name == "control" else f"claims: {name}"
    if not isinstance(content, dict):
        raise ValueError(
            f"{where}: expected a mapping with {', '.join(CLAIM_KEYS)} but got {content!r}. Indent its keys below it."
        )
    _check_keys(content, CLAIM_KEYS, where)
    for key in ("compare", "with", "expects", "by"):
        if key not in content:
            raise ValueError(f"{where}: expected the key `{key}`, fixed before the runs, but it is missing. Add it.")
    compare, with_ = tuple(_as_list(content["compare"])), tuple(_as_list(content["with"]))
    chosen = tuple(_as_list(content.get("data", list(data))))
    _check_members(compare + with_, arms, "arm", where)
    _check_members(chosen, data, "data set", where)
    if content["expects"] not in EXPECTATIONS:
        raise ValueError(
            f"{where}: expected `expects` to be one of {', '.join(EXPECTATIONS)} but got {content['expects']!r}. "
            "Write one of these."
        )
    by = content["by"]
    if isinstance(by, bool) or not isinstance(by, int | float) or by < 0 or (by == 0 and content["expects"] == "same"):
        raise ValueError(
            f"{where}: expected `by`, points of the score, of at least 0 (`same`: above 0) but got {by!r}. Write 0.5, "
            "for example."
        )
    score = str(content.get("score", scores[0]))
    return Claim(name, str(content.get("says", name)), compare, with_, content["expects"], float(by), score, chosen)
