"""What a run leaves: its folder, and checkpoints that say how to build it again."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import isclass, isfunction
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, get_type_hints
from unittest import mock

import torch
from lightning import Trainer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

CONFIG_IN_CHECKPOINT = "memdml_config"  # the configuration of `memdml fit`, as YAML
# What a file may have built: what derives from these, or from a class of these packages.
KINDS = (nn.Module, Optimizer, LRScheduler)
PACKAGES = ("lightning", "torchvision", __package__)


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of this run alone, in which Lightning puts the checkpoints."""
    if trainer.logger is None:
        return Path(trainer.default_root_dir)
    version = trainer.logger.version
    root = trainer.logger.save_dir or trainer.default_root_dir
    return Path(root, str(trainer.logger.name), version if isinstance(version, str) else f"version_{version}")


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """Return what is in a checkpoint, on the CPU; code in it is never run.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else "it is damaged, or holds code"
        raise ValueError(f"Expected a checkpoint that can be read but got {path}: {reason}.") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"Expected a checkpoint but {path} holds a {type(checkpoint).__name__}.")
    return checkpoint


@contextmanager
def only_known_kinds() -> Iterator[None]:
    """Let jsonargparse build nothing inside the block by which a file could run what it wants.

    The configuration in a checkpoint names classes with their arguments. jsonargparse checks them against the type of
    the parameter, but where that is any function (a loss, a transform), it would call `os.system` with a command. Here
    a class has to be a module, an optimizer, a scheduler, or of a kind that Lightning, torchvision or this package
    defines. No function is called but those of torchvision that make a network: that a function returns a module tells
    nothing, as there is one in torch that runs a text on the way. Any may still be named as a value
    (`negative: my_weights.hard`), and what is named is imported. This is a fence and no sandbox.

    Raises:
        ValueError: If something else is named.
    """
    from jsonargparse import _typehints

    refused: list[str] = []
    class_parser = _typehints.ActionTypeHint.get_class_parser

    def checked(named: Any, *arguments: Any, **options: Any) -> Any:
        found = _typehints.import_object(named) if isinstance(named, str) else named
        if not _is_known_kind(found):
            refused.append(
                f"Refused to build {found.__module__}.{found.__qualname__} because a file says so: it is no module, "
                "optimizer, scheduler, nor of a kind that Lightning, torchvision or this package defines. If it is "
                "yours, let it be a torch.nn.Module."
            )
            raise ValueError(refused[0])
        return class_parser(found, *arguments, **options)

    try:
        with mock.patch.object(_typehints.ActionTypeHint, "get_class_parser", checked):
            yield
    except Exception as error:
        if refused or isinstance(error, ArgumentError):  # the latter of Lightning's own parser
            raise ValueError(refused[0] if refused else str(error)) from error
        raise
    if refused:  # where a value may be anything, jsonargparse goes on without it
        raise ValueError(refused[0])


def _is_known_kind(found: Any) -> bool:
    if isfunction(found) and found.__module__.partition(".")[0] == "torchvision":
        made = get_type_hints(found).get("return")
        return isclass(made) and issubclass(made, nn.Module)
    return isclass(found) and any(
        base in KINDS or base.__module__.partition(".")[0] in PACKAGES for base in found.__mro__
    )
