"""Merges the configurations and class options of a command line into one, before they are parsed.

jsonargparse lets a class that replaces another inherit every option that both have, defaults included: SGD instead of
AdamW would decay weights by 0.01, and folders of photographs would be read at the 28 pixels of glyphs. Here a new class
keeps the options that a configuration set, starts from its own defaults otherwise, and what is dropped is printed.

The size of batches in a packaged configuration is a proposal: it shrinks where there are few classes. What the user
sets, in a file or on the command line, is never changed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_info

from lightning_memdml.cli_messages import find_class, parameters_of
from lightning_memdml.packaged_configs import find_config, is_packaged

BATCH_OPTIONS = ("--data.batch_size", "--data.init_args.batch_size")


class StrictLoader(yaml.SafeLoader):
    """Refuses a repeated key in a mapping. Plain YAML silently keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping, if each of its keys stands there once."""
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) > 1:
                raise RepeatedKeyError(
                    f"{node.start_mark.name}, line {node.start_mark.line + 1}: expected every key once but {key!r} "
                    "is repeated. Rename or remove one."
                )
        return super().construct_mapping(node, deep)


class RepeatedKeyError(ValueError):
    """A key that stands twice in a mapping."""


class _Loader(StrictLoader):
    """Reads 1e-3 as a number, as jsonargparse does and YAML 1.1 does not."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


class _Dumper(yaml.SafeDumper):
    """Writes values out, where PyYAML would write an anchor, which no checkpoint may hold."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def write_yaml(config: dict[str, Any]) -> str:
    """Return a configuration as YAML without anchors.

    Example:
        >>> values = [1, 2]
        >>> write_yaml({"a": values, "b": values}).split()
        ['a:', '-', '1', '-', '2', 'b:', '-', '1', '-', '2']
    """
    return yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def require_order(arguments: Sequence[str]) -> None:
    """Refuse an option of a class that stands before the class: the class starts from its own defaults.

    Raises:
        ValueError: If there is one.
    """
    seen: set[str] = set()
    for name in (argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
        early = sorted(other for other in seen if other.startswith(f"{name}."))
        if early and not {name, f"{name}+"} & seen:
            raise ValueError(
                f"Expected {name} before {early[0]}, which it would forget: a class has its own defaults. "
                "Exchange them."
            )
        seen.add(name)


def _yaml_problem(file: Path, text: str, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"Expected YAML in {file} but it cannot be read: {error}. Save it again as plain text."
    line = (text.splitlines() or [""])[min(mark.line, len(text.splitlines()) - 1)]
    return (
        f"Expected YAML in {file} but line {mark.line + 1}, {line.strip()!r}, does not fit: "
        f"{getattr(error, 'problem', error)}. Indent keys of one level alike, with spaces, and close all brackets."
    )


def merge_arguments(arguments: Sequence[str], defaults: dict[str, Any]) -> list[str]:
    r"""Return the arguments with one configuration instead of several, and with no option that changes its classes.

    Args:
        arguments: Options of a command, without its name.
        defaults: The configuration below all others.

    Example:
        >>> merge_arguments(["--loss", "TripletLoss", "--k", "1"], {"loss": {"class_path": "ContrastiveLoss"}})
        ['--config', 'loss:\n  class_path: TripletLoss\n', '--k', '1']
    """
    config, others = deepcopy(defaults), []
    shrink: bool | None = None  # None: no configuration or option sets the size of batches
    places = iter(range(len(arguments)))
    for place in places:
        name, equals, value = arguments[place].partition("=")
        if not equals and place + 1 < len(arguments):
            value = arguments[place + 1]
        taken = False
        if name in ("--config", "-c"):
            source = _read(value)
            if source is None:
                return list(arguments)  # for the error of the parser
            options = _data_options(source)
            if "batch_size" in options:
                shrink = is_packaged(value)
            shrink = options.get("shrink_batch", shrink)
            config, taken = merge(config, source), True
        elif name.startswith("--"):
            shrink = False if name in BATCH_OPTIONS else shrink
            config, taken = _with_class(config, name[2:], value)
        if not taken:
            others.append(arguments[place])
        elif not equals:
            next(places)
    _set_shrink(config, shrink)
    return ["--config", write_yaml(config), *others]


def _data_options(config: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the data module in a configuration; empty if it has none."""
    data = config.get("data")
    options = data.get("init_args") if isinstance(data, dict) else None
    return options if isinstance(options, dict) else {}


def _set_shrink(config: dict[str, Any], shrink: bool | None) -> None:
    """Set whether batches shrink to the classes, if the data module has that option."""
    options = _data_options(config)
    if shrink is None or shrink == options.get("shrink_batch", False):
        return
    kind = find_class(config["data"].get("class_path", ""))
    if kind is not None and "shrink_batch" in parameters_of(kind):
        options["shrink_batch"] = shrink


