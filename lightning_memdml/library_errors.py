"""Sentences for errors that Lightning, torch and other libraries raise after a wrong option."""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches

ACCELERATORS = ("cpu", "gpu", "cuda", "mps", "tpu", "auto")
STRATEGIES = ("auto", "ddp", "fsdp", "deepspeed")
SCORES = "val/recall_at_1, val/recall_at_10, val/map_at_r, val/r_precision"


def sentence_for(error: BaseException) -> str | None:
    """Return what was expected, what came and what to do; None for an error that is not known.

    Example:
        >>> sentence_for(ValueError("Invalid learning rate: -1.0"))
        'Expected a learning rate of at least 0 but got -1.0. Pass --model.optimizer.lr 0.001, for example.'
        >>> sentence_for(ValueError("anything else")) is None
        True
    """
    text = str(error)
    for pattern, sentence in SENTENCES:
        if (found := re.search(pattern, text, re.DOTALL)) is not None:
            return sentence(found)
    return None


def _did_you_mean(name: str, names: tuple[str, ...]) -> str:
    close = get_close_matches(name, names, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _accelerator(found: re.Match[str]) -> str:
    name = found[1]
    return (
        f"Expected --trainer.accelerator to be one of {', '.join(ACCELERATORS)} but got {name!r}."
        f"{_did_you_mean(name, ACCELERATORS)}"
    )


def _strategy(found: re.Match[str]) -> str:
    name = found[1]
    return (
        f"Expected --trainer.strategy to be one of {', '.join(STRATEGIES)} but got {name!r}."
        f"{_did_you_mean(name, STRATEGIES)}"
    )


def _monitor(found: re.Match[str]) -> str:
    known = tuple(re.findall(r"[\w/]+/[\w/]+", found[2]))
    scores = tuple(name for name in known if name.startswith("val/") and not name.endswith(("/queries", "/excluded")))
    scores = scores or tuple(SCORES.split(", "))
    return (
        f"Expected a metric of the run as `monitor` but got {found[1]!r}.{_did_you_mean(found[1], scores)} Validation "
        f"gives {', '.join(scores)}."
    )


def _other_shapes(found: re.Match[str]) -> str:
    name, saved, made = found.groups()
    return (
        f"Expected a checkpoint of the same network but {name} is ({saved}) in the checkpoint and ({made}) here. Leave "
        "out the option that changes it, such as --model.embedding_dim or --model.backbone."
    )


def _missing_library(found: re.Match[str]) -> str:
    owner, library = found[1].rpartition(".")[2], found[2].removesuffix("X")  # either tensorboard or tensorboardX
    return (
        f"Expected {library} for {owner} but it is not installed. `pip install {library}`, or take another class for "
        "this option."
    )


SENTENCES: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (
        r"No supported gpu backend found|CUDAAccelerator` can not run on your system|requested gpu:|Torch not compiled",
        lambda _: "Expected a GPU for --trainer.accelerator but torch finds none. Pass --trainer.accelerator cpu.",
    ),
    (r"invalid accelerator name: `accelerator='([^']*)'`", _accelerator),
    (r"invalid strategy name: `strategy='([^']*)'`", _strategy),
    (
        r"Trainer\(devices='?([^)']*)'?\)` value is not a valid input",
        lambda found: (
            f"Expected --trainer.devices to be a number of at least 1, or auto, but got {found[1]!r}. Pass 1."
        ),
    ),
    (
        r"`(max_steps|max_epochs)` must be a non-negative integer or -1.*?You passed in (\S+?)\.?$",
        lambda found: (
            f"Expected --trainer.{found[1]} of at least 0, or -1 for no limit, but got {found[2]}. Pass 1000."
        ),
    ),
    (
        r"`val_check_interval` should be an integer or .* when `check_val_every_n_epoch=None`",
        lambda _: (
            "Expected --trainer.val_check_interval to be a number of steps but got a share of an epoch, which needs "
            "--trainer.check_val_every_n_epoch. Pass steps, such as 500, or --trainer.check_val_every_n_epoch 1."
        ),
    ),
    (r"ReduceLROnPlateau conditioned on metric (\S+) which is not available.*?are: (.*)", _monitor),
    (r"Early stopping conditioned on metric `([^`]*)` which is not available.*?following: (.*)", _monitor),
    (r"ModelCheckpoint\(monitor='([^']*)'\)` could not find the monitored key.*?: (.*?)\. HINT", _monitor),
    (
        r"`val_check_interval` \((\d+)\) must be less than or equal to the number of the training batches \((\d+)\)",
        lambda found: (
            f"Expected --trainer.val_check_interval of at most the {found[2]} batches of an epoch but got {found[1]}. "
            "Pass --trainer.check_val_every_n_epoch null, which counts steps across epochs."
        ),
    ),
    (
        r"size mismatch for ([\w.]+): .*?shape torch\.Size\(\[([^]]*)\]\) .*?is torch\.Size\(\[([^]]*)\]\)",
        _other_shapes,
    ),
    (
        r"Invalid learning rate: (\S+)",
        lambda found: (
            f"Expected a learning rate of at least 0 but got {found[1]}. Pass --model.optimizer.lr 0.001, for example."
        ),
    ),
    (r"class_path '([\w.]+)'.*?Requirement '([\w-]+)[^']*' not met", _missing_library),
    (
        r"(\w+)\.forward\(\) (?:missing|takes) \d+",
        lambda found: (
            f"Expected a loss of embeddings and labels but {found[1]} takes other arguments. Pass --model.loss "
            "ContrastiveLoss, or another loss of this package or of pytorch-metric-learning."
        ),
    ),
)
