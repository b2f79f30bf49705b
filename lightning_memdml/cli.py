"""The command ``memdml``: Lightning's CLI around the learner and the data modules."""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from jsonargparse import Namespace, _typehints
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

import lightning_memdml
from lightning_memdml.cli_messages import COMMANDS, ArgumentParser, readable
from lightning_memdml.data_check import data_command
from lightning_memdml.deploy.export import export
from lightning_memdml.deploy.index_command import index
from lightning_memdml.deploy.predictions import FileFormat, columns_of, write_embeddings
from lightning_memdml.deploy.score import score
from lightning_memdml.deploy.search_command import search
from lightning_memdml.learner import MetricLearner
from lightning_memdml.runs import CONFIG_IN_CHECKPOINT, config_of, read_checkpoint, run_folder
from lightning_memdml.study.commands import weight_curves
from lightning_memdml.study.study_command import study
from lightning_memdml.trust import find_refused

DESCRIPTION = """\
Train an embedding with a memory, and measure how well it retrieves.

  memdml fit --config experiments/glyphs_memory.yaml
  memdml fit --model.backbone SmallConvNet --model.loss ContrastiveLoss --trainer.max_epochs 5
  memdml test --ckpt_path runs/memdml/version_0/checkpoints/last.ckpt
  memdml weight-curves --loss ContrastiveLoss    draws the weights of a loss, or of a checkpoint
  memdml study STUDY.yaml    trains arms with several seeds, and says what the differences are worth
  memdml data check --data CUB200 --data.root DIR    tells what a data set holds, and what is wrong with it
  memdml index --ckpt_path runs/memdml/version_0/checkpoints/last.ckpt    makes images searchable
  memdml search bird.jpg    finds the nearest of them
  memdml score --embeddings runs/memdml/version_1/embeddings.parquet    scores what `memdml predict` has written
  memdml export --ckpt_path runs/memdml/version_0/checkpoints/last.ckpt    writes ONNX and a torch.export program
The last seven have a --help of their own.

Wherever a class is asked for, give its name, then its options: `--data FolderDataModule --data.root DIR`.
`--data.help FolderDataModule` after a command explains the options of one class."""

KEYWORDS = ("best", "last", "hpc", "registry")  # words that Lightning takes for `--ckpt_path`

