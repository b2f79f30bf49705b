"""`memdml COMMAND --help`: a page of the common options, without importing a training library.

Descriptions and defaults are read from the source of the functions and classes that take the options. `--help_all`
lists all options, those of Lightning's Trainer too.
"""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lightning_memdml.packaged_configs import config_names

PACKAGE = Path(__file__).parent
WIDEST = 100  # columns
POSITIONAL = {"freeze": ("images", "output"), "search": ("images",), "export-index": ("index", "output")}
# Where the options of a training are taken, and those that the page shows, with a short description.
LEARNER, DATA, FOLDER, MEMORY = (
    ("learner.py", "MetricLearner"),
    ("data/module.py", "RetrievalDataModule"),
    ("data/folder.py", "FolderDataModule"),
    ("callbacks/memory.py", "MemoryCallback"),
)
TRAINING: dict[str, list[tuple[str, str, tuple[str, str] | str]]] = {
    "Network and loss": [
        ("--model.backbone", "`resnet50`, `timm:NAME`, ..., or a class", LEARNER),
        ("--model.weights", "of the backbone: a file, or DEFAULT for published ones", LEARNER),
        ("--model.loss", "in the batch: ContrastiveLoss, TripletLoss, ...", LEARNER),
        ("--model.memory_loss", "against the memory; by default the same loss", LEARNER),
        ("--model.memory_weight", "weight of the memory term", LEARNER),
        ("--model.embedding_dim", "width of the embedding", LEARNER),
        ("--model.head_init", "`whitening` for pretrained features", LEARNER),
        ("--model.backbone_lr", "learning rate of the backbone; by default the same", LEARNER),
        ("--model.layer_decay", "factor of the rate per block, from the last to the first", LEARNER),
        ("--model.optimizer", "with --model.optimizer.lr and others", "AdamW"),
        ("--model.lr_scheduler", "WarmupCosine, or a scheduler of torch", LEARNER),
    ],
    "Images": [
        ("--data", "FolderDataModule, CUB200, ...", "GlyphDataModule"),
        ("--data.root", "the folder of the images, with one folder per class", FOLDER),
        ("--data.batch_size", "images in a batch; by default 64, or what fits", DATA),
        ("--data.images_per_class", "of each class in a batch", DATA),
        ("--data.image_size", "side in pixels; by default 224, or by the data set", DATA),
        ("--data.val_fraction", "share of the training classes for validation", DATA),
        ("--data.num_workers", "processes that open images; by default one per core", DATA),
    ],
    "Memory": [
        ("--trainer.callbacks+=MemoryCallback", "adds a memory; then --trainer.callbacks.", ""),
        ("  ...size", "rows, or a share of the training images", MEMORY),
        ("  ...start_step", "steps before rows are stored", MEMORY),
        ("  ...encoder_momentum", "rows from a slowly moving copy of the network", MEMORY),
    ],
    "Training": [
        ("--trainer.max_steps", "optimiser steps; -1 for no limit", "-1"),
        ("--trainer.max_epochs", "-1 for no limit", "1000"),
        ("--trainer.val_check_interval", "steps between validations", "each epoch"),
        ("--trainer.accelerator", "cpu, gpu, mps, ...", "auto"),
        ("--trainer.devices", "how many", "auto"),
        ("--trainer.precision", "bf16-mixed, 16-mixed, ...", "32"),
        ("--trainer.logger", "WandbLogger, TensorBoardLogger, ...", "CSVLogger"),
    ],
}
CONFIG = ("--config", "a packaged configuration by its name, or a file", "")
CKPT = {
    "fit": ("--ckpt_path", "resume this run, such as runs/latest/checkpoints/last.ckpt", ""),
    "": ("--ckpt_path", "the checkpoint, such as runs/latest/checkpoints/last.ckpt; it holds all other options", ""),
}
OWN: dict[str, list[tuple[str, str, str]]] = {
    "fit": [
        CONFIG,
        CKPT["fit"],
        ("--reference", "compare with the frozen features of --model.weights", "true"),
        ("--report", "write report.html: scores, failures, curves, a map", "true"),
        ("--seed_everything", "seed of weights and batches", "0"),
        ("--trust", "let the checkpoint run what it names, if you trust its author", ""),
        ("--verbose", "print what Lightning and other libraries report", ""),
    ],
    "validate": [CKPT[""], CONFIG, ("--trust", "let the checkpoint run what it names, if you trust its author", "")],
    "test": [
        CKPT[""],
        CONFIG,
        ("--report", "write report.html: scores with intervals, failures, a map, the data", "true"),
        ("--trust", "let the checkpoint run what it names, if you trust its author", ""),
    ],
    "predict": [
        CKPT[""],
        CONFIG,
        ("--file_format", "`parquet`: one table; `npy`: an array beside a .csv", "parquet"),
        ("--flip", "average with the mirrored image, in twice the time", "false"),
        ("--skip_damaged", "leave out images that cannot be opened, and list them", "false"),
        ("--trust", "let the checkpoint run what it names, if you trust its author", ""),
    ],
}
EXAMPLES = {
    "fit": (
        "memdml fit --config glyphs_memory",
        "memdml fit --config photos --data.root my/images --model.weights DEFAULT",
        "memdml fit --config glyphs_memory --trainer.max_steps 500 --model.loss.margin 0.6",
    ),
    "validate": ("memdml validate --ckpt_path runs/latest/checkpoints/last.ckpt",),
    "test": ("memdml test --ckpt_path runs/latest/checkpoints/last.ckpt",),
    "predict": ("memdml predict --ckpt_path runs/latest/checkpoints/last.ckpt",),
}


