"""What a run leaves behind: its folder, and checkpoints that hold the configuration to build it again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch
from lightning import Trainer

from lightning_memdml.trust import allowed_config, read_yaml
from lightning_memdml.trust_sizes import tensors_in

CONFIG_IN_CHECKPOINT = "memdml_config"  # the configuration of `memdml fit`, as YAML
HYPER_PARAMETERS = "hyper_parameters"  # Lightning's own, which a weights-only checkpoint holds alone
INSTANTIATOR = "_instantiator"  # with which Lightning marks those of a command line


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of this run alone, in which Lightning puts the checkpoints."""
    if trainer.logger is None:
        return Path(trainer.default_root_dir)
    version = trainer.logger.version
    root = trainer.logger.save_dir or trainer.default_root_dir
    return Path(root, str(trainer.logger.name), version if isinstance(version, str) else f"version_{version}")


def read_checkpoint(path: Path | str | IO[bytes], map_location: Any = "cpu") -> dict[str, Any]:
    """Return what is in a checkpoint; code in it is never run.

    Args:
        path: A file on this machine, or one that is open.
        map_location: Where the tensors go, as in `torch.load`.

    Raises:
        ValueError: If it cannot be read, or is not on this machine.
    """
    is_path = isinstance(path, Path | str)
    if is_path and "://" in str(path):
        raise ValueError(f"Expected a checkpoint on this machine but got {path}. Download the file, and pass its path.")
    file: Any = Path(path).expanduser() if isinstance(path, Path | str) else path
    if isinstance(file, Path) and file.exists() and not file.is_file():
        raise ValueError(f"Expected a checkpoint that can be read but got {path}, which is no file. Pass a file.")
    try:
        checkpoint = torch.load(file, map_location=map_location, weights_only=True, mmap=is_path or None)
    except (UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = "it is damaged, or holds code, which is never run. Pass another one."
        if isinstance(error, FileNotFoundError):
            reason = "there is no such file. Check the path."
        raise ValueError(f"Expected a checkpoint that can be read but got {path}: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"Expected a checkpoint but {path} holds a {type(checkpoint).__name__}. Pass another file.")
    if any(not _is_stored(tensor) for tensor in tensors_in(checkpoint)):
        raise ValueError(
            f"Expected a checkpoint that holds all numbers of its tensors but {path} has a tensor that is sparse, or "
            "larger than what is stored of it. Save it with `tensor.contiguous()`."
        )
    return checkpoint


def _is_stored(tensor: torch.Tensor) -> bool:
    """Whether a file holds every number of a tensor: a few bytes can stand for a tensor of any size."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return False
    return tensor.is_quantized or tensor.nbytes <= tensor.untyped_storage().nbytes()


def config_of(
    checkpoint: dict[str, Any],
    source: str,
    *,
    trust: bool = False,
    notice: bool = False,
    without: Iterable[str] = (),
) -> dict[str, Any] | None:
    """Return the configuration in a checkpoint, as far as a file may have it built; None if there is none.

    This is the one recipe of a checkpoint. Lightning's hyperparameters are read only where there is no configuration:
    in a checkpoint of `ModelCheckpoint(save_weights_only=True)`, of which they give the part `model`.

    Args:
        checkpoint: What `read_checkpoint` returns.
        source: The file, for errors.
        trust: Allow what is not on the closed list, see `lightning_memdml.trust`.
        notice: Print what is not taken from it: what decides where something is written.
        without: What is not needed, such as `data` or `model.loss`: it is neither checked nor returned.

    Raises:
        ValueError: If the configuration is damaged, or names what is not on the closed list.
    """
    text = checkpoint.get(CONFIG_IN_CHECKPOINT)
    if text is not None:
        config = read_yaml(text, source, trust=trust)
        for section, _, name in (key.partition(".") for key in without):
            part = config.get(section) if name and isinstance(config, dict) else config
            if isinstance(part, dict):
                part.pop(name or section, None)
        return allowed_config(config, source, trust=trust, notice=notice)
    options = checkpoint.get(HYPER_PARAMETERS)
    if not isinstance(options, dict) or INSTANTIATOR not in options:
        return None
    model = {
        name: value
        for name, value in options.items()
        if not str(name).startswith("_") and f"model.{name}" not in without
    }
    return allowed_config({"model": model}, source, trust=trust)