def merge(base: Any, over: Any, where: str = "") -> Any:
    """Merge one configuration over another: mappings key by key, everything else is replaced.

    A class that replaces another keeps what the other was set to, as far as it has such an option.

    Example:
        >>> merge({"class_path": "ContrastiveLoss", "init_args": {"margin": 0.7}}, "TripletLoss")
        {'class_path': 'TripletLoss', 'init_args': {'margin': 0.7}}
    """
    if isinstance(base, str) and isinstance(over, dict) and "init_args" in over and "class_path" not in over:
        base = {"class_path": base}  # a class may be given by its name alone
    if isinstance(base, dict) and "class_path" in base and (path := _class_path(over)) is not None:
        over = {"class_path": path} if isinstance(over, str) else over
        if not _is_same(base["class_path"], path):
            base = _kept(base, path, where)
    if not isinstance(base, dict) or not isinstance(over, dict):
        return deepcopy(over)
    found = deepcopy(base)
    for key, value in over.items():
        inner = where if key in ("init_args", "dict_kwargs") else f"{where}.{key}".lstrip(".")
        found[key] = merge(base.get(key), value, inner)
    return found


def _class_path(value: Any) -> str | None:
    """Return the path of a class that replaces another: with options, or by its name alone."""
    if isinstance(value, dict):
        path = value.get("class_path")
        return path if isinstance(path, str) else None
    return value if isinstance(value, str) and find_class(value) is not None else None


def _is_same(one: str, other: str) -> bool:
    return one == other or (find_class(one) is not None and find_class(one) is find_class(other))


def _kept(old: dict[str, Any], path: str, where: str) -> dict[str, Any]:
    """Return the new class with the options of the old one that it has, and print the others."""
    was, made = find_class(old["class_path"]), find_class(path)
    options = {**old.get("init_args", {}), **old.get("dict_kwargs", {})}
    defaults = {} if was is None else {name: item.default for name, item in parameters_of(was).items()}
    # A saved configuration names defaults too, which the user did not choose.
    chosen = {
        name: value for name, value in options.items() if name not in defaults or not _equal(value, defaults[name])
    }
    has = {} if made is None else parameters_of(made)
    kept = {name: value for name, value in chosen.items() if name in has}
    dropped = [name for name in chosen if name not in has]
    if chosen:
        rank_zero_info(
            f"{where}: {path.rpartition('.')[2]} instead of {old['class_path'].rpartition('.')[2]}"
            f"{f' keeps {_listed(kept)}' if kept else ''}{' and' if kept and dropped else ''}"
            f"{f' drops {_listed(dropped)}' if dropped else ''}."
        )
    return {"class_path": path, **({"init_args": kept} if kept else {})}


def _equal(value: Any, default: Any) -> bool:
    return value == (list(default) if isinstance(default, tuple) else default)


def _listed(names: Any) -> str:
    return ", ".join(names)


def _with_class(config: Any, name: str, value: str) -> tuple[Any, bool]:
    """Put a class option into the configuration if it changes a class there; return it and whether it did."""
    *parents, last = [part for part in name.split(".") if part != "init_args"]
    copy = deepcopy(config)
    part = copy
    for parent in parents:
        part = _inside(part).get(parent)
        if not isinstance(part, dict):
            return config, False
    inside = _inside(part)
    old = inside.get(last)
    if not isinstance(old, dict) or "class_path" not in old:
        return config, False
    path = _class_path(value)
    if path is None or _is_same(old["class_path"], path):
        return config, False
    inside[last] = merge(old, path, name)
    return copy, True


def _inside(part: dict[str, Any]) -> dict[str, Any]:
    return part.setdefault("init_args", {}) if "class_path" in part else part  # of a copy


def _read(source: str) -> dict[str, Any] | None:
    """Return a configuration from a file, a packaged one or a text, dotted keys as mappings; None if there is none."""
    file = find_config(source)
    try:
        text = source if file is None else file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"Expected YAML in {source} but it is no text in UTF-8. Pass another file.") from None
    except OSError:
        return None
    try:
        with io.StringIO(text) as stream:
            stream.name = str(file)  # where an error is
            found = yaml.load(stream, Loader=_Loader)
    except RepeatedKeyError:
        raise
    except (ValueError, yaml.YAMLError) as error:
        if file is None:
            return None
        raise ValueError(_yaml_problem(file, text, error)) from error
    return _nested(found) if isinstance(found, dict) else None


def _nested(config: dict[Any, Any]) -> dict[str, Any]:
    """Write dotted keys as mappings."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        for name in reversed(str(key).split(".")):
            value = {name: value}
        found = merge(found, value)
    return found
