"""A trained learner, and how the images of its training are prepared, from a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from lightning_memdml.cli_messages import ArgumentParser
from lightning_memdml.learner import MetricLearner
from lightning_memdml.runs import config_of, read_checkpoint


def load_learner(ckpt_path: str | Path, device: str = "cpu", *, trust: bool = False) -> MetricLearner:
    """Return the trained learner on a device, in evaluation mode.

    Args:
        ckpt_path: A checkpoint.
        device: Where the network runs, `cpu` or `cuda`.
        trust: Let the checkpoint build whatever it names, see `lightning_memdml.trust`.

    Raises:
        ValueError: If the file cannot be read or has no configuration, or there is no such device.
    """
    configuration_of(ckpt_path, trust=trust)
    learner = MetricLearner.load_from_checkpoint(ckpt_path, map_location="cpu", trust=trust).eval()
    try:
        return learner.to(device)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"Expected `device` to be one of this machine, such as cpu, but got {device!r}: {reason.rstrip('.')}. "
            "Pass cpu, or leave it out."
        ) from error


def configuration_of(ckpt_path: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """Return the configuration in a checkpoint of `memdml fit` or of a learner trained in Python.

    Args:
        ckpt_path: The checkpoint.
        trust: Allow what is not on the closed list of `lightning_memdml.trust_table`.

    Raises:
        ValueError: If there is none, or it names what is not on the closed list.
    """
    checkpoint = read_checkpoint(ckpt_path)
    config = config_of(checkpoint, str(ckpt_path), trust=trust)
    if config is None:
        raise ValueError(
            f"Expected a checkpoint of `memdml fit`, which holds its configuration, but {ckpt_path} has none. "
            "Pass another one."
        )
    return config


def data_config_of(ckpt_path: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """Return how the data module of a training was made, according to its checkpoint.

    Args:
        ckpt_path: The checkpoint.
        trust: Allow what is not on the closed list of `lightning_memdml.trust_table`.

    Raises:
        ValueError: If the checkpoint does not hold it, or names what is not on the closed list.
    """
    config = configuration_of(ckpt_path, trust=trust)
    if "data" not in config:
        raise ValueError(
            f"Expected {ckpt_path} to hold how its images are prepared but it does not: the learner was trained "
            "without a data module of this package. Pass `--data FolderDataModule --data.root DIR` to `memdml index`, "
            "or in Python `transform=` to `build_index` and `export` of the learner."
        )
    return config["data"]


def call(function: Callable[..., Any], arguments: list[str], **kwargs: Any) -> Any:
    """Call a function with the arguments of a command line."""
    return auto_cli(function, args=arguments, as_positional=False, parser_class=ArgumentParser, **kwargs)


def refuse_without(switch: str, is_on: bool, function: Callable[..., Any], **options: Any) -> None:
    """Refuse options that were set although they do nothing without another one.

    Args:
        switch: The option that is needed.
        is_on: Whether it is set.
        function: The function of the command, for the defaults.
        **options: The options and their values.

    Raises:
        ValueError: If one of them is not its default.
    """
    for name, value in options.items():
        if not is_on and value != signature(function).parameters[name].default:
            raise ValueError(
                f"Expected `--{switch}`, without which `--{name}` does nothing, but got `--{name} {value}` alone. Add "
                f"`--{switch}`, or leave `--{name}` out."
            )


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file, by which a checkpoint is known again."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
