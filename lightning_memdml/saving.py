"""A learner as a file: its weights, and how the learner and its images were made, as plain data."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
import yaml
from lightning import LightningModule
from lightning.pytorch.core.saving import load_hparams_from_yaml
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_memdml.atomic_write import atomic_write
from lightning_memdml.describing import NotDescribableError, describe, describe_all, describe_factory
from lightning_memdml.hf_networks import HF_PREFIX
from lightning_memdml.runs import CONFIG_IN_CHECKPOINT, HYPER_PARAMETERS, INSTANTIATOR, config_of
from lightning_memdml.timm_networks import describe_timm_network
from lightning_memdml.trust import allowed_config, build_arguments, read_yaml

NOT_SAVED = "memdml_not_saved"  # names of the arguments that a checkpoint could not hold
LOSSES = ("loss", "memory_loss")


class DataConfig(NamedTuple):
    """How the data module of a training was made, unchecked.

    Attributes:
        config: Class path and options.
        source: The file it is from, for errors.
        trust: Whether it may name what is not on the closed list.
    """

    config: dict[str, Any]
    source: str
    trust: bool


class LossNotSaved(nn.Module):
    """Stands for a loss that a checkpoint could not hold. Embedding images does not need it; training is refused.

    Args:
        name: The argument of the learner.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refuse."""
        raise ValueError(
            f"Expected a {self.name} to train with, but the checkpoint does not hold how it was made. Load it with "
            f"`{self.name}=`."
        )


# ------------------------------------------------------------------ writing


def save(learner: LightningModule, path: str | Path) -> Path:
    """Write the learner to a file that `MetricLearner.load` and all commands read.

    The file holds the weights, how the learner was made, and how its images are prepared: tensors and plain data, no
    code. The state of the optimizer and the memory is not in it; `trainer.save_checkpoint` saves them too.

    Args:
        learner: The learner.
        path: The file, ending in `.ckpt`.

    Returns:
        The path.

    Raises:
        ValueError: If the file does not hold how the backbone was made, and so could not be loaded.
        OSError: If the disk is full.
    """
    checkpoint: dict[str, Any] = {
        "pytorch-lightning_version": lightning.__version__,
        "epoch": 0,
        "global_step": 0,
        "state_dict": learner.state_dict(),
        HYPER_PARAMETERS: dict(learner.hparams),
    }
    learner.on_save_checkpoint(checkpoint)
    if "backbone" in checkpoint.get(NOT_SAVED, ()):
        reason = _describe_learner(learner)[1]["backbone"]
        raise ValueError(
            f"Expected a backbone that shows how it was made, but {reason}. Name it, such as backbone='resnet50', or "
            "keep each argument of its class as an attribute of the same name."
        )
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        torch.save(checkpoint, temporary)
    return path


def add_config(checkpoint: dict[str, Any], learner: Any) -> None:
    """Put how a learner and its images were made into a checkpoint, unless the command line has done it.

    Args:
        checkpoint: The checkpoint, changed in place.
        learner: A `MetricLearner`.
    """
    if CONFIG_IN_CHECKPOINT in checkpoint:
        return
    if INSTANTIATOR in learner.hparams:
        model = {name: value for name, value in learner.hparams.items() if not name.startswith("_")}
        missing: list[str] = []
    else:
        model, reasons = _describe_learner(learner)
        missing = sorted(reasons)
    config: dict[str, Any] = {"model": model}
    if learner.data_config is not None:
        config["data"] = learner.data_config.config
    checkpoint[CONFIG_IN_CHECKPOINT] = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    checkpoint[NOT_SAVED] = missing


def remember_data(learner: Any) -> None:
    """Keep how the data module of a training is made, and print what the checkpoints will not hold.

    Args:
        learner: A `MetricLearner` whose training begins.
    """
    learner.data_config = None
    if INSTANTIATOR in learner.hparams:
        return  # the command line puts its whole configuration into the checkpoint
    reasons = _describe_learner(learner)[1]
    data = getattr(learner.trainer, "datamodule", None)
    # Imported before, or `data` is none of the package: importing it here would need Pillow in every training.
    module = sys.modules.get("lightning_memdml.data.module")
    if module is not None and isinstance(data, module.RetrievalDataModule):
        try:
            learner.data_config = DataConfig(describe(data), "this training", trust=True)
        except NotDescribableError as error:
            reasons["data"] = str(error)
    if reasons and learner.trainer.checkpoint_callback is not None:
        missing = "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
        rank_zero_info(f"The checkpoints will not hold how these are made: {missing}. Pass them again to load one.")


def _describe_learner(learner: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the arguments of a learner as plain data, and for those that are not describable the reason."""
    weight = nn.Parameter(torch.zeros(1, 1))
    calls: dict[str, Any] = {}
    for name in signature(type(learner)).parameters:
        if name == "backbone":
            calls[name] = lambda: _describe_backbone(learner)
        elif name == "optimizer":
            calls[name] = lambda: describe_factory(learner.optimizer, [weight])
        elif name == "lr_scheduler" and learner.lr_scheduler is not None:
            calls[name] = lambda: describe_factory(learner.lr_scheduler, learner.optimizer([weight]))
        elif name != "weights":  # the checkpoint holds the trained ones
            calls[name] = partial(
                describe, learner.hparams[name] if name in learner.hparams else getattr(learner, name)
            )
    return describe_all(calls)


