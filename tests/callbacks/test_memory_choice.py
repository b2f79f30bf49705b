"""The memory term is chosen by short trainings, on validation classes, and leaves the training as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from support.children import run_ranks
from torch import Tensor, nn

from lightning_memdml import ContrastiveLoss, DirectWeightLoss, GlyphDataModule, MemoryCallback, MetricLearner
from lightning_memdml.backbones import SmallConvNet
from lightning_memdml.callbacks import memory_choice
from lightning_memdml.callbacks.memory_choice import MemoryChoice

NO_MEMORY = "no memory"


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


class Apart(nn.Module):
    """Pushes images of one class apart: a memory with this loss can only harm."""

    def forward(self, z: Tensor, y: Tensor, ref_z: Tensor, ref_y: Tensor) -> Tensor:
        return 1000 * ((z @ ref_z.T) * (y[:, None] == ref_y)).mean()


def glyphs(cache: str, **options: Any) -> GlyphDataModule:
    options = {"num_classes": 40, "val_fraction": 0.3, "num_workers": 0, **options}
    return GlyphDataModule(batch_size=16, images_per_class=4, cache_dir=cache, **options)


def learner(memory_loss: Any = None, **options: Any) -> MetricLearner:
    seed_everything(0)
    loss = ContrastiveLoss(margin=0.7) if memory_loss is None else memory_loss
    return MetricLearner(
        SmallConvNet(width=4),
        ContrastiveLoss(),
        loss,
        embedding_dim=16,
        head_init="whitening",
        **options,
        optimizer=adam,
    )


def trainer(*callbacks: Any, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options = {"max_steps": 120, "enable_checkpointing": False, **quiet, **options}
    return Trainer(callbacks=list(callbacks), limit_val_batches=0, **options)


def weights(model: MetricLearner) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class Used(Callback):
    """Notes the memory term of the training."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.loss, self.weight = pl_module.memory_loss, pl_module.memory_weight


@pytest.mark.parametrize(
    ("best", "loss", "weight"),
    [
        ("weight 0.5", ContrastiveLoss, 0.5),
        ("weight 1", ContrastiveLoss, 1.0),
        ("each side sums to 1.5", DirectWeightLoss, 1.5),
    ],
)
def test_the_best_way_on_validation_classes_is_used_in_the_fit(
    best: str, loss: type, weight: float, glyph_cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever is the best: rounding decides between ways whose scores are nearly alike, so one gets a lead here."""
    model, choice, used = learner(memory_weight=0.5), MemoryChoice(steps=60, factors=[1, 2]), Used()
    own, measure, names = model.memory_loss, memory_choice._map_at_r, iter([term.name for term in choice.terms(model)])
    monkeypatch.setattr(memory_choice, "_map_at_r", lambda *args: measure(*args) + (next(names) == best))
    trainer(MemoryCallback(size=1.0), choice, used).fit(model, glyphs(glyph_cache))
    assert list(choice.scores) == [NO_MEMORY, "weight 0.5", "weight 1", "each side sums to 1.5"]
    assert len(set(choice.scores.values())) == 4, "the ways differ"
    assert choice.scores[choice.chosen] == max(choice.scores.values())
    assert choice.chosen == best
    assert isinstance(used.loss, loss)
    assert used.weight == weight
    assert model.memory_loss is own
    assert model.memory_weight == 0.5


def test_a_memory_that_harms_is_switched_off_and_the_training_is_that_without_it(glyph_cache: str) -> None:
    """The trials leave weights, batches and random numbers of the training alone."""
    choice, memory = MemoryChoice(steps=60, factors=[1]), MemoryCallback(size=1.0)
    chosen = learner(Apart())
    trainer(memory, choice).fit(chosen, glyphs(glyph_cache))
    assert choice.chosen == NO_MEMORY
    assert not memory.enabled
    assert len(memory.memory) == 0
    plain = learner(Apart(), memory_weight=0.0)
    trainer(MemoryCallback(size=1.0)).fit(plain, glyphs(glyph_cache))
    assert torch.equal(weights(chosen), weights(plain))


@pytest.mark.parametrize("memory_loss", [ContrastiveLoss(margin=0.7), Apart()], ids=["memory", "none"])
def test_a_resumed_run_keeps_the_choice(memory_loss: Any, glyph_cache: str, tmp_path: Path) -> None:
    """Without new trials, it equals the uninterrupted one bit for bit."""

    def callbacks() -> tuple[MemoryCallback, MemoryChoice]:
        return MemoryCallback(size=1.0), MemoryChoice(steps=60, factors=[1])

    whole, found = learner(memory_loss), callbacks()
    saver = ModelCheckpoint(tmp_path, "half", every_n_train_steps=6, save_top_k=-1)
    trainer(*found, saver, enable_checkpointing=True).fit(whole, glyphs(glyph_cache))
    resumed, again = learner(memory_loss), callbacks()
    again[1]._try = None  # type: ignore[assignment]  # nothing is tried
    trainer(*again).fit(resumed, glyphs(glyph_cache), ckpt_path=tmp_path / "half.ckpt")
    assert again[1].chosen == found[1].chosen
    assert again[1].scores == found[1].scores
    assert torch.equal(weights(resumed), weights(whole))


def choose_as_rank(cache: str) -> tuple[str | None, dict[str, float], Tensor]:
    model, choice = learner(), MemoryChoice(steps=12)
    trainer(MemoryCallback(size=1.0), choice, devices=2, strategy="ddp").fit(model, glyphs(cache))
    return choice.chosen, choice.scores, weights(model)


def test_two_ranks_choose_the_same(glyph_cache: str) -> None:
    glyphs(glyph_cache).prepare_data()
    first, second = run_ranks(2, choose_as_rank, glyph_cache)
    assert first[:2] == second[:2]
    assert first[0] == max(first[1], key=lambda name: first[1][name])
    assert torch.equal(first[2], second[2])


def test_without_validation_classes_the_learner_stays_as_it_is(glyph_cache: str) -> None:
    model, choice = learner(), MemoryChoice(steps=10)
    with pytest.warns(UserWarning, match=r"Expected validation classes.*val_fraction 0\.2"):
        trainer(MemoryCallback(size=1.0), choice, max_steps=20).fit(model, glyphs(glyph_cache, val_fraction=0))
    assert choice.chosen is None
    assert model.memory_weight == 1.0


def test_what_cannot_be_chosen_is_refused(glyph_cache: str) -> None:
    with pytest.raises(
        ValueError, match="Expected `steps` of 0 or at least 10, and `factors` and `side_sums` above 0, but got 5"
    ):
        MemoryChoice(steps=5)
    with pytest.raises(ValueError, match="Expected a MemoryCallback, about whose memory MemoryChoice decides"):
        trainer(MemoryChoice()).fit(learner(), glyphs(glyph_cache))
    with pytest.raises(ValueError, match="Expected a MetricLearner whose `memory_weight` is a number"):
        trainer(MemoryCallback(), MemoryChoice()).fit(learner(memory_weight=lambda step: 1.0), glyphs(glyph_cache))
