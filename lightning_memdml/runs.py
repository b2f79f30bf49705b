"""What a run leaves: its folder, and checkpoints that say how to build it again."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning import Trainer

CONFIG_IN_CHECKPOINT = "memdml_config"  # the configuration of `memdml fit`, as YAML


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
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else "it is damaged, or holds code"
        raise ValueError(f"Expected a checkpoint that can be read but got {path}: {reason}.") from error
