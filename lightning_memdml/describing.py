"""From an object back to the class path and the arguments it was made with, as plain data for a checkpoint."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Given by whoever builds the object, or of no effect on it.
GIVEN = {"self", "params", "optimizer", "last_epoch", "verbose"}
_MISSING = object()


class NotDescribableError(ValueError):
    """An object does not show how it was made."""


def describe(made: Any) -> Any:
    """Return plain data from which `build` makes an equal object.

    Numbers, texts and collections of these stay as they are. Of any other object the class path is taken, and for each
    parameter of its constructor the attribute of the same name: `self.width = width` is all that a class has to do.

    Args:
        made: The object.

    Returns:
        A number, a text, None, a list or a mapping of these, or a mapping of `class_path` and `init_args`.

    Raises:
        NotDescribableError: If a constructor's argument is not kept under its name, or the class cannot be imported
            again, since it is defined in a script or inside a function.

    Example:
        >>> from lightning_memdml.losses import ContrastiveLoss
        >>> describe(ContrastiveLoss(margin=0.7))
        {'class_path': 'lightning_memdml.ContrastiveLoss', 'init_args': {'margin': 0.7}}
    """
    if isinstance(made, Enum):
        return made.name
    if made is None or isinstance(made, bool | int | float | str):
        return made
    if isinstance(made, Path):
        return str(made.absolute())
    if isinstance(made, torch.dtype):
        return str(made)
    if isinstance(made, list | tuple):
        return [describe(item) for item in made]
    if isinstance(made, Mapping):
        if all(isinstance(key, str) for key in made):
            return {key: describe(value) for key, value in made.items()}
        raise NotDescribableError("a mapping has keys that are no texts")
    if inspect.isroutine(made) or inspect.isclass(made):
        raise NotDescribableError(f"{made.__name__} is a function or class, not an object")
    arguments = {}
    for parameter in parameters_of(type(made)):
        value = getattr(made, parameter.name, _MISSING)
        if value is _MISSING:
            raise NotDescribableError(f"{type(made).__name__} has no attribute `{parameter.name}`, its argument")
        if not _is_default(value, parameter.default):
            arguments[parameter.name] = describe(value)
    return _spec(type(made), arguments)


def describe_factory(factory: Callable[..., Any], *given: Any) -> dict[str, Any]:
    """Describe what a function of parameters makes, such as `lambda parameters: AdamW(parameters, lr=1e-3)`.

    Args:
        factory: The function of an optimizer or a scheduler.
        *given: What it is called with.

    Returns:
        A mapping of `class_path` and `init_args`.

    Raises:
        NotDescribableError: If the object does not show how it was made, or the function fails.

    Example:
        >>> weight = nn.Parameter(torch.zeros(1))
        >>> describe_factory(lambda parameters: torch.optim.SGD(parameters, lr=0.5), [weight])
        {'class_path': 'torch.optim.SGD', 'init_args': {'lr': 0.5}}
    """
    try:
        made = factory(*given)
    except Exception as error:  # of the user's function, which may expect other parameters
        raise NotDescribableError(f"the function cannot be called here ({error})") from error
    if not isinstance(made, torch.optim.Optimizer):
        return describe(made)
    (group,) = made.param_groups if len(made.param_groups) == 1 else ({},)
    arguments = {}
    for parameter in parameters_of(type(made)):
        if parameter.name not in group:
            raise NotDescribableError(f"{type(made).__name__} does not keep `{parameter.name}`, its argument")
        if not _is_default(group[parameter.name], parameter.default):
            arguments[parameter.name] = describe(group[parameter.name])
    return _spec(type(made), arguments)


def describe_all(arguments: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Describe several objects.

    Args:
        arguments: Name -> function that describes it.

    Returns:
        Name -> description, and for those that cannot be described name -> reason.
    """
    found = {name: _description_or_error(call) for name, call in arguments.items()}
    reasons = {name: str(value) for name, value in found.items() if isinstance(value, NotDescribableError)}
    return {name: value for name, value in found.items() if name not in reasons}, reasons


def _description_or_error(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except NotDescribableError as error:
        return error


def parameters_of(kind: type) -> Iterator[inspect.Parameter]:
    """Yield the parameters of a constructor, and those of its bases as far as it passes others on to them.

    Raises:
        NotDescribableError: If it takes any number of arguments without names.
    """
    seen = set(GIVEN)
    for part in kind.__mro__:
        constructor = vars(part).get("__init__")
        if constructor is None or part in (object, nn.Module):
            continue
        items = inspect.signature(constructor).parameters.values()
        kinds = {item.kind for item in items}
        takes_others = inspect.Parameter.VAR_KEYWORD in kinds
        if inspect.Parameter.VAR_POSITIONAL in kinds and not takes_others:
            raise NotDescribableError(f"{kind.__name__} takes arguments without names")
        for item in items:
            if item.name not in seen and item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL):
                seen.add(item.name)
                yield item
        if not takes_others:
            return


def _spec(kind: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a class path and arguments, if the class can be imported again."""
    name = kind.__qualname__
    # The shortest way to import it, such as torch.optim.SGD for torch.optim.sgd.SGD.
    parts = kind.__module__.split(".")
    modules = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    module = next((path for path in modules if getattr(sys.modules.get(path), name, None) is kind), "__main__")
    if module == "__main__":
        raise NotDescribableError(f"{name} is defined in a script or inside a function; move it to the top of a module")
    return {"class_path": f"{module}.{name}", **({"init_args": arguments} if arguments else {})}


def _is_default(value: Any, default: Any) -> bool:
    if default is inspect.Parameter.empty:
        return False
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (value, default))
    plain = isinstance(value, bool | str | tuple | list | dict) and type(value) is type(default)
    return value is default or ((numbers or plain) and value == default)