class Option(NamedTuple):
    """An option of a command, as its page shows it."""

    name: str
    help: str
    default: str = ""


def help_page(name: str, help: str, function: str, options: str) -> str:
    """Return the page of a command.

    Args:
        name: Of the command.
        help: One line that describes it.
        function: `module:function` that runs it, in whose module its `DESCRIPTION` stands.
        options: `module:function` whose arguments are the options, or the module of a parser of argparse; empty for
            that of `function`.

    Example:
        >>> help_page("test", "Score.", "", "").splitlines()[0]
        'usage: memdml test [OPTIONS]'
    """
    if name in OWN:
        return "\n".join(_training_page(name, help))
    tree, arguments = _parsed(_file_of(options or function)), options.partition(":")[2]
    description = _constant(tree, "DESCRIPTION") or _constant(_parsed(_file_of(function)), "DESCRIPTION") or help
    found = list(_function_options(name, _find(tree, arguments)) if arguments else _parser_options(tree))
    positional = "".join(f" {option.name}" for option in found if not option.name.startswith("-"))
    command = "data check" if name == "data" else name
    lines = [f"usage: memdml {command}{positional} [OPTIONS]", "", *description.splitlines(), "", "Options:"]
    lines += _rows(found)
    return "\n".join([*lines, "", f"`memdml {command} --help_all` lists all options."])


def _training_page(name: str, help: str) -> Iterator[str]:
    yield from (f"usage: memdml {name} [OPTIONS]", "", help, "")
    yield from (f"  {line}" for line in EXAMPLES[name])
    yield from ("", "Options, with their defaults:")
    yield from _rows([Option(*option) for option in OWN[name]])
    if name == "fit":
        for title, options in TRAINING.items():
            yield f"{title}:"
            yield from _rows([Option(option, text, _default(option, place)) for option, text, place in options])
        names = ", ".join(config_names())
        yield from textwrap.wrap(f"Packaged configurations: {names}.", _width(), subsequent_indent="  ")
        yield "`memdml configs` describes them. `--data.help CLASS`, `--model.loss.help CLASS` and so on"
        yield "explain a class."
    yield f"`memdml {name} --help_all` lists all options{'' if name == 'fit' else ', which are those of fit'}."


def _width() -> int:
    return max(60, min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns))


