"""Frozen blocks keep weights and statistics, for the whole training or until a step, on ranks and after a resume."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from support.children import run_ranks
from support.learners import trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_memdml import ContrastiveLoss, FreezeBackbone, MetricLearner, SmallConvNet
from lightning_memdml.lightning_cli import MemdmlCLI
from lightning_memdml.trust import allowed_config

pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode")
BLOCKS = {1: [0, 1], 2: [3, 4], 3: [6, 7], 4: [9, 10]}  # layers of SmallConvNet: a convolution and its norm


def learner(**options: Any) -> MetricLearner:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"optimizer": partial(torch.optim.AdamW, lr=0.01), "embedding_dim": 6, "k": (1,)}
    return MetricLearner(SmallConvNet(width=4, pool=1), ContrastiveLoss(0.2), **{**settings, **options})


def loader(count: int = 16) -> DataLoader:
    images = torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(images, torch.arange(count) % 3), batch_size=4)


class Changes(Callback):
    """Which layers of the backbone each step has changed: their weights or, of a norm, its statistics."""

    def __init__(self) -> None:
        self.steps: list[set[int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.before = {name: value.clone() for name, value in pl_module.model.backbone.state_dict().items()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        after = pl_module.model.backbone.state_dict()
        changed = (name for name, value in self.before.items() if not torch.equal(value, after[name]))
        self.steps.append({int(name.split(".")[1]) for name in changed})


def layers(*blocks: int) -> set[int]:
    return {layer for block in blocks for layer in BLOCKS[block]}


@pytest.mark.parametrize(
    ("blocks", "trained"),
    [(1, layers(2, 3, 4)), (3, layers(4)), (-1, layers(4)), (-2, layers(3, 4)), (4, set()), (None, set())],
)
def test_the_first_blocks_stay_as_they_are(blocks: int | None, trained: set[int]) -> None:
    model, changes = learner(), Changes()
    run = trainer(FreezeBackbone(blocks), changes, max_epochs=2)
    run.fit(model, loader(), loader())  # with validations between, which change the mode
    assert changes.steps == [trained] * 8
    held = {id(parameter) for group in run.optimizers[0].param_groups for parameter in group["params"]}
    names = {f"model.backbone.layers.{layer}" for layer in trained} | {"model.head"}
    expected = {id(p) for name, p in model.named_parameters() if name.rpartition(".")[0] in names}
    assert held == expected
    assert all(parameter.requires_grad for parameter in model.parameters()), "the module is left as it was"
    assert all(module.training for module in model.model.backbone.modules())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_blocks_are_thawed_at_their_step(accumulate: int) -> None:
    changes = Changes()
    run = trainer(FreezeBackbone(until_step=2), changes, max_epochs=2, accumulate_grad_batches=accumulate)
    run.fit(learner(freeze_batch_norm=False), loader())
    norms = {1, 4, 7, 10}
    expected = [set()] * 2 + [layers(1, 2, 3, 4)] * 6
    if accumulate == 2:  # batch norms count every batch, weights change with the second
        expected = [set()] * 4 + [norms, layers(1, 2, 3, 4)] * 2
    assert changes.steps == expected


def test_batch_norms_that_the_learner_freezes_stay_frozen_after_the_thaw() -> None:
    model = learner(freeze_batch_norm=True)
    trainer(FreezeBackbone(until_step=2), max_epochs=2).fit(model, loader())
    assert int(model.model.backbone.layers[1].num_batches_tracked) == 0
    assert not model.model.backbone.layers[1].training


@pytest.mark.parametrize("saved", [2, 4])
def test_a_run_resumed_before_or_after_the_thaw_equals_the_whole_one(saved: int, tmp_path: Path) -> None:
    def fit(steps: int, checkpoint: Path | None = None) -> dict[str, Tensor]:
        model, saver = learner(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=saved, save_top_k=-1)
        run = trainer(FreezeBackbone(2, until_step=3), saver, max_steps=steps, max_epochs=-1, enable_checkpointing=True)
        run.fit(model, loader(8), ckpt_path=checkpoint)
        assert run.global_step == steps
        return model.state_dict()

    whole = fit(7)
    fit(saved)
    resumed = fit(7, tmp_path / f"step={saved}.ckpt")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def fit_as_rank(until_step: int) -> tuple[list[set[int]], list[Tensor]]:
    changes, model = Changes(), learner(freeze_batch_norm=True)
    run = trainer(FreezeBackbone(until_step=until_step), changes, max_epochs=2, devices=2, strategy="ddp")
    run.fit(model, loader())
    return changes.steps, [parameter.detach() for parameter in model.parameters()]


def test_two_ranks_thaw_together() -> None:
    (steps, first), (_, second) = run_ranks(2, fit_as_rank, 2)
    assert steps == [set()] * 2 + [layers(1, 2, 3, 4)] * 2
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 0}, "Expected `blocks` other than 0 but got 0, which freezes nothing. Leave the callback out."),
        (
            {"until_step": 0},
            "Expected `until_step` of at least 1 but got 0. Pass None to freeze for the whole training.",
        ),
        (
            {"blocks": 5},
            "Expected `blocks` from -3 to 4, as model.backbone has 4 (layers.0, layers.3, layers.6, layers.9), but got "
            "5. Pass one of these.",
        ),
        (
            {"blocks": -4},
            "Expected `blocks` from -3 to 4, as model.backbone has 4 (layers.0, layers.3, layers.6, layers.9), but got "
            "-4. Pass one of these.",
        ),
        (
            {"backbone": "net"},
            "Expected `backbone` to be the path of a part of MetricLearner, such as model, loss, val_metrics, "
            "test_metrics, but got 'net'. Pass FreezeBackbone(backbone=...).",
        ),
    ],
)
def test_what_cannot_be_frozen_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as stopped:  # noqa: PT011  # the whole message is compared
        trainer(FreezeBackbone(**options)).fit(learner(), loader())
    assert str(stopped.value) == message


def test_what_is_frozen_is_printed(caplog: pytest.LogCaptureFixture) -> None:
    trainer(FreezeBackbone(-1, until_step=9)).fit(learner(), loader())
    assert (
        "Frozen: 3 of 4 blocks of model.backbone, layers.0 to layers.6, 0.00094 of 0.00153 million parameters, until "
        "optimiser step 9." in caplog.text
    )


def test_the_command_line_and_a_checkpoint_may_name_it() -> None:
    options = "--model.backbone SmallConvNet --model.loss ContrastiveLoss --trainer.callbacks+ FreezeBackbone"
    cli = MemdmlCLI(args=f"{options} --trainer.callbacks.blocks=-1".split(), run=False)
    assert [callback.blocks for callback in cli.trainer.callbacks if isinstance(callback, FreezeBackbone)] == [-1]
    config = {"trainer": {"callbacks": [{"class_path": "FreezeBackbone", "init_args": {"blocks": 2}}]}}
    (found,) = allowed_config(config, "a.ckpt")["trainer"]["callbacks"]
    assert found == {"class_path": "lightning_memdml.callbacks.FreezeBackbone", "init_args": {"blocks": 2}}
