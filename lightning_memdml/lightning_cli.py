"""Lightning's command line with this package's defaults, and the commands that use it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_memdml.backbones import preprocessing_of
from lightning_memdml.callbacks.memory_setup import check_strategy
from lightning_memdml.checkpoint_config import config_source, with_config_of_checkpoint
from lightning_memdml.cli_messages import ArgumentParser, require_backbone
from lightning_memdml.command_options import FIT, PREDICT, REPORT, without_own_options
from lightning_memdml.commands import COMMANDS
from lightning_memdml.config_merging import merge, merge_arguments, require_order, write_yaml
from lightning_memdml.data import RetrievalDataModule
from lightning_memdml.data.paths import local_path, require_utf8
from lightning_memdml.deploy.damaged_images import SkipDamaged, offer_to_skip
from lightning_memdml.deploy.predictions import columns_of, write_embeddings
from lightning_memdml.describing import describe
from lightning_memdml.hf_networks import HuggingFaceModel
from lightning_memdml.latest_run import point_latest_at
from lightning_memdml.learner import MetricLearner
from lightning_memdml.reference_scores import (
    ReferenceScores,
    reference_table,
    score_after_training,
    score_before_training,
)
from lightning_memdml.run_display.logs import quiet_logs
from lightning_memdml.run_display.score_lines import ScoreLines
from lightning_memdml.run_display.step_bar import StepBar
from lightning_memdml.run_folders import (
    remove_unused,
    require_run_folder,
    use_local_folders,
    with_own_folder,
    without_foreign_files,
)
from lightning_memdml.run_report.recorder import RunRecorder
from lightning_memdml.run_report.report import write_report
from lightning_memdml.runs import CONFIG_IN_CHECKPOINT, run_folder
from lightning_memdml.study.study_command import study
from lightning_memdml.trust import find_refused
from lightning_memdml.trust_sizes import limited_tensors
from lightning_memdml.trust_table import DEFAULT_LOGGER
from lightning_memdml.verbosity import is_verbose

# Below every configuration. As defaults of the parser they would hand their options on to other classes.
DEFAULTS: dict[str, Any] = {
    "data": {"class_path": "lightning_memdml.data.GlyphDataModule"},
    "trainer": {"logger": DEFAULT_LOGGER},
    "model": {"optimizer": {"class_path": "torch.optim.AdamW"}},
}


def run_trainer(arguments: list[str]) -> None:
    """Run `memdml fit`, `validate`, `test` or `predict` with what `sys.argv` holds."""
    if not is_verbose():
        quiet_logs()
    source = config_source(sys.argv[1:])
    sys.argv[1:] = with_config_of_checkpoint(sys.argv[1:])
    made: list[Path] = []
    try:
        cli = MemdmlCLI(made, source)
    except BaseException:
        remove_unused(made)
        raise
    for logger in cli.trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()  # or the next run of this process would be logged into this one


def run_study(arguments: list[str]) -> None:
    """Run `memdml study` with what follows it on the command line."""
    study(arguments, MemdmlCLI)


class MemdmlCLI(LightningCLI):
    """Lightning's CLI with this package's defaults: glyphs, and a CSV log under `runs/`.

    Args:
        made: Gets the folders that are made for the run.
        source: The checkpoint whose configuration is built, unless the user trusts it.
        **options: Of `LightningCLI`: with `args=[...], run=False` it builds what the arguments name, and runs nothing.
    """

    def __init__(self, made: list[Path] | None = None, source: str | None = None, **options: Any) -> None:
        self._made = [] if made is None else made
        self._source = source
        self._lines, self._recorder = ScoreLines(), RunRecorder()
        self._ckpt_path: str | None = None
        self._reference: ReferenceScores | None = None
        super().__init__(
            MetricLearner,
            LightningDataModule,
            subclass_mode_data=True,
            seed_everything_default=0,  # a number, so that two runs of one command are the same
            auto_configure_optimizers=False,  # `--model.optimizer` instead, with the rates of the parts
            parser_class=ArgumentParser,
            parser_kwargs={
                name: {
                    "description": f"{COMMANDS[name].help} `memdml configs` lists what --config takes by name.",
                    "own_options": own_options,
                }
                for name, own_options in {"fit": FIT, "validate": {}, "test": REPORT, "predict": PREDICT}.items()
            },
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            **options,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give the data a title, and let `DEFAULTS` decide about the optimiser."""
        groups: Any = parser.groups
        groups["data"].title = "Where images come from"
        parser.set_defaults({"model.optimizer": None})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Merge configurations and class options, and parse the result."""
        if isinstance(args, dict):
            args = merge(DEFAULTS, args)
        else:
            given = list(sys.argv[1:] if args is None else args)
            require_order(given)
            start = 0 if args is not None else min(1, len(given))
            if not {"-h", "--help"} & set(given):
                args = [*given[:start], *merge_arguments(given[start:], DEFAULTS)]
        self.config = parser.parse_args(args) if isinstance(args, list | None) else parser.parse_object(args)
        # Lightning would put the hyperparameters in a checkpoint over the user's options, unchecked.
        if "subcommand" in self.config:
            section = self._section()
            self._ckpt_path, section["ckpt_path"] = section.get("ckpt_path"), None

    def before_instantiate_classes(self) -> None:
        """Prepare what is built: images as the backbone needs them, folders of this machine, weights of a checkpoint.

        Raises:
            ValueError: If a folder for output is a URL of another machine.
        """
        require_backbone(self._section().model.backbone)
        _take_over_preprocessing(self._section())
        if self.subcommand is None:
            return
        section = self._section()
        use_local_folders(section.trainer)
        section["ckpt_path"] = self._ckpt_path
        if section.get("weights_only") is None:
            section["weights_only"] = True
        if self.subcommand == "fit":
            return
        if self._ckpt_path is not None:
            section.model.weights = None
        else:
            rank_zero_warn("There is no --ckpt_path: the network is taken as it is before any training.")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer; that of a command prints scores, and without `--verbose` no table of modules."""
        if self.subcommand is not None:
            options = self.config_init[self.subcommand].trainer
            given = options.callbacks or []
            callbacks = [*(given if isinstance(given, list) else [given]), self._lines]
            callbacks += [self._recorder] if self._wants_report() else []
            callbacks += [SkipDamaged()] if self._section().get("skip_damaged") else []
            is_own_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
            if options.enable_progress_bar is not False and not is_own_bar:
                callbacks.append(StepBar())
            kwargs = {"callbacks": callbacks, **kwargs}
            if options.enable_model_summary is None and not is_verbose():
                kwargs["enable_model_summary"] = False
        return super().instantiate_trainer(**kwargs)

    def _wants_report(self) -> bool:
        section = self._section()
        return bool(section.get("report")) and not section.trainer.fast_dev_run and bool(section.trainer.logger)

    def _write_report(self, reference: dict[str, dict[str, float]] | None = None) -> None:
        """Write the report of a training or test into the folder of the run."""
        if self._wants_report() and self.trainer.is_global_zero:
            text = write_yaml(yaml.safe_load(self.parser.dump(self.config, skip_unset=False))[self.subcommand])
            path = run_folder(self.trainer) / "report.html"
            write_report(path, self._recorder, self.trainer, self.model, self.datamodule, text, reference)

    def after_test(self) -> None:
        """Write the report of the test."""
        self._write_report()

    def validate(self, **options: Any) -> None:
        """Run `Trainer.validate`; `ScoreLines` prints the table."""
        self.trainer.validate(**{**options, "verbose": False})

    def test(self, **options: Any) -> None:
        """Run `Trainer.test`; `ScoreLines` prints the table."""
        self.trainer.test(**{**options, "verbose": False})

    def predict(self, **options: Any) -> None:
        """Run `Trainer.predict`; the error of a damaged image names the option that leaves it out."""
        with offer_to_skip("embed"):
            self.trainer.predict(**options)

    def instantiate_classes(self) -> None:
        """Build the classes; those that a checkpoint names with a limit on their tensors."""
        with limited_tensors(str(self._source), trust=self._source is None):
            super().instantiate_classes()

    def after_instantiate_classes(self) -> None:
        """Make the log folder of this run alone.

        A folder that holds other files is refused: Lightning's logs remove and overwrite some. Runs that start at
        the same time without a version in their configuration get folders of their own.
        """
        if self.subcommand is None or not self.trainer.is_global_zero:  # other ranks find what the first has begun
            return
        options = self._section().trainer.logger
        options = options if isinstance(options, list) else [options]
        if len(options) == len(self.trainer.loggers):
            self.trainer.loggers = [
                with_own_folder(logger, vars(given.init_args) if hasattr(given, "init_args") else {}, self._made)
                for logger, given in zip(self.trainer.loggers, options, strict=True)
            ]
        for logger in self.trainer.loggers:
            if (place := getattr(logger, "log_dir", None)) is not None:  # of a log in files: CSV, TensorBoard
                require_run_folder(Path(place))

    def _section(self) -> Any:
        """Return the part of the configuration that belongs to the command."""
        return self.config.get(str(self.config.get("subcommand")), self.config)

    def before_fit(self) -> None:
        """Print whether the checkpoints of this run will need `--trust`, and score the network it starts from.

        Raises:
            ValueError: If the strategy would lose what is saved at the end.
        """
        check_strategy(self.trainer)
        if refused := self._needs_trust():
            rank_zero_info(f"The checkpoints of this run open with `--trust` only: {', '.join(refused)}.")
        section, data = self.config.fit, self.datamodule
        starts_pretrained = section.model.get("weights") is not None and section.get("ckpt_path") is None
        wanted = section.reference and not section.trainer.fast_dev_run and starts_pretrained
        if wanted and isinstance(data, RetrievalDataModule) and self.trainer.is_global_zero:
            data.prepare_data()
            data.setup("fit")
            device = self.trainer.strategy.root_device
            cache = None if section.reference_cache is None else local_path(section.reference_cache, "reference_cache")
            self._reference = score_before_training(self.model.model, data, device, cache)
            self.model.head_statistics = self._reference.statistics

    def _needs_trust(self) -> list[str]:
        config = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        return find_refused(_self_contained(without_own_options(config.get("fit", config)), self.model))

    def after_fit(self) -> None:
        """Compare with the network before the training, and save the trained state as `last.ckpt`.

        Raises:
            ValueError: If the checkpoint that was resumed was already at the last step.
        """
        ckpt_path, step = self.config.fit.get("ckpt_path"), self.trainer.global_step
        if ckpt_path is not None and not self._lines.has_trained:
            raise ValueError(
                f"Expected a checkpoint of an unfinished run but {ckpt_path} is at step {step:,}, where this run ends. "
                f"To go on, pass a larger --trainer.max_steps, such as {2 * step}, or a larger --trainer.max_epochs."
            )
        if self._reference is not None:
            trained = score_after_training(self.model.model, self.datamodule, self.trainer.strategy.root_device)
            print(reference_table(self._reference, trained))
        if self.trainer.checkpoint_callback is None or self.config.fit.trainer.fast_dev_run:
            return
        folder = self.trainer.strategy.broadcast(run_folder(self.trainer))
        checkpoint = folder / "checkpoints" / "last.ckpt"
        self.trainer.save_checkpoint(checkpoint, weights_only=False)  # with the optimizer and the memory
        if self._recorder.evaluation is None and self.trainer.limit_val_batches and self._has_validation_classes():
            self.trainer.validate(self.model, self.datamodule, verbose=False)  # the run ended before the first one
        self._write_report(None if self._reference is None else self._reference.rows)
        trust = " --trust" if self._needs_trust() else ""
        done = (
            f"Trained {step:,} step{'' if step == 1 else 's'}."
            if self._lines.has_trained
            else "Saved without training."
        )
        rank_zero_info(f"{done} Next: memdml test --ckpt_path {checkpoint}{trust}")

    def _has_validation_classes(self) -> bool:
        return len(getattr(self.datamodule, "val_set", ())) > 0

    def before_predict(self) -> None:
        """Pass `--flip` on, and refuse names that the table of embeddings cannot hold, before images are embedded."""
        data, self.model.predict_flip = self.datamodule, self.config.predict.flip
        if isinstance(data, RetrievalDataModule) and self.trainer.is_global_zero:
            data.prepare_data()
            data.setup("predict")
            names = [name for name in data.classes if isinstance(name, str)]
            require_utf8([*data.query_set.paths, *data.gallery_set.paths, *names])

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
                rank_zero_info(f"{len(arrays['labels']):,} rows in {file}")


