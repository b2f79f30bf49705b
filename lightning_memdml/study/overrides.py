"""Nested configurations: merge overrides, find an option by its dotted key, and set it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

Config = dict[str, Any]
Values = dict[str, Any]  # dotted configuration key -> value

# The options of the learner, and of its data, that decide the scores before the training.
NETWORK = (
    "backbone", "weights", "num_features", "embedding_dim", "pooling", "neck", "head", "head_init",
)  # fmt: skip
SAMPLING = ("batch_size", "images_per_class", "batches_per_epoch", "seed", "train_transform")


def merged(base: Any, over: Any) -> Any:
    """Merge overrides into a configuration: mappings key by key, everything else is replaced.

    Options of the same class are kept unless they are overridden. Another class starts from its own defaults.

    Example:
        >>> merged({"loss": {"class_path": "A", "init_args": {"x": 1, "y": 2}}}, {"loss": {"init_args": {"y": 3}}})
        {'loss': {'class_path': 'A', 'init_args': {'x': 1, 'y': 3}}}
        >>> merged({"loss": {"class_path": "A", "init_args": {"x": 1}}}, {"loss": {"class_path": "B"}})
        {'loss': {'class_path': 'B'}}
    """
    if isinstance(base, str) and isinstance(over, dict) and set(over) == {"init_args"}:
        base = {"class_path": base}  # a class may be given by its name alone
    if not isinstance(base, dict) or not isinstance(over, dict):
        return deepcopy(over)
    if "class_path" in over and class_name(over) != class_name(base):
        return deepcopy(over)
    return deepcopy(base) | {key: merged(base.get(key), value) for key, value in over.items()}


def class_name(value: Any) -> str:
    """Return the class name of a `class_path`, or of a mapping that has one, without its modules."""
    path = value.get("class_path", "") if isinstance(value, dict) else value
    return str(path).rpartition(".")[2]


def find_key(config: Config, key: str) -> str | None:
    """Return the dotted place of a search key in a configuration, or `None` if the configuration does not set it.

    A class name in the key matches only where this class is used. It gives access to all options of the class,
    including those that the configuration leaves at their default.

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
        optional = parent[:1].isupper()  # a class: its options may be left out; every other part must be present
        if optional and class_name(part) != parent:
            return None
        place.append("init_args" if optional else parent)
        part = part.get(place[-1]) if isinstance(part, dict) else None
    there = isinstance(part, dict) and last in part
    return ".".join([*place, last]) if there or optional else None


def with_values(config: Config, values: Values) -> Config:
    """Return a copy of a configuration with values set at dotted keys.

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


def with_callback(config: Config, callback: Config) -> Config:
    """Return a copy of a configuration with one more callback.

    Example:
        >>> with_callback({"trainer": {"callbacks": {"class_path": "A"}}}, {"class_path": "B"})
        {'trainer': {'callbacks': [{'class_path': 'A'}, {'class_path': 'B'}]}}
    """
    given = config.get("trainer", {}).get("callbacks") or []
    return merged(config, {"trainer": {"callbacks": [*(given if isinstance(given, list) else [given]), callback]}})


def reference_config(config: Config) -> Config:
    """Return the part of a configuration that decides the scores before the training.

    Example:
        >>> config = {"model": {"backbone": "A", "memory_weight": 2}, "data": {"init_args": {"batch_size": 8, "x": 1}}}
        >>> reference_config(config)
        {'model': {'backbone': 'A'}, 'data': {'init_args': {'x': 1}}, 'trainer': {'limit_test_batches': None}}
    """
    data = deepcopy(config["data"])
    for name in SAMPLING:
        data.get("init_args", {}).pop(name, None)
    model = {name: config["model"][name] for name in NETWORK if name in config["model"]}
    trainer = {"limit_test_batches": config.get("trainer", {}).get("limit_test_batches")}
    return {"model": model, "data": data, "trainer": trainer}
