"""Learning rates that warm up and fall as a cosine: their values, the length of a training, and an exact resume."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from support.learners import learner, loader, trainer

from lightning_memdml import LinearRamp, WarmupCosine
from lightning_memdml.lightning_cli import MemdmlCLI
from lightning_memdml.trust import allowed_config


class Rates(Callback):
    """The first group's rate in every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def formula(step: int, warmup: int, total: int, lowest: float) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(1, (step - warmup) / (total - warmup))))


@pytest.mark.parametrize(("warmup", "lowest"), [(0, 0.0), (3, 0.0), (3, 0.1)])
def test_rates_follow_the_formula_for_the_length_of_the_training(warmup: int, lowest: float) -> None:
    """Four batches an epoch, two optimiser steps with accumulation: 3 epochs are 6 steps."""
    for options, total in (
        ({"max_epochs": 3, "accumulate_grad_batches": 2}, 6),
        ({"max_steps": 7, "max_epochs": 9}, 7),
    ):
        record = Rates()
        schedule = partial(WarmupCosine, warmup_steps=warmup, min_factor=lowest)
        run = trainer(record, **options)
        run.fit(learner(lr_scheduler=schedule), loader())
        accumulate = options.get("accumulate_grad_batches", 1)
        expected = [0.1 * formula(batch // accumulate, warmup, total, lowest) for batch in range(len(record.rates))]
        assert record.rates == pytest.approx(expected)
        assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * lowest)


def test_steps_may_be_epochs() -> None:
    record = Rates()
    schedule = partial(WarmupCosine, warmup_steps=1)
    trainer(record, max_epochs=4).fit(learner(lr_scheduler=schedule, lr_scheduler_interval="epoch"), loader())
    assert record.rates == pytest.approx([0.1 * formula(batch // 4, 1, 4, 0) for batch in range(16)])


def test_every_group_keeps_its_own_share() -> None:
    model = learner(backbone_lr=0.01, lr_scheduler=partial(WarmupCosine, warmup_steps=1, total_steps=9))
    head, backbone = trainer_of(model).optimizers[0].param_groups
    assert head["lr"] == pytest.approx(10 * backbone["lr"])
    assert head["lr"] == pytest.approx(0.1 * formula(4, 1, 9, 0))


def trainer_of(model: Any) -> Any:
    run = trainer()
    run.fit(model, loader())
    return run


def test_a_resumed_run_has_the_rates_of_the_whole_one(tmp_path: Path) -> None:
    def fit(epochs: int, checkpoint: Path | None = None) -> tuple[list[float], Any]:
        record, model = Rates(), learner(lr_scheduler=partial(WarmupCosine, warmup_steps=3, total_steps=16))
        run = trainer(record, max_epochs=epochs)
        run.fit(model, loader(), ckpt_path=checkpoint)
        run.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return record.rates, model.state_dict()

    whole, weights = fit(4)
    fit(2)
    resumed, resumed_weights = fit(4, tmp_path / "2.ckpt")
    assert resumed == whole[8:]
    assert all(torch.equal(value, resumed_weights[key]) for key, value in weights.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": -1}, "Expected `warmup_steps` of at least 0 but got -1. Pass 0 for none."),
        ({"min_factor": 2}, r"Expected `min_factor` in \[0, 1\] but got 2. Pass 0 to end at a rate of 0."),
        (
            {"warmup_steps": 5, "total_steps": 5},
            "Expected `total_steps` above `warmup_steps`, 5, but got 5. Pass fewer warm-up steps.",
        ),
    ],
)
def test_what_is_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        WarmupCosine(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), **options)


@pytest.mark.parametrize("name", ["start", "stop"])
def test_a_ramp_of_what_is_not_a_number_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^Expected `{name}` to be a finite number but got nan"):
        LinearRamp(0, 3, **{name: math.nan})


def test_a_training_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"known length for WarmupCosine but it has no end\. Pass `Trainer\(max_steps"):
        trainer(max_epochs=-1).fit(learner(lr_scheduler=WarmupCosine), loader())
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = WarmupCosine(optimizer)
    optimizer.step()
    with pytest.raises(ValueError, match=r"^Expected `total_steps`, .* Pass `total_steps`\.$"):
        schedule.step()


def test_the_command_line_and_a_checkpoint_may_name_it() -> None:
    arguments = "--model.backbone SmallConvNet --model.loss ContrastiveLoss --model.lr_scheduler WarmupCosine"
    rates = "--model.layer_decay 0.5 --model.backbone_lr 0.01"
    options = f"{arguments} --model.lr_scheduler.warmup_steps 2 {rates}".split()
    cli = MemdmlCLI(args=options, run=False)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.6)
    assert cli.model.lr_scheduler(optimizer).get_last_lr() == pytest.approx([0.2])
    groups = [group["lr"] for group in cli.model.optimizer([torch.zeros(1, requires_grad=True)]).param_groups]
    assert groups == [0.001]
    assert (cli.model.layer_decay, cli.model.backbone_lr) == (0.5, 0.01)
    for path in ("WarmupCosine", "lightning_memdml.WarmupCosine", "lightning_memdml.schedules.WarmupCosine"):
        config = {"model": {"lr_scheduler": {"class_path": path, "init_args": {"warmup_steps": 2}}}}
        found = allowed_config(config, "a.ckpt")["model"]["lr_scheduler"]
        assert found == {"class_path": "lightning_memdml.schedules.WarmupCosine", "init_args": {"warmup_steps": 2}}
