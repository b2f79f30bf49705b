"""The closed list decides about every parameter by which a class could be handed a function, a path or a class."""

from __future__ import annotations

import collections.abc
import inspect
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from lightning_memdml.trust import load, names_of
from lightning_memdml.trust_table import GROUPS, MODEL, TRAINER, Classes, Fixed

# Given by the program and never by a file.
GIVEN = {"self", "args", "kwargs", "params", "optimizer", "summarize_kwargs"}
PLAIN = (int, float, bool, type(None), torch.Tensor, complex)


def parameters(made: Any) -> Iterator[tuple[str, Any, Any]]:
    """Every parameter of a class, and of its bases as far as it passes others on to them."""
    for part in made.__mro__ if inspect.isclass(made) else (made,):
        function = vars(part).get("__init__") if inspect.isclass(part) else part
        if not inspect.isfunction(function):
            continue
        hints = get_type_hints(function, localns=vars(collections.abc))  # which torch imports for type checkers only
        items = inspect.signature(function).parameters
        for name, item in items.items():
            yield name, hints.get(name, inspect.Parameter.empty), item.default
        if not any(item.kind is inspect.Parameter.VAR_KEYWORD for item in items.values()):
            return


def takes_only_numbers(hint: Any, default: Any) -> bool:
    if hint is inspect.Parameter.empty:  # untyped, as in torchvision's first transforms
        return default is inspect.Parameter.empty or not (isinstance(default, str) or callable(default))
    if hint is Ellipsis or get_origin(hint) is Literal:
        return True
    if get_args(hint):
        return all(takes_only_numbers(part, None) for part in get_args(hint))
    return hint in PLAIN or getattr(hint, "__name__", "") in {"Number", "Sequence", "timedelta"}


ENTRIES = [
    (group, classes, name) for group, entries in GROUPS.items() for classes in entries for name in names_of(classes)
]


@pytest.mark.parametrize(
    ("group", "classes", "name"), ENTRIES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_parameter_that_is_no_number_has_a_rule(group: str, classes: Classes, name: str) -> None:
    if classes.module == "timm":
        pytest.importorskip("timm", reason="an optional source of networks")
    if classes.module == "torchvision.models":
        return  # the functions take `**kwargs`; the next test looks at those they name
    undecided = [
        parameter
        for parameter, hint, default in parameters(load(f"{classes.module}.{name}"))
        if parameter not in GIVEN and parameter not in classes.rules and not takes_only_numbers(hint, default)
    ]
    assert undecided == [], f"{name} ({group}): decide about {undecided} in trust_table.py"


def test_no_network_of_torchvision_loads_weights_that_a_file_names() -> None:
    (classes,) = (entry for entry in GROUPS["backbone"] if entry.module == "torchvision.models")
    found = {
        parameter
        for name in names_of(classes)
        for parameter, hint, default in parameters(load(f"torchvision.models.{name}"))
        if parameter not in GIVEN and not takes_only_numbers(hint, default)
    }
    assert "weights" in found
    assert [parameter for parameter in found if classes.rules.get(parameter) != Fixed(None)] == []


@pytest.mark.parametrize("options", [MODEL, TRAINER], ids=lambda options: options.class_path.rpartition(".")[2])
def test_learner_and_trainer_too(options: Any) -> None:
    undecided = [
        parameter
        for parameter, hint, default in parameters(load(options.class_path))
        if parameter not in GIVEN and parameter not in options.rules and not takes_only_numbers(hint, default)
    ]
    assert undecided == []


def test_a_parameter_that_takes_a_function_or_a_path_is_found() -> None:
    """The walk above sees what it must."""
    from lightning.pytorch.callbacks import LambdaCallback, OnExceptionCheckpoint
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    for made in (LambdaCallback, OnExceptionCheckpoint, ImageFolder, v2.Lambda, v2.Compose):
        assert [name for name, hint, default in parameters(made) if not takes_only_numbers(hint, default)], made
