"""The configuration in a checkpoint as the first configuration of a command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_memdml.config_merging import write_yaml
from lightning_memdml.runs import config_of, read_checkpoint

KEYWORDS = ("best", "last", "hpc", "registry")  # words that Lightning takes for `--ckpt_path`


def _given(arguments: list[str]) -> argparse.Namespace:
    """Return what is given as `config`, `ckpt_path` and `trust`."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("-c", "--config")
    options.add_argument("--ckpt_path")
    options.add_argument("--trust", action="store_true")
    return options.parse_known_args(arguments)[0]


def config_source(arguments: list[str]) -> str | None:
    """Return the checkpoint whose configuration is used, or None if it is the user's own or trusted."""
    given = _given(arguments)
    return None if given.config is not None or given.trust else given.ckpt_path


def with_config_of_checkpoint(arguments: list[str]) -> list[str]:
    """Put the configuration of a checkpoint before the other arguments, if there is no other configuration.

    Raises:
        ValueError: If the checkpoint is not there, or cannot be read, or names what is not on the closed list.
    """
    given = _given(arguments)
    arguments = [argument for argument in arguments if argument != "--trust"]
    if given.ckpt_path in (None, "", "null", *KEYWORDS):
        return arguments
    if Path(given.ckpt_path).is_dir():  # as strategies that divide a network over ranks write it
        if given.config is None and not any(argument.startswith("--model") for argument in arguments):
            raise ValueError(
                f"Expected a checkpoint of `memdml fit` but {given.ckpt_path} is a folder. Pass the file in it, such "
                "as runs/latest/checkpoints/last.ckpt."
            )
        return arguments
    checkpoint = read_checkpoint(given.ckpt_path)
    if given.config is not None:
        return arguments
    config = config_of(checkpoint, given.ckpt_path, trust=given.trust, notice=True)
    if config is None or "data" not in config:
        needed = "--model" if config is None else "--data"  # a program's checkpoint may hold the model alone
        if not any(argument.startswith(needed) for argument in arguments):
            raise ValueError(
                f"Expected a checkpoint of `memdml fit`, which holds its configuration, but got {given.ckpt_path}. "
                "Pass --config FILE too, or the options of the model and the data."
            )
    if config is None:
        return arguments
    return [arguments[0], "--config", write_yaml(config), *arguments[1:]]
