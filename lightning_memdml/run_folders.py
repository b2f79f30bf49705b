"""The folders of runs: one for each run, and none for a run that failed at its start."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_memdml.data.paths import local_path

LOG_FILES = ("config.yaml", "hparams.yaml", "metrics.csv")  # which a run writes before its first step


def use_local_folders(trainer: Any) -> None:
    """Expand `~` and `file://` in the folders that a run writes to, of which Lightning would make folders here."""
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    places = [(trainer, "default_root_dir"), *((getattr(logger, "init_args", {}), "save_dir") for logger in loggers)]
    for options, name in places:
        folder = options.get(name)
        if folder is not None and ("://" in str(folder) or str(folder).startswith("~")):
            options[name] = str(local_path(folder, name))


def with_own_folder(logger: Logger, options: dict[str, Any], made: list[Path]) -> Logger:
    """Return a log in files whose new folder no other process has; any other logger as it is.

    Args:
        logger: The log.
        options: With which it was made.
        made: Gets the new folder.
    """
    while isinstance(logger, CSVLogger | TensorBoardLogger) and options.get("version") is None:
        try:
            Path(logger.log_dir).mkdir(parents=True)
            made.append(Path(logger.log_dir))
            break
        except FileExistsError:  # another run has just taken this version
            logger = type(logger)(**options)
    return logger


def require_run_folder(folder: Path) -> None:
    """Refuse a folder with files of something else, some of which Lightning's logs would remove or overwrite.

    Raises:
        ValueError: If the folder is neither empty nor that of a run.
    """
    if folder.is_dir() and any(folder.iterdir()) and not _is_run(folder):
        raise ValueError(
            f"Expected an empty folder or a run for the log but got {folder}, which holds other files. Pass "
            "another --trainer.logger.name or --trainer.logger.version."
        )


def _is_run(folder: Path) -> bool:
    """Whether a folder is that of a run: it has the configuration of one."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(config, dict) and {"trainer", "model"} <= config.keys()


def remove_unused(folders: Sequence[Path]) -> None:
    """Remove the folders of runs that stopped before they wrote a checkpoint or a number."""
    for folder in folders:
        files = [file for file in folder.rglob("*") if not file.is_dir()]
        log = folder / "metrics.csv"
        is_unused = all(file.parent == folder and file.name in LOG_FILES for file in files)
        if not is_unused or (log.exists() and log.stat().st_size):
            continue
        for file in files:
            file.unlink()
        with suppress(OSError):  # a folder inside it, or another process has written
            folder.rmdir()


def without_foreign_files(checkpoint: dict[str, Any], ckpt_path: str | Path | None) -> None:
    """Leave in the states of `ModelCheckpoint` only the checkpoints that lie beside the one that is loaded.

    Lightning removes what these states name when a better checkpoint replaces it, folders with all in them.
    """
    folder = Path(ckpt_path or ".").resolve().parent

    def is_ours(path: Any) -> bool:
        file = Path(str(path))
        return file.suffix == ".ckpt" and file.is_file() and not file.is_symlink() and file.resolve().parent == folder

    for state in checkpoint.get("callbacks", {}).values():
        if not isinstance(state, dict) or "best_model_path" not in state:
            continue
        for name in ("best_model_path", "last_model_path", "kth_best_model_path"):
            state[name] = state[name] if is_ours(state.get(name)) else ""
        state["best_k_models"] = {
            path: score for path, score in state.get("best_k_models", {}).items() if is_ours(path)
        }
