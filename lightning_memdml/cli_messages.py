"""Messages of the command line: help that fits a screen, and the nearest right name for a wrong one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pydoc import ErrorDuringImport, locate
from typing import Any, NoReturn

import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch import loggers as lightning_loggers
from lightning.pytorch.cli import LightningArgumentParser

# What is imported here can be named without its module, on the command line and in YAML.
from lightning_memdml import callbacks, data, losses, memory
from lightning_memdml.backbones import SmallConvNet, nearest
from lightning_memdml.commands import unknown_command
from lightning_memdml.compat import help_formatter
from lightning_memdml.schedules import LinearRamp, WarmupCosine

CLASSES: dict[str, Any] = {
    **{name: made for module in (torch.optim, torch.optim.lr_scheduler) for name, made in vars(module).items()},
    **{
        name: getattr(module, name)
        for module in (lightning_loggers, lightning_callbacks, memory, data, callbacks, losses)
        for name in module.__all__
    },
    **{made.__name__: made for made in (SmallConvNet, LinearRamp, WarmupCosine)},
}
CLASS_NAMES = [name for name in CLASSES if name[0].isupper()]
MANY_CLASSES = 40
PASS = " Pass one of these."
OTHERWISE = {
    "class": " Write one of your own with its module: my_module.MyClass.",
    "option": " `--help_all` lists all options.",
}

#: What jsonargparse and argparse write of each mistake, and what is read of it. Their exceptions carry this text and
#: nothing else. `tests/test_cli_messages.py` makes each mistake, and so fails if a version words it differently.
WORDING = {
    "key": r'Parser key "([\w.]+)"',
    "unknown class": r"Expected a dot import path string: ([\w.]+)",
    "unknown class of a module": r"module '([\w.]+)' has no attribute '(\w+)'",
    "missing module": r"class_path '([\w.]+)':\s+No module named '([\w.]+)'",
    "class": r"class_path[= ]'([\w.]+)'",
    "unknown parameter": r"(?:class_path '(?:\w+\.)*(\w+)':\s+)?Option '([\w.]+)' is not accepted",
    "wrong value": r"Expected a (\S.*?)\. Got value: (.+?)(?:\. Got value.*)?$",
    "value of several types": r"Given value: (.+)",
    "choices": r"Expected a typing\.Literal\[(.*?)\]",
    "class of another kind": r"Import path ?([\w.]*) does not correspond to a subclass of (\w+)",
    "missing options": r"arguments are required: (.*)",
    "unknown option": r"unrecognized arguments: --([\w.]+)",
    "unknown option of a command": r"not accept option '([\w.]+)",
    "unknown command": r"argument subcommand: invalid choice: '([\w-]*)'",
    "no command": r'(expected "subcommand")',
}
NOISE = re.compile(
    r"Does not validate against any|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but"
)


class ArgumentParser(LightningArgumentParser):
    """Reports a wrong name together with the nearest right one.

    Args:
        own_options: Further options: name -> keyword arguments of `add_argument`.
    """

    def __init__(self, *args: Any, own_options: Mapping[str, dict[str, Any]] | None = None, **kwargs: Any) -> None:
        self.commands: Any = None
        # `--ckpt` would be taken for `--ckpt_path` in one version, and be an error once there is `--ckpt_name`.
        super().__init__(*args, formatter_class=help_formatter(MANY_CLASSES), allow_abbrev=False, **kwargs)
        for name, option in (own_options or {}).items():
            self.add_argument(name, **option)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong in one line, and exit with 2."""
        # The parser of a nested class does not exit; the one around it reports the message.
        if self.exit_on_error:
            self.exit(2, f"error: {readable(message, self._options())}\n")
        super().error(message, ex)

    def print_usage(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing: before an error this would be a list of all options."""

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        """Add commands, and keep them for the names of their options."""
        self.commands = super().add_subcommands(*args, **kwargs)
        return self.commands

    def _options(self) -> list[str]:
        """Return the options of this parser and of its commands, as they are typed."""
        parsers = [self, *(self.commands.choices.values() if self.commands is not None else ())]
        defaults = [parser.get_defaults(skip_validation=True) for parser in parsers]
        return list(dict.fromkeys(f"--{key}" for namespace in defaults for key, _ in namespace.items()))


def readable(message: str, options: Sequence[str] = ()) -> str:
    r"""Return a message of jsonargparse in one line: where, what is wrong, and the nearest right name.

    Args:
        message: The message of jsonargparse.
        options: All options, as they are typed.

    Example:
        >>> readable('Parser key "model.loss":\n  Expected a dot import path string: Contrastve')
        "model.loss: There is no class 'Contrastve'. Did you mean 'ContrastiveLoss'?"
    """
    key = ".".join(dict.fromkeys(find("key", message)))
    for explain in (_wrong_classes, _wrong_parameters, _wrong_values, _misplaced_classes, _other_kinds):
        if found := list(dict.fromkeys(explain(message))):
            return "\n".join(f"{key}: {sentence}" if key else sentence for sentence in found)
    if found := [*_missing(message, key, options), *_wrong_options(message, options)]:
        return "\n".join(found)
    message = re.sub(rf"^{WORDING['key']}:\s+", r"\1: ", message)
    return "\n".join(dict.fromkeys(line for line in message.splitlines() if line.strip() and not NOISE.search(line)))


def find(mistake: str, message: str) -> list[Any]:
    """Return what `WORDING` reads of a mistake, for each place where it is in a message."""
    return re.findall(WORDING[mistake], message, re.MULTILINE)


def _wrong_classes(message: str) -> Iterator[str]:
    for name in find("unknown class", message):
        if name not in CLASS_NAMES:
            yield _unknown("class", name, CLASS_NAMES)
    for path, module in find("missing module", message):
        own = path.startswith(module) and "." not in module
        place = f" Put {module}.py into the working directory, or install the package." if own else " Install it."
        yield f"There is no module {module!r}.{place}"
    for module, name in find("unknown class of a module", message):
        yield _unknown("class", f"{module}.{name}", [f"{module}.{other}" for other in dir(import_module(module))])


def _wrong_parameters(message: str) -> Iterator[str]:
    classes = [find_class(path) for path in find("class", message)]
    names = [name for found in classes if found is not None for name in parameters_of(found)]
    listed = ", ".join(dict.fromkeys(name for name in names if name not in ("self", "args", "kwargs")))
    owners: dict[str, str] = {}
    for owner, name in find("unknown parameter", message):
        owners.setdefault(name, owner)
    for name, owner in owners.items():
        sentence = f"{f'{owner} has' if owner else 'There is'} no option {name!r}."
        yield sentence + nearest(
            name, names, _data_module_with(name, owner) or (f" Options: {listed}." if listed else "")
        )


def _data_module_with(option: str, owner: str) -> str:
    """Return which data module to take for an option that another one does not have."""
    found = [name for name in data.__all__ if option in parameters_of(getattr(data, name))]
    if not found or owner not in data.__all__:
        return ""
    first = next((name for name in ("FolderDataModule", "TableDataModule") if name in found), found[0])
    return f" It is an option of {first}: `--data {first} --data.{option} ...`."


def find_class(path: str) -> Any:
    """Return the class or function of a path, or of a name that needs no module; None if there is none."""
    if "." not in path:
        return CLASSES.get(path)
    try:
        return locate(path)
    except ErrorDuringImport as error:
        raise ValueError(
            f"Expected a class or function {path} but its module cannot be imported: {error.value}. "
            "Correct the module, or install what it needs."
        ) from error


def parameters_of(found: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters of a function, or of a class and those it passes others on to."""
    parameters: dict[str, inspect.Parameter] = {}
    for part in inspect.getmro(found) if inspect.isclass(found) else (found,):
        with suppress(ValueError):  # builtins have no signature
            parameters = {**inspect.signature(part).parameters, **parameters}
    return parameters


def _wrong_values(message: str) -> Iterator[str]:
    if "Union subtypes" in message and (given := find("value of several types", message)):
        value = given[0].strip()
        lists = find("choices", message)
        choices = list(dict.fromkeys(name.strip("' ") for found in lists for name in found.split(",")))
        plain = [kind for kind in ("bool", "int", "float", "str") if f"Expected a <class '{kind}'>" in message]
        expected = f"one of {', '.join(choices)}" if choices else " or ".join(plain)
        if expected and "class_path" not in message and "import path" not in message:
            yield f"Expected {expected} but got {value!r}.{nearest(value, choices, PASS if choices else '')}"
            return
    for kind, value in find("wrong value", message):
        kind = re.sub(r"<class '(.*)'>|typing\.", r"\1", kind)
        if "Sequence" in kind or kind.startswith("list"):
            yield f"Expected a list, such as [{value}], but got {value!r}."
            continue
        choices = re.findall(r"'([^']*)'", kind) if kind.startswith("Literal") else []
        kind = f"one of {', '.join(choices)}" if choices else kind
        yield f"Expected {kind} but got {value!r}.{nearest(value, choices, PASS if choices else '')}"


def _misplaced_classes(message: str) -> Iterator[str]:
    for name in find("unknown class", message):
        yield f"The class {name!r} does not belong here."


def _other_kinds(message: str) -> Iterator[str]:
    for path, base in find("class of another kind", message):
        yield (
            f"Expected a class that derives from {base}, or a function that returns one, but got "
            f"{path or 'another'}. Derive it, or annotate what the function returns: `-> {base}`."
        )


def _missing(message: str, key: str, options: Sequence[str]) -> Iterator[str]:
    for names in dict.fromkeys(find("missing options", message)):
        # jsonargparse writes `fit.model.loss` for a command, and `root` for the class at the key `data`.
        typed = [f"{key}.{name}" if key else re.sub(r"^\w+\.", "", name) for name in names.split(", ")]
        shown = ", ".join(f"--{name}" if key or f"--{name}" in options else name for name in typed)
        evaluated = re.match(r"(validate|test|predict)\.", names)
        checkpoint = ", or a checkpoint of `memdml fit` as --ckpt_path" if evaluated else ""
        example = " For example: `memdml fit --config glyphs_memory`." if names.startswith("fit.model.") else ""
        yield f"Expected {shown}, on the command line or in a file given with --config{checkpoint}.{example}"
    if find("no command", message):
        yield unknown_command("")


def _wrong_options(message: str, options: Sequence[str]) -> Iterator[str]:
    for name in [*find("unknown option of a command", message), *find("unknown option", message)]:
        yield _unknown("option", f"--{name}", options)
    for name in find("unknown command", message):
        yield unknown_command(name)


def _unknown(kind: str, name: str, names: Iterable[str]) -> str:
    return f"There is no {kind} {name!r}.{nearest(name, names, OTHERWISE[kind])}"


def require_backbone(backbone: Any) -> None:
    """Name what is wrong with the import path of a backbone, which the parser leaves as text.

    Raises:
        ValueError: If there is no such module or class, or it is no network.
    """
    if not isinstance(backbone, str) or ":" in backbone or "." not in backbone:
        return
    module, _, name = backbone.rpartition(".")
    try:
        found = vars(import_module(module))
    except ModuleNotFoundError as error:
        raise ValueError(
            f"Expected a backbone in the module {module!r} but got {error}. Put {module}.py into the working "
            "directory, or install the package."
        ) from error
    if name not in found:
        classes = [other for other, kind in found.items() if isinstance(kind, type)]
        listed = ", ".join(classes) or "no class"
        raise ValueError(
            f"Expected a class of the module {module!r} as the backbone but got {name!r}."
            f"{nearest(name, classes, f' The module has {listed}.')}"
        )
    raise ValueError(
        f"Expected the backbone {backbone} to be a torch.nn.Module, or a function that returns one, but it is neither. "
        "Derive the class from torch.nn.Module, or annotate what the function returns: `-> torch.nn.Module`."
    )
