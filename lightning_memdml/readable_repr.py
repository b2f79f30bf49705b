"""How an object with many options is printed: its class, and the options that are not their defaults."""

from __future__ import annotations

import inspect
from typing import Any


def options_repr(made: Any) -> str:
    """Return an object as the call that makes it, without options that have their default or no short text.

    Args:
        made: An object whose attributes have the names of its options.

    Example:
        >>> class Example:
        ...     def __init__(self, size: int = 8, name: str = "a", other: object = None) -> None:
        ...         self.size, self.name, self.other = size, name, other
        >>> options_repr(Example(size=9, other=Example()))
        'Example(size=9)'
    """
    shown = []
    for item in inspect.signature(type(made)).parameters.values():
        value = getattr(made, item.name, item.default)
        text = repr(value)
        is_plain = not text.startswith("<") and "\n" not in text
        if value is not inspect.Parameter.empty and value is not item.default and value != item.default and is_plain:
            shown.append(f"{item.name}={text}")
    return f"{type(made).__name__}({', '.join(shown)})"