# Commands beside those of Lightning's Trainer; each is given what follows its name.
OWN_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "weight-curves": weight_curves,
    "study": lambda arguments: study(arguments, MemdmlCLI),
    "data": data_command,
    "index": index,
    "search": search,
    "score": score,
    "export": export,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: What follows ``memdml``; by default what the process was started with.

    Raises:
        SystemExit: With a sentence, if a name, an option, a file or a value is wrong.
    """
    # Lightning starts the other ranks with `sys.argv`, so that is where the arguments have to stand.
    if arguments is not None:
        sys.argv[1:] = arguments
    try:
        if (command := OWN_COMMANDS.get(" ".join(sys.argv[1:2]))) is not None:
            command(["--trust=true" if argument == "--trust" else argument for argument in sys.argv[2:]])
            return
        sys.argv[1:] = with_config_of_checkpoint(sys.argv[1:])
        cli = MemdmlCLI()
    except (ValueError, TypeError, OSError, ImportError) as error:
        sentence = _sentence_of_this_package(error)
        if sentence is None:
            raise
        sys.exit(f"error: {readable(sentence)}")
    for logger in cli.trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()  # or the next run of this process would be logged into this one


def _sentence_of_this_package(error: BaseException | None) -> str | None:
    """Return what this package said to the user, if that is how it began; other errors need their traceback."""
    while error is not None:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).partition(".")[0] == __package__:
            return str(error)
        if (sentence := _sentence_of_a_worker(str(error))) is not None:
            return sentence
        error = error.__cause__  # jsonargparse wraps what a class says
    return None


def _sentence_of_a_worker(text: str) -> str | None:
    """Return what this package said in a process that opens images: torch hands on the traceback as text."""
    files = re.findall(r'^ *File "(.+)", line \d+, in ', text, re.MULTILINE)
    if not text.startswith("Caught ") or not files or Path(__file__).parent not in Path(files[-1]).parents:
        return None
    return text.strip().rpartition("\n")[2].partition(": ")[2]


def _require_order(arguments: Sequence[str]) -> None:
    """Refuse an option of a class before the class, which starts from its own defaults and would forget it.

    Raises:
        ValueError: If there is one.
    """
    seen: set[str] = set()
    for name in (argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
        early = sorted(other for other in seen if other.startswith(f"{name}."))
        if early and not {name, f"{name}+"} & seen:
            raise ValueError(f"Expected {name} before {early[0]}, which it would forget: a class has its own defaults.")
        seen.add(name)


class MemdmlCLI(LightningCLI):
    """Lightning's CLI with this package's defaults: glyphs, and a CSV log under ``runs/``.

    Args:
        **options: Of `LightningCLI`: with ``args=[...], run=False`` it builds what the arguments say, and runs nothing.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(
            MetricLearner,
            LightningDataModule,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # `--model.optimizer` it is, which knows the backbone's own rate
            parser_class=ArgumentParser,
            parser_kwargs={"description": DESCRIPTION, "version": lightning_memdml.__version__},
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            **options,
        )

    def setup_parser(self, add_subcommands: bool, *args: Any) -> None:
        """Describe the commands in one line each."""
        super().setup_parser(add_subcommands, *args)
        commands: Any = self.parser._subcommands_action
        if not add_subcommands:
            return
        for choice in commands._choices_actions:
            choice.help = COMMANDS[choice.dest]
        commands.choices["predict"].add_argument(
            "--file_format",
            type=FileFormat,
            default="parquet",
            help="Of the embeddings: one table, or an array beside a table (.csv) of paths, labels and classes.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; another class than that of the configuration starts from its own defaults."""
        given = sys.argv[1:] if args is None else args
        if isinstance(given, Sequence):
            _require_order(given)
        with mock.patch.object(_typehints, "discard_init_args_on_class_path_change", _forget_options_of_another_class):
            super().parse_arguments(parser, args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set the defaults."""
        groups: Any = parser.groups
        groups["data"].title = "Where images come from"
        parser.set_defaults(
            {
                "data": {"class_path": "lightning_memdml.data.GlyphDataModule"},
                "trainer.logger": {
                    "class_path": "lightning.pytorch.loggers.CSVLogger",
                    "init_args": {"save_dir": "runs", "name": "memdml"},
                },
            }
        )

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: Lightning would put that of the checkpoint over what the user asks for."""

    def before_instantiate_classes(self) -> None:
        """Ask for no first weights where a checkpoint holds the trained ones."""
        if self.subcommand not in ("validate", "test", "predict"):
            return
        if self._get(self.config, "ckpt_path") is not None:
            self._get(self.config, "model").weights = None
        else:
            rank_zero_warn("There is no --ckpt_path: the network is taken as it is before any training.")

    def before_fit(self) -> None:
        """Tell users of classes of their own what opens the checkpoint of this run."""
        if self._needs_trust():
            rank_zero_info(f"The checkpoints of this run open with `--trust` only: {', '.join(self._needs_trust())}.")

    def _needs_trust(self) -> list[str]:
        config = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        return find_refused(config.get("fit", config))

    def after_fit(self) -> None:
        """Save the trained state under a name that can be known beforehand."""
        if self.trainer.checkpoint_callback is None or self.config.fit.trainer.fast_dev_run:
            return
        folder = self.trainer.strategy.broadcast(run_folder(self.trainer))
        checkpoint = folder / "checkpoints" / "last.ckpt"
        self.trainer.save_checkpoint(checkpoint, weights_only=False)  # with the optimizer and the memory
        trust = " --trust" if self._needs_trust() else ""
        rank_zero_info(f"Trained. Next: memdml test --ckpt_path {checkpoint}{trust}")

    def after_predict(self) -> None:
        """Write the embeddings with paths, labels and classes: of all test images, or of queries and of the gallery."""
        loaders: Any = self.trainer.predict_loop.predictions
        if not loaders:
            return  # with `--return_predictions false`
        if isinstance(loaders[0], dict):
            loaders = [loaders]
        names = ["embeddings"] if len(loaders) == 1 else ["query_embeddings", "gallery_embeddings"]
        folder = self.trainer.strategy.broadcast(run_folder(self.trainer))
        rank = f"_rank{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
        for name, batches in zip(names, loaders, strict=True):
            arrays: Any = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
            images = getattr(self.datamodule, "gallery_set" if name.startswith("gallery") else "query_set", None)
            columns = columns_of(
                arrays["labels"], arrays.get("indices"), images, getattr(self.datamodule, "classes", None)
            )
            file_format = self.config.predict.file_format
            for file in write_embeddings(folder / f"{name}{rank}", arrays["embeddings"], columns, file_format):
                rank_zero_info(f"{len(arrays['labels'])} rows in {file}")


def _forget_options_of_another_class(parser: Any, previous: Any, value: Any) -> None:
    """Let a class that is put in the place of another not inherit the options of the other.

    jsonargparse keeps those that both have, defaults included: SGD for AdamW would decay weights by 0.01, a
    TripletLoss for a ContrastiveLoss would take its margin, and folders for glyphs would be read at 28 pixels.
    """
    if previous and "init_args" in previous and previous["class_path"] != value["class_path"]:
        previous["init_args"] = Namespace()


class SaveRunConfig(SaveConfigCallback):
    """Saves the configuration in the run's own folder, in its checkpoints, and in the log of W&B and the like."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml`` beside the run's checkpoints; on rank 0 only."""
        if not trainer.loggers:
            return  # without a log there is no folder of this run alone
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.config_filename).write_text(self._text())
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):  # whose folder has config.yaml
                logger.log_hyperparams(yaml.safe_load(self._text()))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let no file decide which files are removed."""
        _without_foreign_files(checkpoint, trainer.ckpt_path)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell a training that was interrupted how it goes on."""
        written = trainer.checkpoint_callback
        if isinstance(exception, KeyboardInterrupt) and isinstance(written, ModelCheckpoint):
            last = written.last_model_path or written.best_model_path
            rank_zero_info(
                f"Interrupted. {f'To go on: memdml fit --ckpt_path {last}' if last else 'Nothing is saved.'}"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint say how to build everything, wherever it is moved."""
        checkpoint[CONFIG_IN_CHECKPOINT] = self._text()

    def _text(self) -> str:
        return self.parser.dump(self.config, skip_unset=False)


def with_config_of_checkpoint(arguments: list[str]) -> list[str]:
    """Put the configuration of a checkpoint before the other arguments, if there is no other configuration.

    Raises:
        ValueError: If the checkpoint is not there, or cannot be read, or names what is not on the closed list.
    """
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("-c", "--config")
    options.add_argument("--ckpt_path")
    options.add_argument("--trust", action="store_true")
    given, _ = options.parse_known_args(arguments)
    arguments = [argument for argument in arguments if argument != "--trust"]
    if given.ckpt_path in (None, "", "null", *KEYWORDS) or Path(given.ckpt_path).is_dir():
        return arguments
    checkpoint = read_checkpoint(given.ckpt_path)
    if given.config is not None:
        return arguments
    config = config_of(checkpoint, given.ckpt_path, trust=given.trust, notice=True)
    if config is None or "data" not in config:
        return arguments
    return [arguments[0], "--config", yaml.safe_dump(config, sort_keys=False), *arguments[1:]]


def _without_foreign_files(checkpoint: dict[str, Any], ckpt_path: str | Path | None) -> None:
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


if __name__ == "__main__":
    main()
