"""What the command line says: help that fits a screen, and the nearest right name for a wrong one."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from pydoc import locate
from typing import Any, NoReturn

import torch
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch import loggers as lightning_loggers
from lightning.pytorch.cli import LightningArgumentParser

# What is imported here can be named without its module, on the command line and in YAML.
from lightning_memdml import callbacks, data, losses, memory
from lightning_memdml.backbones import SmallConvNet, nearest

COMMANDS = {
    "fit": "Train.",
    "validate": "Score a checkpoint on the validation classes.",
    "test": "Score a checkpoint on the test classes.",
    "predict": "Write the embeddings of the test images.",
    "data": "Look at a data set (`data check`): counts, damaged images, a contact sheet.",
    "weight-curves": "Draw the weights of a loss, or of a checkpoint.",
    "study": "Compare arms over seeds and data sets, with verdicts and a report.",
    "index": "Make images searchable with a checkpoint.",
    "search": "Find the indexed images nearest to image files.",
    "score": "Score embeddings in files, whoever made them.",
    "export": "Write the network as ONNX and as a torch.export program.",
}
ROOMS = (losses, callbacks, data, memory, lightning_callbacks, lightning_loggers)
for name in callbacks.__all__:
    getattr(callbacks, name)  # a name of this room is imported when it is first used
CLASS_NAMES = (
    SmallConvNet.__name__,
    *(name for room in ROOMS for name in room.__all__),
    *(name for module in (torch.optim, torch.optim.lr_scheduler) for name in vars(module) if name[0].isupper()),
)
MANY_CLASSES = 40
NOISE = re.compile(
    r"Does not validate against any|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but"
)


class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Leaves the description as it is written, and lists classes only where they fit on a screen."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = super()._get_help_string(action)
        shown, _, names = text.partition(", known subclasses: ")
        return f"{shown})" if names.count(",") > MANY_CLASSES else text


class ArgumentParser(LightningArgumentParser):
    """Answers a wrong name with the nearest right one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, formatter_class=HelpFormatter, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong, cut down to what a person can act on, and exit with 2."""
        # The parser of a nested class does not exit; what it says is reported by the one around it.
        super().error(readable(message, list(_options(self))) if self.exit_on_error else message, ex)

    def print_usage(self, file: Any = None) -> None:
        """Print nothing: before an error this would be a list of all options."""


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the options of a parser and of its commands, as they are typed."""
    for action in parser._actions:
        yield from (option for option in action.option_strings if option.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _options(command)


def readable(message: str, options: Sequence[str] = ()) -> str:
    r"""Return what jsonargparse says is wrong in a line: where, what, and the nearest right name.

    Args:
        message: What it says.
        options: The options there are.

    Example:
        >>> readable('Parser key "model.loss":\n  Expected a dot import path string: Contrastve')
        "model.loss: There is no class 'Contrastve'. Did you mean 'ContrastiveLoss'?"
    """
    key = ".".join(dict.fromkeys(re.findall(r'Parser key "([\w.]+)"', message)))
    for find in (_refused, _wrong_classes, _wrong_parameters, _wrong_values, _misplaced_classes):
        if found := list(dict.fromkeys(find(message))):
            return "\n".join(f"{key}: {sentence}" if key else sentence for sentence in found)
    if found := [*_missing(message, key, options), *_wrong_options(message, options)]:
        return "\n".join(found)
    message = re.sub(r'^Parser key "([\w.]+)":\s+', r"\1: ", message)
    return "\n".join(dict.fromkeys(line for line in message.splitlines() if line.strip() and not NOISE.search(line)))


def _refused(message: str) -> Iterator[str]:
    yield from re.findall(r"Refused to build .*?torch\.nn\.Module\.$", message, re.MULTILINE)


def _wrong_classes(message: str) -> Iterator[str]:
    for name in re.findall(r"Expected a dot import path string: ([\w.]+)", message):
        if name not in CLASS_NAMES:
            yield _unknown("class", name, CLASS_NAMES)
    for module, name in re.findall(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        yield _unknown("class", f"{module}.{name}", [f"{module}.{other}" for other in dir(import_module(module))])


def _wrong_parameters(message: str) -> Iterator[str]:
    classes = [locate(path) for path in re.findall(r"class_path[= ]'([\w.]+)'", message)]
    names = [name for found in classes if found is not None for name in _parameters(found)]
    owners: dict[str, str] = {}
    for owner, name in re.findall(r"(?:class_path '(?:\w+\.)*(\w+)':\s+)?Option '([\w.]+)' is not accepted", message):
        owners.setdefault(name, owner)
    for name, owner in owners.items():
        yield f"{f'{owner} has' if owner else 'There is'} no option {name!r}.{nearest(name, names)}"


def _parameters(found: Any) -> Iterator[str]:
    """Yield the parameters of a function, or of a class and those it passes others on to."""
    for part in inspect.getmro(found) if inspect.isclass(found) else (found,):
        with suppress(ValueError):  # builtins have no signature
            yield from inspect.signature(part).parameters


def _wrong_values(message: str) -> Iterator[str]:
    for kind, value in re.findall(r"Expected a (\S.*?)\. Got value: (.+?)(?:\. Got value.*)?$", message, re.MULTILINE):
        kind = re.sub(r"<class '(.*)'>|typing\.", r"\1", kind)
        if "Sequence" in kind or kind.startswith("list"):
            yield f"Expected a list, such as [{value}], but got {value!r}."
            continue
        choices = re.findall(r"'([^']*)'", kind) if kind.startswith("Literal") else []
        kind = f"one of {', '.join(choices)}" if choices else kind
        yield f"Expected {kind} but got {value!r}.{nearest(value, choices)}"


def _misplaced_classes(message: str) -> Iterator[str]:
    for name in re.findall(r"Expected a dot import path string: ([\w.]+)", message):
        yield f"The class {name!r} does not belong here."


def _missing(message: str, key: str, options: Sequence[str]) -> Iterator[str]:
    for names in dict.fromkeys(re.findall(r"arguments are required: (.*)", message)):
        # jsonargparse says `fit.model.loss` of a command, and `root` of the class at the key `data`.
        typed = [f"{key}.{name}" if key else re.sub(r"^\w+\.", "", name) for name in names.split(", ")]
        shown = ", ".join(f"--{name}" if key or f"--{name}" in options else name for name in typed)
        evaluated = re.match(r"(validate|test|predict)\.", names)
        checkpoint = ", or a checkpoint of `memdml fit` as --ckpt_path" if evaluated else ""
        yield f"Expected {shown}, on the command line or in a file given with --config{checkpoint}."
    if 'expected "subcommand"' in message:
        yield f"Expected a command: {', '.join(COMMANDS)}. `memdml --help` tells more."


def _wrong_options(message: str, options: Sequence[str]) -> Iterator[str]:
    for name in re.findall(r"(?:not accept option '|ambiguous option: --|unrecognized arguments: --)([\w.]+)", message):
        yield _unknown("option", f"--{name}", options)
    for name in re.findall(r"argument subcommand: invalid choice: '([\w-]*)'", message):
        yield _unknown("command", name, COMMANDS) + f" There are {', '.join(COMMANDS)}."


def _unknown(kind: str, name: str, names: Iterable[str]) -> str:
    return f"There is no {kind} {name!r}.{nearest(name, names)}"