def _rows(options: list[Option]) -> Iterator[str]:
    """Yield the options, each in as few lines as its description takes."""
    column = min(30, max((len(option.name) for option in options), default=0)) + 4
    for option in options:
        default = f" [{option.default}]" if option.default not in ("", "None", "false") else ""
        start = f"  {option.name}"
        lines = textwrap.wrap(f"{option.help}{default}", _width() - column) or [""]
        if len(start) >= column - 1:
            lines = textwrap.wrap(f"{option.help}{default}", _width() - len(start) - 2) or [""]
            yield f"{start}  {lines[0]}"
        else:
            yield f"{start:{column}}{lines[0]}"
        yield from (f"{'':{column}}{line}" for line in lines[1:])


def _file_of(path: str) -> Path:
    """Return the source file of a function `module:function` of this package."""
    return PACKAGE.parent.joinpath(*path.partition(":")[0].split(".")).with_suffix(".py")


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _constant(tree: ast.Module, name: str) -> str:
    """Return a text that a module defines; empty if it does not."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and [ast.unparse(target) for target in statement.targets] == [name]:
            return str(ast.literal_eval(statement.value))
    return ""


def _function_options(command: str, function: ast.FunctionDef) -> Iterator[Option]:
    """Yield the arguments of a function, described by its docstring."""
    described, defaults = _described(function), _defaults(function)
    for name, text in described.items():
        is_positional = name in POSITIONAL.get(command, ())
        default = defaults.get(name)
        text = text if default is not None or is_positional else f"{text} Required."
        yield Option(name.upper() if is_positional else f"--{name}", text, (default or "").strip("'\""))


def _find(tree: ast.Module, name: str) -> ast.FunctionDef:
    """Return a function, or the `__init__` of a class."""
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == name:
            return statement
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return next(
                part for part in statement.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"
            )
    raise ValueError(
        f"Expected {name!r} in the source of its command but there is none. Correct its row in `COMMANDS`."
    )


def _described(function: ast.FunctionDef) -> dict[str, str]:
    """Return the description of each argument in a docstring, as one line."""
    text = inspect.cleandoc(ast.get_docstring(function) or "")
    arguments = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    entries = re.findall(
        r"^ {4}(\w+): (.*?)(?=^ {4}\w+: |\Z)", arguments[1] if arguments else "", re.MULTILINE | re.DOTALL
    )
    return {name: " ".join(entry.split()) for name, entry in entries}


def _defaults(function: ast.FunctionDef) -> dict[str, str]:
    """Return the defaults of a function's arguments, as they are written."""
    names = [*function.args.posonlyargs, *function.args.args]
    values = function.args.defaults
    pairs = list(zip(names[len(names) - len(values) :], values, strict=True))
    pairs += [
        (name, value)
        for name, value in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
        if value is not None
    ]
    return {name.arg: _as_typed(ast.unparse(value)) for name, value in pairs}


def _as_typed(default: str) -> str:
    """Return a default as a user would type it: a tuple as a list, a truth value in small letters."""
    if default.startswith("("):
        return f"[{default.strip('()').rstrip(',')}]".replace("'", "")
    return default.lower() if default in ("True", "False") else default


def _default(option: str, place: tuple[str, str] | str) -> str:
    """Return the default of an option of a training: given, or that of a class in a file."""
    if isinstance(place, str):
        return place
    file, name = place
    return _defaults(_find(_parsed(PACKAGE / file), name)).get(option.rpartition(".")[2], "").strip("'\"")


def _parser_options(tree: ast.Module) -> Iterator[Option]:
    """Yield the options that a module adds to a parser of argparse."""
    for node in ast.walk(tree):
        if not (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
        ):
            continue
        if not (node.args and isinstance(node.args[0], ast.Constant)):
            continue
        name, options = str(node.args[0].value), {keyword.arg: keyword.value for keyword in node.keywords}
        text = str(ast.literal_eval(options["help"])) if "help" in options else ""
        default = ast.unparse(options["default"]) if "default" in options else ""
        path = re.fullmatch(r"Path\('(.*)'\)", default)
        shown = path[1] if path else "" if default.startswith("[") else default.strip("'\"")
        if not name.startswith("-"):
            is_optional = "nargs" in options and ast.literal_eval(options["nargs"]) == "?"
            name = f"[{name.upper()}]" if is_optional else name.upper()
        yield Option(name, text, shown)
