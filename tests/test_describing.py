"""An object is described by the arguments it was made with, and made again from the description."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from support.learners import Flat
from torch import nn
from torchvision.transforms import v2

import lightning_memdml
from lightning_memdml import LinearRamp, MetricLearner, PairLoss, RetrievalDataModule, SmallConvNet, WeightFunction
from lightning_memdml.data.transforms import EvaluationTransform, RandomAffine, TrainingTransform
from lightning_memdml.describing import NotDescribableError, describe, describe_factory, parameters_of
from lightning_memdml.schedules import Schedule
from lightning_memdml.trust import build, find_refused

NUMBERS = {int: 3, float: 0.25, bool: True}
BASES = (PairLoss, WeightFunction, RetrievalDataModule)
EXPORTED = [
    made
    for name in lightning_memdml.__all__
    if inspect.isclass(made := getattr(lightning_memdml, name)) and issubclass(made, BASES) and made not in BASES
]


@pytest.mark.parametrize("kind", EXPORTED, ids=lambda kind: kind.__name__)
def test_every_loss_weight_function_and_data_module_keeps_its_arguments(kind: type) -> None:
    """Otherwise a checkpoint of a program could not hold it: `self.name = name` is all that is needed."""
    needed = [name for name in ("path", "root") if name in inspect.signature(kind).parameters][:1]
    arguments: dict[str, Any] = dict.fromkeys(needed, "a.npz")
    if kind.__name__ == "HybridLoss":
        arguments = dict.fromkeys(("positive", "negative"), lightning_memdml.ContrastiveLoss(0.25))
    if kind.__name__ == "Piecewise":
        arguments = {"similarities": [0.0, 1.0], "weights": [0.0, 2.0]}
    made = kind(**arguments)
    assert [parameter.name for parameter in parameters_of(kind) if not hasattr(made, parameter.name)] == []
    described = describe(made)
    assert find_refused({"data": described} if isinstance(made, RetrievalDataModule) else {}) == []
    base = next(base for base in BASES if issubclass(kind, base))
    again = build(LightningDataModule if base is RetrievalDataModule else base, described)
    assert describe(again) == described


@pytest.mark.parametrize(
    ("base", "made"),
    [
        (nn.Module, SmallConvNet(in_channels=3, width=4, pool=2)),
        (nn.Module, nn.Identity()),
        (PairLoss, lightning_memdml.MultiSimilarityLoss(alpha=3.0, epsilon=None)),
        (PairLoss, lightning_memdml.DirectWeightLoss(negative=lightning_memdml.Threshold(0.6))),
        (Schedule, LinearRamp(2, 6, start=0.5)),
        (nn.Module, TrainingTransform(97, min_scale=0.4, crop_pct=1.0)),
        (nn.Module, EvaluationTransform(97, mean=[0.5] * 3, interpolation="bicubic")),
        (nn.Module, RandomAffine(rotation=0.1)),
        (nn.Module, v2.Compose([v2.Resize(40), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])),
        (Flat, Flat()),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, type) else "",
)
def test_what_is_made_again_is_equal(base: Any, made: Any) -> None:
    described = describe(made)
    again = build(base, described)
    assert type(again) is type(made)
    assert describe(again) == described
    if isinstance(made, nn.Module):
        assert repr(again) == repr(made)


def test_only_what_differs_from_the_default_is_written() -> None:
    assert describe(SmallConvNet(width=4)) == {
        "class_path": "lightning_memdml.SmallConvNet",
        "init_args": {"width": 4},
    }
    assert describe(Path("a")) == str(Path("a").absolute())


@pytest.mark.parametrize(
    "factory",
    [
        lambda parameters: torch.optim.AdamW(parameters, lr=0.5, weight_decay=0.25),
        partial(torch.optim.AdamW, lr=0.5, weight_decay=0.25),
    ],
)
def test_the_optimizer_of_a_function_is_described(factory: Any) -> None:
    described = describe_factory(factory, [nn.Parameter(torch.zeros(1, 1))])
    assert described == {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.5, "weight_decay": 0.25}}


def test_a_scheduler_is_described() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    described = describe_factory(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 7), optimizer)
    assert described == {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 7}}


class Forgetful(nn.Module):
    """Does not keep its argument."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)


def test_what_cannot_be_described() -> None:
    class Inside(nn.Module):
        pass

    for made, reason in (
        (Forgetful(), "^Forgetful has no attribute `width`, its argument$"),
        (Inside(), "is defined in a script or inside a function; move it to the top of a module$"),
        (nn.Sequential(), "^Sequential takes arguments without names$"),
        (lambda images: images, "^<lambda> is a function or class, not an object$"),
        (v2.Compose([lambda image: image]), "^<lambda> is a function"),
        ({1: 2}, "^a mapping has keys that are no texts$"),
    ):
        with pytest.raises(NotDescribableError, match=reason):
            describe(made)
    with pytest.raises(NotDescribableError, match=r"^the function cannot be called here \(nothing to see\)$"):
        describe_factory(lambda parameters: (_ for _ in ()).throw(ValueError("nothing to see")), [])


def test_the_learner_keeps_every_argument_or_its_description() -> None:
    """A new argument of the learner has to be a plain value, or an attribute of the same name."""
    learner = MetricLearner(Flat(), lightning_memdml.ContrastiveLoss())
    kept = {*learner.hparams, "backbone", "weights"}
    names = inspect.signature(MetricLearner).parameters
    assert [name for name in names if name not in kept and not hasattr(learner, name)] == []
