"""Inside `losses`, imports point one way too: each module imports only what stands below it, type checking included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lightning_memdml.losses

FOLDER = Path(lightning_memdml.losses.__file__).parent
PREFIX = "lightning_memdml.losses."
# From the bottom to the top. What stands in one line does not import each other.
LAYERS = [
    {"constants"},
    {"row_ops", "listed_pairs", "polynomials", "weights", "weight_mass"},
    {"definition"},
    {"backends.triton.shared"},
    {"shared_references"},
    {"accumulators"},
    {"backends.bfloat16_prefilter", "backends.triton.codegen"},
    {"backends.triton.merging", "backends.triton.program"},
    {"backends.triton.launching"},
    {"backends.triton.elementwise", "backends.triton.kernel"},
    {"streaming"},
    {"sharded"},
    {"pair_loss"},
]
KNOWN = set().union(*LAYERS)
PACKAGES = {"__init__", "backends.__init__", "backends.triton.__init__"}
# A loss stands on the module that is called, whose names include those of the definition, and on the ground floor.
BELOW_A_LOSS = {"pair_loss", *LAYERS[0], *LAYERS[1]}


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(FOLDER).with_suffix("").parts)


FILES = sorted(FOLDER.rglob("*.py"), key=module_of)
LOSSES = [file for file in FILES if module_of(file) not in KNOWN | PACKAGES]


def imported(file: Path) -> set[str]:
    """The modules of `losses` that a module imports anywhere, as `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write the whole name of the module"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    modules = {module_of(file) for file in FILES}
    return {name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)} & modules


@pytest.mark.parametrize("file", [file for file in FILES if module_of(file) in KNOWN], ids=module_of)
def test_a_module_imports_only_what_stands_below_it(file: Path) -> None:
    (floor,) = (floor for floor, layer in enumerate(LAYERS) if module_of(file) in layer)
    assert imported(file) <= set().union(*LAYERS[:floor])


@pytest.mark.parametrize("file", LOSSES, ids=module_of)
def test_a_loss_imports_the_module_of_losses_and_the_ground_floor(file: Path) -> None:
    assert "pair_loss" in imported(file), "a new module that is not a loss takes its place in LAYERS"
    assert imported(file) <= BELOW_A_LOSS


def test_every_layer_has_its_files() -> None:
    assert {module_of(file) for file in FILES} >= KNOWN | PACKAGES


def test_only_a_file_of_losses_is_read_as_one(tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nfrom lightning_memdml.losses import streaming\n"
        "if TYPE_CHECKING:\n    from lightning_memdml.losses.pair_loss import PairLoss\n"
        "def f():\n    import lightning_memdml.losses.backends.bfloat16_prefilter\n"
    )
    assert imported(file) == {"streaming", "pair_loss", "backends.bfloat16_prefilter"}
