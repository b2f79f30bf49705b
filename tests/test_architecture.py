"""Imports point one way, optional libraries are not needed to import and train, and files are short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.children import run_python

import lightning_memdml

PACKAGE = Path(lightning_memdml.__file__).parent
OPTIONAL = {
    "wandb",
    "faiss",
    "timm",
    "transformers",
    "datasets",
    "huggingface_hub",
    "matplotlib",
    "pytorch_metric_learning",
    "sklearn",
    "scipy",
    "triton",
}

# What each room may import of the package, beside itself. A new room says here on what it stands.
MAY_IMPORT: dict[str, set[str]] = {
    "compat": set(),
    "bfloat16": {"compat"},
    "bfloat16_copy": {"compat"},
    "checks": set(),
    "lazy": set(),
    "losses": {"bfloat16", "bfloat16_copy", "checks", "compat", "readable_repr"},
    "memory": {"bfloat16_copy", "checks", "compat"},
    "atomic_write": set(),
    "data": {"atomic_write", "checks", "compat"},
    "picture_style": set(),
    "html_page": set(),
    "csv_table": {"atomic_write"},
    "retrieval": {"lazy", "atomic_write", "bfloat16", "checks", "html_page", "picture_style", "whitening"},
    "whitening": set(),
    "heads": {"checks", "whitening"},
    "timm_networks": set(),
    "hf_networks": set(),
    "backbone_weights": set(),
    "backbones": {"backbone_weights", "checks", "compat", "heads", "hf_networks", "timm_networks"},
    "training_images": {"compat", "memory"},
    "backbone_blocks": set(),
    "parameter_groups": {"backbone_blocks"},
    "schedules": {"checks"},
    "head_fitting": {"backbones", "heads", "training_images"},
    "trust_table": {"hf_networks"},
    "trust_sizes": set(),
    "trust": {"trust_sizes", "trust_table"},
    "runs": {"trust", "trust_sizes"},
    "describing": set(),
    "inference": {"atomic_write", "data", "retrieval", "trust", "trust_sizes", "whitening"},
    "hub": {"saving"},
    "saving": {"atomic_write", "describing", "hf_networks", "runs", "timm_networks", "trust"},
    "curves": {"losses", "checks", "atomic_write", "csv_table", "picture_style"},
    "memory_term": {"checks", "losses", "memory"},
    "callbacks": {
        *("lazy", "compat", "memory", "memory_term", "losses", "retrieval", "curves", "runs", "training_images"),
        *("atomic_write", "checks", "csv_table", "picture_style", "backbone_blocks", "readable_repr"),
    },
    "learner": {
        *("memory_term", "losses", "memory", "retrieval", "backbones", "heads", "head_fitting", "runs"),
        *("parameter_groups", "schedules", "saving", "hub", "inference", "trust_sizes"),
        *("checks", "readable_repr"),
    },
    "help_pages": {"packaged_configs"},
    "library_errors": set(),
    "readable_repr": set(),
    "commands": {"help_pages"},
    "cli_messages": {"schedules", "losses", "callbacks", "data", "memory", "backbones", "commands", "compat"},
    "plain_parser": set(),
    "packaged_configs": {"plain_parser"},
    "config_merging": {"cli_messages", "packaged_configs"},
    "checkpoint_config": {"config_merging", "runs"},
    "warnings_filter": set(),
    "verbosity": set(),
    "latest_run": set(),
    "run_folders": {"data"},
    "run_display": {"losses"},
    "run_report": {"atomic_write", "callbacks", "curves", "html_page", "retrieval", "run_display"},
    "reference_cache": {"atomic_write", "backbones", "data"},
    "reference_scores": {"backbones", "data", "heads", "reference_cache", "retrieval", "training_images"},
    "data_check": {"data", "cli_messages", "atomic_write"},
}
ROOMS = set(MAY_IMPORT)
MAY_IMPORT |= {
    "study": ROOMS,
    "deploy": ROOMS,
    "command_options": {"deploy"},
    "lightning_cli": {*ROOMS, "study", "deploy", "command_options"},
    "demo": {"atomic_write", "lightning_cli", "plain_parser", "retrieval", "verbosity"},
    "argument_paths": {"data"},
    "cli": {
        *("argument_paths", "atomic_write", "commands", "cli_messages", "latest_run", "library_errors", "verbosity"),
        "warnings_filter",
    },
    "__main__": {"cli"},
    "__init__": ROOMS - {"cli_messages", "config_merging", "commands", "packaged_configs"},
}
TESTS = Path(__file__).parent
MODULES = sorted([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")])
# Triton's decorators need it when a module is imported, so these modules are imported where they are used.
OF_TRITON = ("elementwise", "kernel", "launching", "merging", "program", "shared")
KERNELS = {PACKAGE / "losses" / "backends" / "triton" / f"{name}.py" for name in OF_TRITON}


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(tree: ast.AST, file: Path) -> Iterator[str]:
    """The full names of all modules that are imported anywhere below a node; relative ones are resolved."""
    package = ["lightning_memdml", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imported_at_once(file: Path) -> Iterator[str]:
    """What importing the module imports: not what its functions do, nor what only a type checker sees."""
    body = ast.parse(file.read_text()).body
    for statement in body:
        lazy = isinstance(statement, ast.FunctionDef | ast.ClassDef)
        if not lazy and not (isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test)):
            yield from imports(statement, file)


def rooms_imported(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    return {name.split(".")[1] for name in imports(tree, file) if name.startswith("lightning_memdml.")}


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_room_imports_only_the_rooms_it_stands_on(file: Path) -> None:
    room = room_of(file)
    assert room in MAY_IMPORT, f"say in MAY_IMPORT what {room} stands on"
    found = rooms_imported(file)
    names = set(lightning_memdml.__all__)  # `from lightning_memdml import X` would reach every room
    assert not found & names, f"{file.name} imports from the package itself: import from the room"
    assert found <= MAY_IMPORT[room] | {room}


def test_every_permission_to_import_is_used() -> None:
    used: dict[str, set[str]] = {}
    for file in MODULES:
        used.setdefault(room_of(file), set()).update(rooms_imported(file))
    wide = {room for room, others in MAY_IMPORT.items() if ROOMS - {room} <= others} | {"__init__"}
    unused = {room: others - used[room] for room, others in MAY_IMPORT.items() if room not in wide}
    assert {room: others for room, others in unused.items() if others} == {}


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_optional_libraries_are_imported_where_they_are_used(file: Path) -> None:
    found = {name.split(".")[0] for name in imported_at_once(file)} & OPTIONAL
    assert found == ({"triton"} if file in KERNELS else set())
    assert not any(name.startswith("lightning_memdml.losses.backends.triton.kernel") for name in imported_at_once(file))


def test_the_rules_are_read_from_the_imports() -> None:
    """The reader above finds what it must: nested, relative and aliased imports."""
    file = PACKAGE / "losses" / "example.py"
    tree = ast.parse(
        "from ..memory import x\nfrom . import y\ndef f():\n    import lightning_memdml.data.glyphs as g\n"
    )
    expected = {"lightning_memdml.memory.x", "lightning_memdml.losses.y", "lightning_memdml.data.glyphs"}
    assert set(imports(tree, file)) == expected


@pytest.mark.parametrize("folder", [PACKAGE, TESTS], ids=["package", "tests"])
def test_no_file_is_too_long_to_be_read_at_once(folder: Path) -> None:
    """A file of more than 400 lines does more than one thing: split it by what it does, or by what it tests."""
    lines = {str(file.relative_to(folder)): file.read_bytes().count(b"\n") for file in folder.rglob("*.py")}
    assert lines
    assert {file: count for file, count in lines.items() if count > 400} == {}


WITHOUT_OPTIONAL_LIBRARIES = """
import sys
for name in ("wandb", "faiss", "timm", "pytorch_metric_learning", "triton"):
    sys.modules[name] = None  # importing it fails, as if it were not installed
import torch
from lightning.pytorch import Trainer
from lightning_memdml import ContrastiveLoss, GlyphDataModule, MemoryCallback, MetricLearner, SmallConvNet
import lightning_memdml.cli
learner = MetricLearner(SmallConvNet(width=4), ContrastiveLoss(), embedding_dim=8)
glyphs = GlyphDataModule(num_classes=20, batch_size=8, images_per_class=2, cache_dir=sys.argv[1])
trainer = Trainer(accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                  callbacks=[MemoryCallback(size=32)])
trainer.fit(learner, glyphs)
trainer.test(learner, glyphs)
print("trained", trainer.global_step)
"""


def test_package_imports_and_trains_without_its_optional_libraries(glyph_cache: str) -> None:
    done = run_python("-c", WITHOUT_OPTIONAL_LIBRARIES, glyph_cache)
    assert "trained 2" in done.stdout
