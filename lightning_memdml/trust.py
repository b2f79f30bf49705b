"""The trust boundary: what a file that somebody else may have made can have built.

A checkpoint and an index hold a configuration that names classes and their options. It is read as data and compared
with the closed list in `lightning_memdml.trust_table`. A file that names anything else is refused before anything in it
is imported or built. What is on the list is passed to the parser, with every class spelled in full. The list does not
restrict what users name themselves, in their own `--config` or options.
"""

from __future__ import annotations

import collections.abc
import copy
import re
from collections.abc import Iterator
from importlib import import_module
from inspect import isclass, signature
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_memdml.trust_sizes import MAX_BYTES, requested_bytes
from lightning_memdml.trust_table import (
    CONFIG,
    GROUPS,
    IGNORED,
    Classes,
    Fixed,
    InputPath,
    NetworkName,
    OneOf,
    Options,
    Plain,
    Rule,
    Text,
    Texts,
    Words,
)

Kind = TypeVar("Kind")
MAX_CHARACTERS = 2_000_000  # of a configuration; those of `memdml fit` have a few thousand
MAX_NODES = 100_000
MAX_DEPTH = 32
TRUST_IT = "If you trust the maker of this file, pass `--trust` (in Python `trust=True`)"
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE | re.ASCII)


class UntrustedFileError(ValueError):
    """A file names something that only the user may name."""


class Refusal(NamedTuple):
    """A value in a file that is not on the closed list."""

    where: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.where} = {self.got}"


def read_yaml(text: Any, source: str, *, trust: bool = False) -> Any:
    """Read YAML from a file that somebody else may have made.

    Anchors and aliases are refused: a few hundred characters of them can stand for gigabytes.

    Args:
        text: The YAML.
        source: The file, for the error.
        trust: Allow anchors and aliases, and any length and depth.

    Raises:
        ValueError: If it is damaged, too long or too deep, or has anchors, aliases or unknown tags.

    Example:
        >>> read_yaml("a: [1, 2]", "last.ckpt")
        {'a': [1, 2]}
    """
    import yaml

    expected = f"Expected the configuration in {source} to be plain YAML"
    if not isinstance(text, str):
        raise ValueError(f"{expected} but got a {type(text).__name__}. Pass another file.")
    if len(text) > MAX_CHARACTERS and not trust:
        raise ValueError(f"{expected} of at most {MAX_CHARACTERS:,} characters but got {len(text):,}. {TRUST_IT}.")
    depth = 0
    try:
        for nodes, event in enumerate([] if trust else yaml.parse(text, Loader=yaml.SafeLoader)):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise ValueError(f"{expected} but got anchors or aliases. Write their values out.")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH or nodes > MAX_NODES:
                raise ValueError(
                    f"{expected} of at most {MAX_NODES:,} values and {MAX_DEPTH} levels but got more. {TRUST_IT}."
                )
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{expected} but it cannot be read: {str(error).splitlines()[0]}. Pass another.") from error
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # the last of numbers and dates
        raise ValueError(f"{expected} but it cannot be read: {str(error).splitlines()[0]}. Pass another.") from error


def allowed_config(config: Any, source: str, *, trust: bool = False, notice: bool = False) -> dict[str, Any]:
    """Return what a configuration from a file may build, or refuse the file.

    Args:
        config: The configuration as plain data: some of the keys `seed_everything`, `trainer`, `model` and `data`.
        source: The file, for errors and notices.
        trust: Allow what is not on the closed list, and print what that is.
        notice: Print what is not taken from the file.

    Returns:
        The configuration, with every class spelled in full. What decides where something is written or downloaded
        has its default.

    Raises:
        UntrustedFileError: If the file names something that is not on the closed list, and `trust` is False.

    Example:
        >>> allowed_config({"model": {"loss": "ContrastiveLoss"}}, "last.ckpt")["model"]["loss"]
        {'class_path': 'lightning_memdml.losses.ContrastiveLoss', 'init_args': {}}
    """
    if not trust and _is_too_large(config):
        raise UntrustedFileError(
            f"Expected {source} to hold at most {MAX_NODES:,} values in {MAX_DEPTH} levels but got more. {TRUST_IT}."
        )
    walk = _Walk()
    found = walk.config(config)
    refused = ", ".join(map(str, walk.refused[:5])) + (", ..." if len(walk.refused) > 5 else "")
    if refused and not trust:
        first = walk.refused[0]
        raise UntrustedFileError(
            f"Expected {first.where} in {source} to be {first.expected} but got {first.got}. {TRUST_IT}, which "
            f"allows {refused}."
        )
    if trust:
        if refused:
            rank_zero_warn(f"Trusted {source} to build and run {refused}.")
        return {key: value for key, value in config.items() if key not in IGNORED}
    needed = requested_bytes(found)
    if sum(needed.values()) > MAX_BYTES:
        raise UntrustedFileError(
            f"Expected {source} to ask for at most {MAX_BYTES / 1e9:.0f} GB but {', '.join(needed)} ask for "
            f"{sum(needed.values()) / 1e9:.0f} GB. {TRUST_IT}."
        )
    if notice and walk.replaced:
        rank_zero_info(f"Not taken from {source}: {', '.join(walk.replaced)}. Pass your own, or `--trust`.")
    return found


