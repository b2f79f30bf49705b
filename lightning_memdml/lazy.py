"""Names of a package that are imported when they are first used."""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def lazy_exports(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package whose names are listed in a stub file.

    The stub is the file of the same name that ends in `.pyi`. It holds imports such as
    `from lightning_memdml.callbacks.memory import MemoryCallback as MemoryCallback`, which type checkers read as they
    are. At run time a module is imported when one of its names is first used (PEP 562), so that a training script with
    nothing but a callback and a loss does not pay for images, pictures and the command line, nor need their libraries.

    Args:
        package: The package's `__name__`.
        file: The package's `__file__`.

    Example:
        >>> import lightning_memdml
        >>> lightning_memdml.MemoryCallback.__module__
        'lightning_memdml.callbacks.memory'
    """
    homes = {
        alias.name: node.module
        for node in ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }
    # `import lightning_memdml` is enough to write `lightning_memdml.data.Cars196`.
    own = [home.removeprefix(f"{package}.") for home in homes.values() if home.startswith(f"{package}.")]
    subpackages = {home.partition(".")[0] for home in own}

    def get(name: str) -> Any:
        if name in homes:
            return getattr(import_module(homes[name]), name)
        if name in subpackages:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: [*homes, *subpackages], sorted(homes)
