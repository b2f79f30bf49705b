"""Every loss, weight function and data set can be imported, named on the command line, and is in the reference pages.

A new one is a class in a file of its own. Where something is missing, these tests print the lines to add.
"""

from __future__ import annotations

import inspect
import pkgutil
import types
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import lightning_memdml
from lightning_memdml import PairLoss, RetrievalDataModule, WeightFunction, data, losses

REPOSITORY = Path(__file__).parents[1]


def classes_of(package: ModuleType, base: type) -> list[type]:
    """The public classes that a package defines of one kind and from which it derives no other, by their names."""
    modules = [
        import_module(found.name)
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
        if not found.ispkg
    ]
    made = {
        value
        for module in modules
        for value in vars(module).values()
        # On Python 3.10 a type such as list[int] counts as a class.
        if inspect.isclass(value) and not isinstance(value, types.GenericAlias)
        if issubclass(value, base) and value.__module__ == module.__name__
    }
    return sorted(
        (kind for kind in made if kind.__name__[0] != "_" and not any(issubclass(one, kind) for one in made - {kind})),
        key=lambda kind: kind.__name__,
    )


def missing_lines(package: ModuleType, kind: type, page: Path) -> list[str]:
    """The lines that have to be added for a class, each with its file."""
    name, room = kind.__name__, package.__name__.rpartition(".")[2]
    lines = {
        f"lightning_memdml/{room}/__init__.py": [f"from {kind.__module__} import {name}", f'    "{name}",'],
        "lightning_memdml/__init__.pyi": [f"from {package.__name__} import {name} as {name}"],
        str(page.relative_to(REPOSITORY)): [f"::: {package.__name__}.{name}"],
    }
    there = {file: (REPOSITORY / file).read_text(encoding="utf-8").splitlines() for file in lines}
    if name in package.__all__:
        lines.pop(f"lightning_memdml/{room}/__init__.py")
    return [f"{file}: {line}" for file, new in lines.items() for line in new if line not in there[file]]


@pytest.mark.parametrize(
    ("package", "base", "page"),
    [(losses, PairLoss, "losses.md"), (losses, WeightFunction, "weights.md"), (data, RetrievalDataModule, "data.md")],
)
def test_every_class_is_exported_and_in_the_reference(package: ModuleType, base: type, page: str) -> None:
    found = classes_of(package, base)
    assert len(found) > 5
    missing = [line for kind in found for line in missing_lines(package, kind, REPOSITORY / "docs/api" / page)]
    assert not missing, "add these lines:\n" + "\n".join(missing)
    assert all(getattr(lightning_memdml, kind.__name__) is kind for kind in found)


def test_the_lines_to_add_for_a_new_loss_are_named() -> None:
    new = type("NewLoss", (PairLoss,), {"__module__": "lightning_memdml.losses.new"})
    assert missing_lines(losses, new, REPOSITORY / "docs/api/losses.md") == [
        "lightning_memdml/losses/__init__.py: from lightning_memdml.losses.new import NewLoss",
        'lightning_memdml/losses/__init__.py:     "NewLoss",',
        "lightning_memdml/__init__.pyi: from lightning_memdml.losses import NewLoss as NewLoss",
        "docs/api/losses.md: ::: lightning_memdml.losses.NewLoss",
    ]