class SaveRunConfig(SaveConfigCallback):
    """Saves the configuration in the run's own folder, in its checkpoints, and in the log of W&B and the like."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write `config.yaml` beside the run's checkpoints; on rank 0 only."""
        if not trainer.loggers:
            return  # without a log there is no folder of this run alone
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.config_filename).write_text(write_yaml(self._config()))
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):  # whose folder has config.yaml
                logger.log_hyperparams(self._config())

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Do not let a file decide which files are removed."""
        without_foreign_files(checkpoint, trainer.ckpt_path)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Print how to resume after an interruption."""
        written = trainer.checkpoint_callback
        if isinstance(exception, KeyboardInterrupt) and isinstance(written, ModelCheckpoint):
            last = written.last_model_path or written.best_model_path
            rank_zero_info(
                f"Interrupted. {f'To go on: memdml fit --ckpt_path {last}' if last else 'Nothing is saved.'}"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the configuration into the checkpoint, so that it can be moved, and let `latest` lead to the run."""
        checkpoint[CONFIG_IN_CHECKPOINT] = write_yaml(_self_contained(self._config(), pl_module))
        if trainer.is_global_zero and trainer.loggers and trainer.loggers[0].save_dir is not None:
            point_latest_at(run_folder(trainer), Path(trainer.loggers[0].save_dir))

    def _config(self) -> dict[str, Any]:
        return without_own_options(yaml.safe_load(self.parser.dump(self.config, skip_unset=False)))


def _self_contained(config: dict[str, Any], model: Any) -> dict[str, Any]:
    """Replace the name of a network of Hugging Face by its architecture: a checkpoint then needs no hub."""
    network = model.model.backbone
    if isinstance(network, HuggingFaceModel):
        config["model"]["backbone"] = describe(network)
    return config


def _take_over_preprocessing(section: Any) -> None:
    """Set options of the images that the user left out to the preprocessing of a `timm:` or `hf:` backbone.

    It becomes part of the configuration, and so of the checkpoint and of all that is made from it.
    """
    options = section.data.get("init_args")
    if options is None or not isinstance(section.model.backbone, str):
        return
    wanted = preprocessing_of(section.model.backbone)
    taken = {name: value for name, value in wanted.items() if name in options and options[name] is None}
    for name, value in taken.items():
        options[name] = value
    if taken:
        shown = ", ".join(f"{name} {value}" for name, value in taken.items())
        rank_zero_info(f"Images are prepared for {section.model.backbone}: {shown}.")