def find_refused(config: Any) -> list[str]:
    """Return what in a configuration a file could not name, to tell users before they train with it."""
    walk = _Walk()
    walk.config(config)
    return [str(refusal) for refusal in walk.refused]


def build(kind: type[Kind], config: Any) -> Kind:
    """Build an object from a class path and options.

    Args:
        kind: Its class, or a base of it.
        config: The class path, or a mapping of `class_path` and `init_args`, that `allowed_config` has returned.

    Raises:
        ValueError: If they do not fit the class.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    # A class of the user's may have parameters without a type. What a file may put there was decided before.
    parser.add_subclass_arguments(kind, "data", fail_untyped=False)
    try:
        # The parser changes the lists in what it is given.
        return parser.instantiate(parser.parse_object({"data": copy.deepcopy(config)})).data
    except ArgumentError as error:
        raise ValueError(str(error)) from error


def build_arguments(kind: type, config: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Build the arguments of a class.

    Args:
        kind: The class.
        config: Its options.
        given: Arguments that are built already, and are not taken from `config`.

    Raises:
        ValueError: If they do not fit the class.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    # A class of the user's may have parameters without a type. What a file may put there was decided before.
    parser.add_class_arguments(kind, "model", skip=set(given), instantiate=False, fail_untyped=False)
    # The options of a default class, AdamW, would otherwise go over to the class that takes its place.
    defaults = {name: item.default for name, item in signature(kind).parameters.items()}
    parser.set_defaults({f"model.{name}": None for name in config if isclass(defaults.get(name)) and name not in given})
    try:
        config = {name: value for name, value in config.items() if name not in given}
        return {**vars(parser.instantiate(parser.parse_object({"model": config})).model), **given}
    except ArgumentError as error:
        raise ValueError(str(error)) from error


class _Walk:
    """Compares plain data with the rules, and collects what is refused and what is replaced."""

    def __init__(self) -> None:
        self.refused: list[Refusal] = []
        self.replaced: list[str] = []

    def config(self, config: Any) -> dict[str, Any]:
        if not isinstance(config, dict):
            return self._refuse("the configuration", "a mapping", config) or {}
        found = {}
        for key, value in config.items():
            if key in CONFIG:
                found[key] = self.value(CONFIG[key], value, key)
            elif key not in IGNORED:
                self._refuse(f"the key {key!r}", f"one of {', '.join(CONFIG)}", value)
        return found

    def value(self, rule: Rule, value: Any, where: str, owner: str = "") -> Any:
        """Return the value that is passed on, and note if there is none, or if it differs from that of the file."""
        if isinstance(rule, Fixed):
            if rule.notice and value not in (rule.value, None, False):
                self.replaced.append(where)
            return rule.value
        if isinstance(rule, OneOf):
            return self._class(rule, value, where)
        if value is None:
            return None
        if isinstance(rule, Options):
            return self._options(rule, value, where)
        if isinstance(value, str):
            return self._text(rule, value, where, owner)
        if isinstance(rule, Texts):
            texts = [*value, *value.values()] if isinstance(value, dict) else value
            if isinstance(texts, list) and all(isinstance(text, str) and text.isprintable() for text in texts):
                return value
            return self._refuse(where, "texts", value)
        most = rule.most if isinstance(rule, Plain) else Plain.most
        if _is_plain(value, most):
            return value
        return self._refuse(where, f"a number of at most {most:,.0f}, or several", value)

    def _text(self, rule: Rule, value: str, where: str, owner: str) -> Any:
        if isinstance(rule, Text):
            fits, expected = re.fullmatch(rule.pattern, value) is not None, f"a text of the form {rule.pattern}"
        elif isinstance(rule, InputPath):
            remote = "://" in value or value.startswith(("\\\\", "//"))
            fits, expected = not remote and value.isprintable(), "a path on this machine"
        elif isinstance(rule, NetworkName):
            fits = value in _torchvision_names() or re.fullmatch(rule.pattern, value) is not None
            expected = "the name of a classifier of torchvision, or timm:NAME"
        elif isinstance(rule, Plain) and NUMBER.fullmatch(value):
            # YAML 1.1, and so PyYAML, reads 1e-5 as a text.
            return self.value(rule, int(value) if value.lstrip("-+").isdigit() else float(value), where)
        else:
            words = (*(rule.words if isinstance(rule, Words) else ()), *_literal_words(owner, where.rpartition(".")[2]))
            fits, expected = value in words, f"one of {', '.join(words)}" if words else "a number"
        return value if fits else self._refuse(where, expected, value)

    def _options(self, rule: Options, value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return self._refuse(where, "a mapping of options", value) or {}
        found = {}
        for key, option in value.items():
            if isinstance(key, str) and key.isidentifier() and not key.startswith("__"):
                found[key] = self.value(rule.rules.get(key, rule.others), option, f"{where}.{key}", rule.class_path)
            else:
                self._refuse(f"the key {key!r} of {where}", "the plain name of an option", option)
        return found

    def _class(self, rule: OneOf, value: Any, where: str) -> Any:
        if isinstance(value, list) and rule.many:
            return [self._class(OneOf(rule.group), item, f"{where}[{place}]") for place, item in enumerate(value)]
        if value is None and rule.otherwise is None:
            return None
        if rule.or_value is not None and not isinstance(value, dict) and self._fits(rule.or_value, value):
            return value
        spec = {"class_path": value} if isinstance(value, str) else value
        known = isinstance(spec, dict) and spec.keys() <= {"class_path", "init_args", "dict_kwargs"}
        classes = _find(rule.group, spec.get("class_path")) if known else None
        if classes is None:
            if rule.otherwise is not None:
                return self.value(rule.otherwise, value, where)
            got = spec["class_path"] if known and "class_path" in spec else value
            return self._refuse(where, f"a {rule.group} of the closed list", got)
        options = Options(f"{classes.module}.{spec['class_path'].rpartition('.')[2]}", classes.rules)
        found: dict[str, Any] = {"class_path": options.class_path}
        found["init_args"] = self._options(options, spec.get("init_args") or {}, where)
        if spec.get("dict_kwargs"):
            found["dict_kwargs"] = self._options(options, spec["dict_kwargs"], where)
        return found

    def _fits(self, rule: Rule, value: Any) -> bool:
        walk = _Walk()
        walk.value(rule, value, "")
        return not walk.refused

    def _refuse(self, where: str, expected: str, got: Any) -> Any:
        shown = repr(got)
        self.refused.append(Refusal(where, expected, shown if len(shown) < 100 else f"{shown[:97]}..."))


def _is_too_large(config: Any) -> bool:
    """Whether there are more values, or levels of them, than the walk may follow: pickled lists can hold themselves."""
    level, nodes = [config], 0
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict | list | tuple):
                inner += value.values() if isinstance(value, dict) else value
        level, nodes = inner, nodes + len(inner)
        if not level or nodes > MAX_NODES:
            break
    return bool(level)


def _is_plain(value: Any, most: float, depth: int = 0) -> bool:
    """Whether a value is made of numbers, truth values and None alone."""
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, int | float):
        return not abs(value) > most or abs(value) == float("inf")
    if isinstance(value, list | tuple | dict) and (depth > 3 or len(value) > 10_000):
        return False
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return isinstance(value, list | tuple) and all(_is_plain(item, most, depth + 1) for item in value)


def _find(group: str, path: Any) -> Classes | None:
    """Return the entry that a class path means, by its last name and the module or package that it begins with."""
    if not isinstance(path, str):
        return None
    prefix, _, name = re.sub(r"^pytorch_lightning\.", "lightning.pytorch.", path).rpartition(".")
    fitting = [
        (len(classes.module) if _is_in(prefix, classes.module) else 0, classes)
        for classes in GROUPS[group]
        # A package's top is allowed as well, such as lightning_memdml.ContrastiveLoss.
        if _is_in(prefix, classes.module) or prefix in ("", classes.module.partition(".")[0])
    ]
    fitting = [(length, classes) for length, classes in fitting if name in names_of(classes)]
    return max(fitting, key=lambda found: found[0])[1] if fitting else None


def _is_in(prefix: str, module: str) -> bool:
    """Whether a path lies in a module, or for this package in its room: files are moved, and old checkpoints stay."""
    own = module.startswith("lightning_memdml.") and prefix.startswith("lightning_memdml.")
    return own or f"{prefix}.".startswith(f"{module}.")


def names_of(classes: Classes) -> tuple[str, ...]:
    """Return the names of an entry of the list, those found in `__all__` included."""
    if classes.names == ("*",):
        return _torchvision_names()
    if classes.names:
        return classes.names
    module, kind = import_module(classes.module), load(classes.kind)
    exported = {name: getattr(module, name) for name in module.__all__}
    return tuple(name for name, made in exported.items() if isclass(made) and issubclass(made, kind))


def _torchvision_names() -> tuple[str, ...]:
    import torchvision

    return tuple(torchvision.models.list_models(module=torchvision.models))


def load(path: str) -> Any:
    """Return the class or function of an entry of the list."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _literal_words(owner: str, name: str) -> tuple[str, ...]:
    """Return the words of a parameter's `Literal` type, of a class or the first of its bases that has the parameter."""
    if not owner:
        return ()
    made = load(owner)
    for part in made.__mro__ if isclass(made) else (made,):
        function = vars(part).get("__init__") if isclass(part) else part
        # torch imports some names of its annotations for type checkers only.
        hints = get_type_hints(function, localns=vars(collections.abc)) if hasattr(function, "__annotations__") else {}
        hint = hints.get(name)
        if hint is not None:
            return tuple(word for word in _literals(hint) if isinstance(word, str))
    return ()


def _literals(hint: Any) -> Iterator[Any]:
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    for part in get_args(hint):
        yield from _literals(part)
