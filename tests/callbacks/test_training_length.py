"""The length of a training follows from the number of images, and a length that is given comes first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_memdml import ContrastiveLoss, GlyphDataModule, MetricLearner
from lightning_memdml.backbones import SmallConvNet
from lightning_memdml.callbacks.channels_last import ChannelsLast
from lightning_memdml.callbacks.training_length import TrainingLength


def fit(cache: str, *callbacks: Any, **options: Any) -> tuple[Trainer, MetricLearner]:
    """Train on 10 classes of 20 images, in batches of 8."""
    torch.manual_seed(0)
    data = GlyphDataModule(
        num_classes=20, images_per_class=2, batch_size=8, val_fraction=0, cache_dir=cache, num_workers=0
    )
    schedule = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1)  # noqa: E731
    model = MetricLearner(SmallConvNet(width=4), ContrastiveLoss(), embedding_dim=8, lr_scheduler=schedule)
    options = {"max_epochs": -1, "logger": False, "enable_progress_bar": False, "accelerator": "cpu", **options}
    trainer = Trainer(
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **options,
    )
    trainer.fit(model, data)
    return trainer, model


@pytest.mark.parametrize(
    ("images", "steps"), [(100, 300), (2400, 600), (2401, 601), (1_000_000, 5000)], ids=["least", "8", "up", "most"]
)
def test_steps_are_passes_over_the_images_within_bounds(images: int, steps: int) -> None:
    assert TrainingLength().steps(images, images_per_step=32) == steps


def test_the_training_ends_after_the_passes_unless_its_length_is_given(glyph_cache: str) -> None:
    length = TrainingLength(passes=0.5, at_least=1, at_most=100)
    trainer, _ = fit(glyph_cache, length)
    images = len(trainer.datamodule.train_set)  # type: ignore[attr-defined]
    assert trainer.global_step == trainer.max_steps == -(-images // 16)
    assert trainer.estimated_stepping_batches == trainer.max_steps, "a scheduler can know it"
    trainer, _ = fit(glyph_cache, length, accumulate_grad_batches=2)
    assert trainer.global_step == -(-images // 32)
    trainer, _ = fit(glyph_cache, length, max_steps=3)
    assert trainer.global_step == 3
    trainer, _ = fit(glyph_cache, length, max_epochs=1)
    assert trainer.global_step == -(-images // 8)


def test_bounds_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected `passes` above 0 and 1 <= `at_least` <= `at_most`"):
        TrainingLength(at_least=10, at_most=5)


def test_channels_last_changes_the_layout_and_not_the_numbers(glyph_cache: str) -> None:
    losses = []
    for callbacks in ((), (ChannelsLast(),)):
        _, model = fit(glyph_cache, *callbacks, max_steps=2)
        kernels = [parameter for parameter in model.parameters() if parameter.ndim == 4 and parameter.shape[1] > 1]
        assert kernels
        assert all(k.is_contiguous(memory_format=torch.channels_last) == bool(callbacks) for k in kernels)
        losses.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
