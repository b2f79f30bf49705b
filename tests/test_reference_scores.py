"""A training from pretrained weights is compared with the features that it started from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything

from lightning_memdml import ContrastiveLoss, GlyphDataModule, MetricLearner
from lightning_memdml.backbones import SmallConvNet
from lightning_memdml.cli import main
from lightning_memdml.reference_scores import (
    ReferenceScores,
    reference_table,
    score_after_training,
    score_before_training,
)
from lightning_memdml.retrieval import rank_queries

CPU = torch.device("cpu")


def glyphs(cache: str, **options: Any) -> GlyphDataModule:
    data = GlyphDataModule(num_classes=40, cache_dir=cache, num_workers=0, batch_size=8, images_per_class=2, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def learner() -> MetricLearner:
    seed_everything(0)
    return MetricLearner(SmallConvNet(width=4), ContrastiveLoss(), embedding_dim=8)


@pytest.mark.parametrize(("fraction", "classes"), [(0.25, "validation"), (0.0, "test")])
def test_scores_are_those_of_the_features(fraction: float, classes: str, glyph_cache: str) -> None:
    data, model = glyphs(glyph_cache, val_fraction=fraction), learner()
    state = torch.random.get_rng_state()
    reference = score_before_training(model.model, data, CPU)
    assert torch.equal(torch.random.get_rng_state(), state), "the training starts as without the comparison"
    assert reference.classes == classes
    images = data.val_set if fraction else data.query_set
    with torch.no_grad():
        features = model.eval().model.backbone(torch.stack([images[place][0] for place in range(len(images))]))
    ranks = rank_queries(torch.nn.functional.normalize(features, dim=1), images.labels)
    expected = ranks.scores(k=(1,))
    for score in ("recall_at_1", "map_at_r"):
        assert reference.rows["frozen features"][score] == pytest.approx(float(expected[score]), abs=1e-6)
    assert set(reference.rows) == {"frozen features", "frozen features, whitened"}
    with torch.no_grad():
        embeddings = model(torch.stack([images[place][0] for place in range(len(images))]))
    trained = rank_queries(embeddings, images.labels).scores(k=(1,))
    assert score_after_training(model.model, data, CPU)["map_at_r"] == pytest.approx(float(trained["map_at_r"]))


def test_a_training_that_does_not_beat_the_features_is_named_with_a_way_out() -> None:
    rows = {
        "frozen features": {"recall_at_1": 0.34, "map_at_r": 0.043},
        "frozen features, whitened": {"recall_at_1": 0.40, "map_at_r": 0.08},
    }
    better = reference_table(ReferenceScores("test", rows), {"recall_at_1": 0.45, "map_at_r": 0.09})
    assert "Warning" not in better
    worse = reference_table(ReferenceScores("test", rows), {"recall_at_1": 0.36, "map_at_r": 0.04}).splitlines()
    assert worse[-1] == (
        "Warning: the trained network does not beat frozen features (MAP@R), frozen features, whitened (Recall@1), "
        "frozen features, whitened (MAP@R). Start from the features with --model.head_init whitening, train for more "
        "steps, or lower --model.backbone_lr."
    )


@pytest.mark.parametrize("wanted", [True, False])
def test_fit_prints_the_table_at_the_end(
    wanted: bool, run_in: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(SmallConvNet(width=4).state_dict(), tmp_path / "weights.pth")
    with run_in(tmp_path):
        main([
            "fit", "--model.backbone", "SmallConvNet", "--model.backbone.width", "4", "--model.weights", "weights.pth",
            "--model.loss", "ContrastiveLoss", "--model.embedding_dim", "8", "--model.head_init", "whitening",
            "--data.num_classes", "40", "--data.val_fraction", "0.25", "--data.batch_size", "8",
            "--data.images_per_class", "2", "--data.num_workers", "0", "--trainer.max_steps", "2",
            "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
            "--reference", str(wanted).lower(),
        ])  # fmt: skip
    printed = capsys.readouterr().out
    row = r"\n{} +\d+\.\d +\d+\.\d\n"
    for name in ("frozen features", "frozen features, whitened", "trained"):
        assert bool(re.search(row.format(name), printed)) == wanted
