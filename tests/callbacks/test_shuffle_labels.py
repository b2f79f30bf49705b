"""`ShuffleLabels`: what a training sees of the labels, and what it does not touch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning import LightningDataModule, Trainer

from lightning_memdml import ContrastiveLoss, GlyphDataModule, MetricLearner, ShuffleLabels, SmallConvNet


def glyphs(glyph_cache: str) -> GlyphDataModule:
    return GlyphDataModule(num_classes=30, batch_size=8, images_per_class=2, val_fraction=0.2, cache_dir=glyph_cache)


def fit(data: LightningDataModule, *callbacks: Any, times: int = 1) -> None:
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    learner = MetricLearner(SmallConvNet(width=4), ContrastiveLoss(), embedding_dim=8)
    for _ in range(times):
        trainer = Trainer(max_steps=2, callbacks=[*callbacks], accelerator="cpu", **options)
        trainer.fit(learner, datamodule=data)


def test_training_labels_are_shuffled_once_and_no_others(glyph_cache: str) -> None:
    plain, data = glyphs(glyph_cache), glyphs(glyph_cache)
    plain.setup()
    callback = ShuffleLabels()
    fit(data, callback, times=2)
    true, shuffled = plain.train_set.labels, data.train_set.labels
    assert shuffled.sort().values.equal(true.sort().values), "every class keeps its number of images"
    agree = (shuffled == true).float().mean()
    assert agree < 0.3
    order = torch.randperm(len(true), generator=torch.Generator().manual_seed(0))
    assert shuffled.equal(true[order]), "once, however often it is fitted"
    assert [label for _, label, _ in (data.train_set[row] for row in range(5))] == shuffled[:5].tolist()
    for name in ("val_set", "query_set", "gallery_set"):
        assert getattr(data, name).labels.equal(getattr(plain, name).labels)


def test_another_seed_is_another_shuffle(glyph_cache: str) -> None:
    found = []
    for seed in (0, 1):
        data = glyphs(glyph_cache)
        fit(data, ShuffleLabels(seed))
        found.append(data.train_set.labels)
    assert not found[0].equal(found[1])


def test_data_without_labels_are_refused() -> None:
    class Unknown(LightningDataModule):
        train_set = (1, 2)

    with pytest.raises(TypeError, match="Expected a data module whose `train_set` has a tensor `labels`") as refused:
        fit(Unknown(), ShuffleLabels())
    assert str(refused.value).endswith("but got Unknown. Use a data module of this package, or add `train_set`.")
