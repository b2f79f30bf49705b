"""A trained learner and the data module it was trained with, from a checkpoint of `memdml fit`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from lightning import LightningDataModule

from lightning_memdml.cli_messages import ArgumentParser
from lightning_memdml.data import RetrievalDataModule
from lightning_memdml.learner import MetricLearner
from lightning_memdml.runs import config_of, read_checkpoint
from lightning_memdml.trust import allowed_config, build


def load_learner(ckpt_path: str | Path, device: str = "cpu", *, trust: bool = False) -> MetricLearner:
    """Return the trained learner on a device, in evaluation mode.

    Args:
        ckpt_path: A checkpoint of `memdml fit`.
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
            f"Expected `device` to be one of this machine, such as cpu, but got {device!r}: {reason}"
        ) from error


def configuration_of(ckpt_path: str | Path, *, trust: bool = False) -> dict[str, Any]:
    """Return the configuration that `memdml fit` has put into a checkpoint.

    Args:
        ckpt_path: The checkpoint.
        trust: Allow what is not on the closed list of `lightning_memdml.trust_table`.

    Raises:
        ValueError: If there is none, or it names what is not on the closed list.
    """
    checkpoint = read_checkpoint(ckpt_path)
    config = config_of(checkpoint, str(ckpt_path), trust=trust)
    if config is None or "data" not in config:
        raise ValueError(
            f"Expected a checkpoint of `memdml fit`, which holds its configuration, but {ckpt_path} has none."
        )
    return config


def data_of(config: Any, source: str = "the index", *, trust: bool = False) -> RetrievalDataModule:
    """Build a data module from `class_path` and `init_args`; no image is opened.

    Args:
        config: The class path and its options.
        source: The file they come from, for errors.
        trust: Allow what is not on the closed list: the file is the user's own, or the user trusts its maker.

    Raises:
        ValueError: If it is not a `RetrievalDataModule`, which lists its images, or not on the closed list.
    """
    data = build(LightningDataModule, allowed_config({"data": config}, source, trust=trust)["data"])
    if not isinstance(data, RetrievalDataModule):
        raise ValueError(
            f"Expected a data module that is a RetrievalDataModule but got {type(data).__name__}; pass "
            "`--data FolderDataModule --data.root DIR`, or images with `--source`."
        )
    return data


def call(function: Callable[..., Any], arguments: list[str], **kwargs: Any) -> Any:
    """Call a function with what a command line says."""
    return auto_cli(function, args=arguments, as_positional=False, parser_class=ArgumentParser, **kwargs)


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file, by which a checkpoint is known again."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
