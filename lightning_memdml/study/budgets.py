"""The budgets of the arms, which must be equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lightning_memdml.study.overrides import Config
from lightning_memdml.study.study_file import Study


class Budget(NamedTuple):
    """The budget of a run."""

    steps: int
    images_per_step: int


def budget_of(config: Config, arm: str) -> Budget:
    """Return the number of optimiser steps of a configuration, and the number of images per step.

    Raises:
        ValueError: If `trainer.max_steps` is not set, or several devices share a run.
    """
    trainer, data = config["trainer"], config["data"].get("init_args", {})
    if (trainer.get("max_steps") or -1) < 1 or trainer.get("max_epochs") not in (None, -1):
        raise ValueError(
            f"Arm {arm!r}: expected `trainer.max_steps` above 0 and `trainer.max_epochs: -1`, because arms are "
            f"compared at equal numbers of steps, but got max_steps={trainer.get('max_steps')} and "
            f"max_epochs={trainer.get('max_epochs')}. Set both in the base configuration."
        )
    if trainer.get("devices") not in ("auto", 1, "1", [0]) or trainer.get("num_nodes") not in (None, 1):
        raise ValueError(
            f"Arm {arm!r}: expected one device per run but got devices={trainer['devices']}. Leave `devices` out and "
            "pass `--processes N`, which distributes the runs over the available GPUs."
        )
    if "batch_size" not in data:
        raise ValueError(
            f"Arm {arm!r}: expected a data module with the option `batch_size`, by which budgets are compared, but it "
            "has none. Use a data module of this package, or add the option to yours."
        )
    return Budget(trainer["max_steps"], data["batch_size"] * (trainer.get("accumulate_grad_batches") or 1))


def check_budgets(study: Study, budgets: dict[tuple[str, str], Budget]) -> None:
    """Check that all arms of a data set have equal budgets.

    Args:
        study: The study, whose `equal` names what must be equal.
        budgets: (data set, arm) -> budget.

    Raises:
        ValueError: If they differ. The message lists them.
    """
    compared: dict[str, Callable[[Budget], int | Budget]] = {
        "steps and images per step": lambda budget: budget,
        "optimiser steps": lambda budget: budget.steps,
        "images in total": lambda budget: budget.steps * budget.images_per_step,
    }
    equal = {"budget": "steps and images per step", "steps": "optimiser steps", "images": "images in total"}[
        study.equal
    ]
    for data in study.data:
        found = {arm: budgets[data, arm] for arm in study.arms}
        if len({compared[equal](budget) for budget in found.values()}) > 1:
            raise ValueError(
                f"Expected equal {equal} in all arms (`equal: {study.equal}`) but on {data!r} got {_as_text(found)}. "
                "Change `max_steps` or the batch size. If the batch size is the question, write `equal: steps` or "
                "`equal: images` in the study file."
            )


def _as_text(budgets: dict[str, Budget]) -> str:
    return "; ".join(f"{arm} {steps:,} steps of {images:,} images" for arm, (steps, images) in budgets.items())
