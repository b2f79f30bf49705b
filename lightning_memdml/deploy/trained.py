"""A trained learner and the data module it was trained with, from a checkpoint of ``memdml fit``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import auto_cli
from lightning import LightningDataModule

from lightning_memdml.cli_messages import ArgumentParser
from lightning_memdml.data import RetrievalDataModule
from lightning_memdml.learner import MetricLearner
from lightning_memdml.runs import CONFIG_IN_CHECKPOINT, only_known_kinds, read_checkpoint


def load_learner(ckpt_path: str | Path, device: str = "cpu") -> MetricLearner:
    """Return the trained learner on a device, in evaluation mode.

    Raises:
        ValueError: If the file cannot be read, or does not say how to build the learner, or there is no such device.
    """
    configuration_of(ckpt_path)
    learner = MetricLearner.load_from_checkpoint(ckpt_path, map_location="cpu").eval()
    try:
        return learner.to(device)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"Expected `device` to be one of this machine, such as cpu, but got {device!r}: {reason}"
        ) from error


def configuration_of(ckpt_path: str | Path) -> dict[str, Any]:
    """Return the configuration that ``memdml fit`` left in a checkpoint.

    Raises:
        ValueError: If there is none.
    """
    config = read_checkpoint(ckpt_path).get(CONFIG_IN_CHECKPOINT)
    if config is None:
        raise ValueError(
            f"Expected a checkpoint of `memdml fit`, which holds its configuration, but {ckpt_path} has none."
        )
    return yaml.safe_load(config)


def data_of(config: dict[str, Any]) -> RetrievalDataModule:
    """Build a data module from ``class_path`` and ``init_args``; no image is opened.

    Raises:
        ValueError: If it is not one of this package's kind, which knows its images one by one, or names something that
            a file may not have built.
    """
    with only_known_kinds():
        data = call(_same, ["--data", json.dumps(config)])
    if not isinstance(data, RetrievalDataModule):
        raise ValueError(
            f"Expected a data module that is a RetrievalDataModule but got {type(data).__name__}; pass "
            "`--data FolderDataModule --data.root DIR`, or images with `--source`."
        )
    return data


def call(function: Callable[..., Any], arguments: list[str], **kwargs: Any) -> Any:
    """Call a function with what a command line says."""
    return auto_cli(function, args=arguments, as_positional=False, parser_class=ArgumentParser, **kwargs)


def _same(data: LightningDataModule) -> LightningDataModule:
    return data


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file, by which a checkpoint is known again."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