def _describe_backbone(learner: Any) -> Any:
    name = learner.hparams.get("backbone")
    if isinstance(name, str) and not name.startswith(HF_PREFIX):  # a name of the hub is of no use without the hub
        return name
    return describe_timm_network(learner.model.backbone) or describe(learner.model.backbone)


# ------------------------------------------------------------------ reading


def load(cls: Any, path: str | Path, *, trust: bool = False, **arguments: Any) -> Any:
    """Read a learner that `save`, a Trainer or the command line wrote, on the CPU and in evaluation mode.

    To train it further, call `learner.train()` first.

    Args:
        cls: The class of the learner.
        path: The file.
        trust: Let the file build and run whatever it names, such as classes of your own. By default it may name what is
            on the closed list of `lightning_memdml.trust_table`.
        **arguments: Arguments in the place of those in the file, such as `backbone=`.

    Returns:
        The learner.

    Raises:
        ValueError: If the file cannot be read, names what is not on the closed list, or does not hold how the backbone
            was made.
    """
    return cls.load_from_checkpoint(path, map_location="cpu", trust=trust, **arguments).eval()


def saved_arguments(
    kind: type,
    checkpoint: dict[str, Any],
    source: str,
    given: Mapping[str, Any],
    hparams_file: str | Path | None = None,
    *,
    trust: bool = False,
) -> dict[str, Any]:
    """Return the arguments of a learner in a checkpoint, built if the checkpoint holds how.

    Args:
        kind: The class of the learner.
        checkpoint: What `read_checkpoint` returns.
        source: The file, for errors.
        given: Arguments of the user, in the place of those in the checkpoint.
        hparams_file: YAML of the user, in the place of the hyperparameters of a checkpoint without a configuration.
        trust: Allow what is not on the closed list.

    Raises:
        ValueError: If the checkpoint names what is not on the closed list, a size in it is out of bounds, or it does
            not hold how the backbone was made.
    """
    missing = [name for name in checkpoint.get(NOT_SAVED) or () if name in signature(kind).parameters]
    without = [f"model.{name}" for name in given]
    if NOT_SAVED in checkpoint:
        without.append("data")  # of use later, and checked then
    config = config_of(checkpoint, source, trust=trust, without=without)
    if config is None or "model" not in config:
        return {**_plain_arguments(kind, checkpoint, source, hparams_file), **given}
    missing = [name for name in missing if name not in given]
    if "backbone" in missing:
        raise ValueError(
            f"Expected {source} to hold how its backbone was made but it does not: the network was given as an object "
            "that does not show it. Pass it again as `backbone=`."
        )
    if others := [name for name in missing if name not in LOSSES]:
        rank_zero_warn(f"{source} does not hold {', '.join(others)}: the default is used. Pass your own.")
    placeholders = {name: LossNotSaved(name) for name in missing if name in LOSSES}
    return build_arguments(kind, config["model"], {**placeholders, **given})


def without_placeholders(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a state dict without the parameters of losses that the checkpoint could not hold."""
    missing = tuple(f"{name}." for name, value in arguments.items() if isinstance(value, LossNotSaved))
    return {name: value for name, value in state.items() if not name.startswith(missing)} if missing else dict(state)


def saved_data(checkpoint: dict[str, Any], source: str, *, trust: bool = False) -> DataConfig | None:
    """Return how the data module was made according to a checkpoint, unchecked; None if it does not hold it."""
    text = checkpoint.get(CONFIG_IN_CHECKPOINT)
    config = read_yaml(text, source, trust=trust).get("data") if text is not None else None
    return DataConfig(config, source, trust) if isinstance(config, dict) else None


def _plain_arguments(
    kind: type, checkpoint: dict[str, Any], source: str, hparams_file: str | Path | None
) -> dict[str, Any]:
    """Return the plain values in a checkpoint of Lightning; nothing is built."""
    if hparams_file is not None:
        return load_hparams_from_yaml(hparams_file)
    saved = dict(checkpoint.get(HYPER_PARAMETERS) or {})
    allowed_config({"model": {name: value for name, value in saved.items() if isinstance(value, int | float)}}, source)
    names = signature(kind).parameters
    if (name := str(checkpoint.get("hparams_name"))) in names:
        return {name: saved}
    takes_all = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in names.values())
    return {name: value for name, value in saved.items() if takes_all or name in names}
