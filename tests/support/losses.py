"""Losses and weight functions beside their formulas, found in files: what the contract tests iterate over.

Each file in `tests/losses/oracles` writes one loss a second time, from its formula, and lists instances:

    LOSSES = {"contrastive": (ContrastiveLoss(0.3), contrastive(0.3))}

A formula is a function of the similarities of one anchor's positives and of its negatives, two float64 tensors with a
gradient; it returns the anchor's value, and autograd gives the weights. A file may also list weight functions,
`WEIGHTS = {"linear": (Linear(2.0, 0.5), lambda s: max(0.0, 2 * s + 0.5))}`, with a formula over one number.

The folders in the environment variable `MEMDML_ORACLES` are read too: so a package of a user's own runs the contract
tests on its losses, `MEMDML_ORACLES=my_oracles pytest tests/losses/test_losses.py tests/losses/test_weights.py`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, get_origin

import torch
from torch import Tensor

from lightning_memdml import PairLoss, WeightFunction, losses

RowLoss = Callable[[Tensor, Tensor], Tensor]
ORACLES = Path(__file__).parents[1] / "losses" / "oracles"


@functools.cache
def read_oracles() -> tuple[ModuleType, ...]:
    """Import every file of oracles, those of a user's own last."""
    modules = []
    folders = [ORACLES, *map(Path, filter(None, os.environ.get("MEMDML_ORACLES", "").split(os.pathsep)))]
    for folder in folders:
        for file in sorted(folder.glob("*.py")):
            spec = importlib.util.spec_from_file_location(f"oracles_{file.stem}", file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            modules.append(module)
    return tuple(modules)


def loss_cases() -> dict[str, tuple[PairLoss, RowLoss]]:
    """Losses with their formulas, by name."""
    return {name: case for module in read_oracles() for name, case in getattr(module, "LOSSES", {}).items()}


def weight_cases() -> dict[str, tuple[WeightFunction, Callable[[float], float]]]:
    """Weight functions with their formulas, by name."""
    return {name: case for module in read_oracles() for name, case in getattr(module, "WEIGHTS", {}).items()}


def public_classes(kind: type) -> list[type]:
    """The public subclasses of a kind that the modules of `lightning_memdml.losses` define."""
    found = set()
    for module in pkgutil.iter_modules(losses.__path__):
        members = vars(importlib.import_module(f"{losses.__name__}.{module.name}")).values()
        found |= {
            member
            for member in members
            if isinstance(member, type) and not get_origin(member) and issubclass(member, kind)
        }
    return sorted((cls for cls in found - {kind} if not cls.__name__.startswith("_")), key=lambda cls: cls.__name__)


def without_case(classes: list[type], cases: dict[str, tuple[Any, Any]]) -> list[str]:
    """The names of the classes of which no case is an instance."""
    tested = {type(instance) for instance, _ in cases.values()}
    return [cls.__name__ for cls in classes if cls not in tested]


def missing_in_docstring(cls: type) -> list[str]:
    """What the docstring of a loss or a weight function lacks."""
    needed = ["$$", "Args:", "Example:", ">>> "]
    if issubclass(cls, PairLoss):
        needed += ["Denominator:", "References:"]
    return [part for part in needed if part not in (cls.__doc__ or "")]


# ---------------------------------------------------------------- from one anchor's formula to a batch
def value_of_rows(row_loss: RowLoss, similarity: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Mean over anchors of `row_loss(positives, negatives)`, differentiable."""
    rows = [row_loss(s[p], s[n]) for s, p, n in zip(similarity, positive, negative, strict=True)]
    return sum(rows, similarity.sum() * 0) / len(rows)


def masks(labels, ref_labels, indices=None, ref_indices=None, in_batch=False) -> tuple[Tensor, Tensor]:
    """Pairs as positive and negative masks, by two loops."""
    positive = torch.zeros(len(labels), len(ref_labels), dtype=torch.bool)
    negative = positive.clone()
    for i in range(len(labels)):
        for j in range(len(ref_labels)):
            if in_batch and i == j:
                continue
            if indices is not None and indices[i] >= 0 and indices[i] == ref_indices[j]:
                continue
            positive[i, j] = labels[i] == ref_labels[j]
            negative[i, j] = labels[i] != ref_labels[j]
    return positive, negative


def weights_of(row_loss: RowLoss, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Pair weights by autograd: `w+ = -dl_i/ds`, `w- = dl_i/ds`."""
    similarity = similarity.detach().clone().requires_grad_()
    (value_of_rows(row_loss, similarity, positive, negative) * len(similarity)).backward()
    gradient = similarity.grad
    assert gradient is not None
    assert not math.isnan(float(gradient.sum()))
    return -gradient * positive, gradient * negative
