"""Every argument of every exported class, with values of a wrong type: refused at once, by a message that names it.

Without such a check a wrong value fails in the middle of a training, by an error of another library, or never.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_memdml
from lightning_memdml import ContrastiveLoss, RetrievalDataModule, SmallConvNet, retrieval
from lightning_memdml.data.sampler import ClassBalancedSampler
from lightning_memdml.heads import GeneralizedMeanPool

ROOT = Path(lightning_memdml.__file__).parent
X, Y = torch.eye(4), torch.tensor([0, 0, 1, 1])
WRONG = [3, "a", None, 1.5, -1, math.nan, [], object()]

#: What a class needs. An exported class that is not here is made without arguments.
NEEDED: dict[str, dict[str, Any]] = {
    "Band": {"low": 0.1},
    "ClassBalancedSampler": {"labels": Y, "batch_size": 4, "images_per_class": 2},
    "FeatureDataModule": {"path": "a.npz"},
    "HuggingFaceDataModule": {"path": "a"},
    "HybridLoss": {"positive": ContrastiveLoss(), "negative": ContrastiveLoss()},
    "LinearRamp": {"start_step": 1, "stop_step": 3},
    "MetricLearner": {"backbone": SmallConvNet(4), "loss": ContrastiveLoss()},
    "MinedLoss": {"loss": lambda z, y, *others: z.sum(), "miner": lambda z, y, *others: y},
    "MomentumEncoder": {"encoder": nn.Linear(2, 2)},
    "Piecewise": {"similarities": [-1.0, 1.0], "weights": [0.0, 1.0]},
    "TableDataModule": {"path": "a.csv"},
    "WarmupCosine": {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)},
    **{name: {"size": 4} for name in ("EmbeddingMemory", "RingMemory", "ShardedMemory")},
    "map_points": {"embeddings": X},
    "nearest_neighbours": {"embeddings": X, "k": 1},
    "normalized_mutual_information": {"embeddings": X, "labels": Y},
    "rank_queries": {"embeddings": X, "labels": Y},
    "rank_reranked": {"embeddings": X, "labels": Y},
    "rerank": {"queries": X, "gallery": None},
    "retrieval_examples": {"embeddings": X, "labels": Y},
    "retrieval_scores": {"embeddings": X, "labels": Y},
}
NO_ARGUMENTS = {"against_memory", "PairLoss", "WeightFunction"}  # a function of tensors, and two abstract classes
FUNCTIONS = [name for name in NEEDED if callable(getattr(retrieval, name, None))]


def exported() -> list[Any]:
    names = re.findall(r" as (\w+)$", (ROOT / "__init__.pyi").read_text(), re.MULTILINE)
    found = [getattr(lightning_memdml, name) for name in names if name not in NO_ARGUMENTS]
    inner = [ClassBalancedSampler, GeneralizedMeanPool]
    return [*found, *inner, *(getattr(retrieval, name) for name in FUNCTIONS)]


def fits(value: Any, annotation: str) -> bool:
    """Whether a wrong value happens to be what an annotation allows, written anew from the text of the annotation."""
    kinds = [kind.strip() for kind in annotation.split("|")]
    by_kind: dict[str, Callable[[Any], bool]] = {
        "int": lambda one: type(one) is int,
        "float": lambda one: isinstance(one, int | float) and not math.isnan(one),
        "str": lambda one: isinstance(one, str),
        "None": lambda one: one is None,
    }
    lists = any(kind.startswith("Sequence[") for kind in kinds)
    return (lists and value == []) or any(kind in by_kind and by_kind[kind](value) for kind in kinds)


def arguments_of(made: Any) -> dict[str, str]:
    """Name of each argument -> its annotation, those of the base of a data module among them."""
    found: dict[str, str] = {}
    of_data = isinstance(made, type) and issubclass(made, RetrievalDataModule)
    for kind in (made, RetrievalDataModule) if of_data else (made,):
        for name, parameter in inspect.signature(kind).parameters.items():
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                found.setdefault(name, str(parameter.annotation))
    return {name: text for name, text in found.items() if "Tensor" not in text and "Progress" not in text}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("made", exported(), ids=lambda made: made.__name__)
def test_a_wrong_type_is_refused_by_a_message_that_names_the_argument(made: Any, tmp_path: Path) -> None:
    needed = dict(NEEDED.get(made.__name__, {}))
    names = arguments_of(made)
    if "root" in names and "path" not in needed:
        needed["root"] = str(tmp_path)
    made(**needed)  # a right one is accepted
    unnamed = []
    for name, annotation in names.items():
        for value in WRONG:
            if fits(value, annotation):
                continue
            try:
                made(**{**needed, name: value})
            except (TypeError, ValueError) as error:
                if str(error).startswith("Expected ") and (f"`{name}`" in str(error) or f"{name}=" in str(error)):
                    continue
                unnamed.append(f"{name}={value!r}: {type(error).__name__}: {error}")
            else:
                unnamed.append(f"{name}={value!r} is accepted")
    assert not unnamed, "\n".join(unnamed)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: lightning_memdml.FreezeBackbone(blocks=1.5),
            "Expected `blocks` to be a whole number or None but got 1.5. Pass one of these.",
        ),
        (
            lambda: lightning_memdml.MemoryReport(loss=3),
            "Expected `loss` to be a PairLoss or None but got 3. Pass one of these.",
        ),
        (
            lambda: lightning_memdml.WeightCurveLogger(loss=3),
            "Expected `loss` to be a PairLoss or None but got 3. Pass one of these.",
        ),
        (lambda: lightning_memdml.MomentumEncoder(3), "Expected `encoder` to be a Module but got 3. Pass one."),
        (
            lambda: lightning_memdml.MemoryCallback(encoder_batch_norm="batches"),
            "Expected `encoder_batch_norm` to be one of batch, running but got 'batches'. Pass one of these.",
        ),
        (
            lambda: lightning_memdml.MemoryCallback(encoder_ramp=5),
            "Expected `encoder_momentum`, as `encoder_ramp` is set, but got None. Pass 0.99, or leave `encoder_ramp` "
            "out.",
        ),
        (
            lambda: lightning_memdml.Piecewise([0.0, "a"], [0.0, 1.0]),
            "Expected `similarities` to be a list, each item a number but got [0.0, 'a']. Pass one.",
        ),
        (
            lambda: lightning_memdml.ContrastiveLoss(margin=math.nan),
            "Expected `margin` to be a finite number but got nan. Pass another number.",
        ),
        (
            lambda: lightning_memdml.MetricLearner(nn.Identity(), ContrastiveLoss(), num_features=-1),
            "Expected `num_features` of at least 1 but got -1. Pass 1 or more.",
        ),
    ],
)  # fmt: skip
def test_the_whole_message_of_a_wrong_type(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}$"):
        make()


def test_what_stands_for_a_type_is_accepted(tmp_path: Path) -> None:
    """Numbers of numpy, paths, 0 and 1 for False and True, whole numbers for numbers, and any sequence."""
    import numpy as np

    assert lightning_memdml.ContrastiveLoss(margin=np.float32(0.5)).margin == 0.5
    assert lightning_memdml.GalleryLogger(count=np.int64(3), dirpath=tmp_path).count == 3
    assert lightning_memdml.MemoryCallback(size=8, prefill=1).prefill
    assert lightning_memdml.RetrievalMetrics(k=range(1, 3)).k == (1, 2)
    assert lightning_memdml.FolderDataModule(tmp_path, mean=np.zeros(3), std=(1, 1, 1)).batch_size == 64
