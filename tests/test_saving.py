"""A learner of a program as a file: loaded again without its arguments, by Python and by the commands."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from support.learners import IMAGES, Flat, data, learner, loader, trainer
from torch import nn

from lightning_memdml import (
    ContrastiveLoss,
    GlyphDataModule,
    LinearRamp,
    MemoryCallback,
    MetricLearner,
    SmallConvNet,
    TripletLoss,
)
from lightning_memdml.cli import main
from lightning_memdml.saving import LossNotSaved
from lightning_memdml.trust import UntrustedFileError

RunIn = Callable[[Path], AbstractContextManager[None]]
QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
OPTIONS: dict[str, Any] = {
    "backbone": SmallConvNet(width=4),
    "loss": TripletLoss(margin=0.2),
    "memory_loss": ContrastiveLoss(margin=0.7),
    "memory_weight": LinearRamp(2, 6),
    "embedding_dim": 8,
    "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.25),
    "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 7),
    "k": (1, 5),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, run_in: RunIn) -> Iterator[Path]:
    """A folder with `trained.ckpt` of a Trainer and `saved.ckpt` of the same learner."""
    path = tmp_path_factory.mktemp("program")
    with run_in(path):
        glyphs = GlyphDataModule(num_classes=20, batch_size=8, images_per_class=2, num_workers=0)
        model = MetricLearner(**OPTIONS)
        run = Trainer(max_steps=2, callbacks=[MemoryCallback(size=32)], **QUIET)
        run.fit(model, glyphs)
        run.save_checkpoint("trained.ckpt")
        model.save("saved.ckpt")
        yield path


@pytest.mark.parametrize("name", ["trained.ckpt", "saved.ckpt"])
def test_everything_is_made_again(folder: Path, name: str) -> None:
    loaded = MetricLearner.load(folder / name)
    assert not loaded.training
    for part in ("loss", "memory_loss"):
        assert repr(getattr(loaded, part)) == repr(OPTIONS[part])
    assert vars(loaded.memory_weight) == vars(OPTIONS["memory_weight"])
    optimizer = loaded.optimizer([nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.SGD
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.25, 0)
    assert loaded.lr_scheduler(optimizer).step_size == 7
    assert list(loaded.k or ()) == [1, 5]
    assert loaded.model.backbone.width == 4
    state = torch.load(folder / name, weights_only=True)["state_dict"]
    assert all(value.equal(state[key]) for key, value in loaded.state_dict().items())


def test_a_learner_that_was_loaded_is_saved_as_well(folder: Path, tmp_path: Path) -> None:
    MetricLearner.load(folder / "saved.ckpt").save(tmp_path / "again.ckpt")
    texts = [
        torch.load(path, weights_only=True)["memdml_config"]
        for path in (folder / "saved.ckpt", tmp_path / "again.ckpt")
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["trained.ckpt", "saved.ckpt"])
def test_the_commands_use_it(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["index", "--ckpt_path", name, "--output", "index"])
    main(["export", "--ckpt_path", name, "--output", "exported", "--formats", "[torch]"])
    main(["test", "--ckpt_path", name, "--trainer.accelerator", "cpu", "--trainer.logger", "false"])
    assert "Recall@5" in capsys.readouterr().out
    assert (folder / "exported/model.pt2").is_file()


class Own(nn.Module):
    """A network of the user's, which keeps its argument."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = self.num_features = width
        self.layer = nn.Linear(4, width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.flatten(1))


def test_a_class_of_your_own_needs_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Own, "__module__", "support.learners")  # a module that can be imported again
    monkeypatch.setattr("support.learners.Own", Own, raising=False)
    model = learner(backbone=Own(width=3))
    model.save(tmp_path / "own.ckpt")
    with pytest.raises(
        UntrustedFileError, match=r"backbone of the closed list but got 'support\.learners\.Own'\. If you"
    ):
        MetricLearner.load(tmp_path / "own.ckpt")
    images = data()[:][0]
    expected = model.eval()(images)
    with pytest.warns(UserWarning, match=r"to build and run model\.backbone = 'support\.learners\.Own'"):
        assert MetricLearner.load(tmp_path / "own.ckpt", trust=True)(images).equal(expected)
    assert MetricLearner.load(tmp_path / "own.ckpt", backbone=Own(width=3))(images).equal(expected)


def test_a_network_that_does_not_show_how_it_was_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is printed before the training, and the checkpoint opens with `backbone=`."""

    def network() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))

    model = learner(backbone=network(), num_features=3)
    run = Trainer(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        run.fit(model, loader())
    assert (
        "The checkpoints will not hold how these are made: backbone (Sequential takes arguments without names). Pass "
        "them again to load one." in caplog.text
    )
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(
        ValueError, match=r"a\.ckpt to hold how its backbone was made but it does not.*as `backbone=`\.$"
    ):
        MetricLearner.load(tmp_path / "a.ckpt")
    loaded = MetricLearner.load(tmp_path / "a.ckpt", backbone=network())
    assert loaded(data()[:][0]).equal(model.eval()(data()[:][0]))
    with pytest.raises(ValueError, match=r"^Expected a backbone that shows how it was made, but Sequential takes"):
        model.save(tmp_path / "b.ckpt")


class WithProxies(nn.Module):
    """A loss with parameters, which does not keep its argument."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.proxies = nn.Parameter(torch.ones(classes, 6))

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (embeddings @ self.proxies.T).mean()


def test_what_only_training_needs_may_be_missing(tmp_path: Path) -> None:
    model = learner(loss=WithProxies(3), memory_weight=lambda step: 0.5)
    model.save(tmp_path / "a.ckpt")
    with pytest.warns(
        UserWarning, match=r"a\.ckpt does not hold memory_weight: the default is used\. Pass your own\.$"
    ):
        loaded = MetricLearner.load(tmp_path / "a.ckpt", backbone=Flat())
    assert isinstance(loaded.loss, LossNotSaved)
    assert loaded(data()[:][0]).equal(model.eval()(data()[:][0]))
    with pytest.raises(ValueError, match=r"^Expected a loss to train with, but.* Load it with `loss=`\.$"):
        trainer().fit(loaded.train(), loader())
    again = MetricLearner.load(
        tmp_path / "a.ckpt", backbone=Flat(), loss=WithProxies(3), memory_weight=lambda step: 0.5
    )
    assert again.loss.proxies.equal(model.loss.proxies)
    assert len(data()) == IMAGES


def test_a_checkpoint_without_a_data_module_asks_how_images_are_prepared(tmp_path: Path) -> None:
    MetricLearner(SmallConvNet(width=4), ContrastiveLoss(), embedding_dim=8).save(tmp_path / "a.ckpt")
    for command in ("index", "export"):
        with pytest.raises(SystemExit, match=r"to hold how its images are prepared but it does not: the learner was"):
            main([command, "--ckpt_path", str(tmp_path / "a.ckpt"), "--output", str(tmp_path / "out")])
    with pytest.raises(ValueError, match=r"^Expected a learner that was trained with a data module.*Pass `transform=`"):
        MetricLearner.load(tmp_path / "a.ckpt").embed(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))


def test_a_subclass_keeps_what_lightning_saves(tmp_path: Path) -> None:
    class Mine(MetricLearner):
        def __init__(self, width: int) -> None:
            super().__init__(SmallConvNet(width=width), ContrastiveLoss(), embedding_dim=8)

    model = Mine(width=4)
    model.save(tmp_path / "a.ckpt")
    assert Mine.load(tmp_path / "a.ckpt").model.head.weight.equal(model.model.head.weight)
