"""A training from pretrained weights is compared with the features that it started from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from PIL import Image

from lightning_memdml import ContrastiveLoss, FolderDataModule, GlyphDataModule, MetricLearner
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
    perfect = {"frozen features": {"recall_at_1": 1.0, "map_at_r": 0.9}}
    assert "Warning" not in reference_table(ReferenceScores("test", perfect), {"recall_at_1": 1.0, "map_at_r": 0.95})
    worse = reference_table(ReferenceScores("test", rows), {"recall_at_1": 0.36, "map_at_r": 0.04}).splitlines()
    assert worse[-1] == (
        "Warning: the trained network does not beat frozen features (MAP@R), frozen features, whitened (Recall@1), "
        "frozen features, whitened (MAP@R). Train for more steps, or lower "
        "--model.backbone_lr; --model.head_init whitening starts from the features."
    )


@pytest.mark.parametrize("wanted", [True, False])
def test_fit_prints_the_table_at_the_end(
    wanted: bool, run_in: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
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
    assert "--trust" not in caplog.text, "options of the command are no part of the configuration"


def photographs(folder: Path, colour: int = 0) -> FolderDataModule:
    """Eight classes of four pictures: the first four train, one of them for validation."""
    generator = torch.Generator().manual_seed(colour)
    for label in range(8):
        for number in range(4):
            file = folder / f"class{label}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = (torch.rand(12, 12, 3, generator=generator) * 99 + 20 * label).byte().numpy()
            Image.fromarray(pixels).save(file)
    data = FolderDataModule(
        str(folder), batch_size=4, images_per_class=2, image_size=16, val_fraction=0.5, num_workers=0
    )
    data.setup("fit")
    return data


def colour_learner(**options: Any) -> MetricLearner:
    seed_everything(0)
    return MetricLearner(SmallConvNet(in_channels=3, width=4), ContrastiveLoss(), embedding_dim=8, **options)


def test_the_cache_gives_the_same_result_and_opens_no_image(tmp_path: Path) -> None:
    data, cache = photographs(tmp_path / "images"), tmp_path / "cache"
    first = score_before_training(colour_learner().model, data, CPU, cache)
    data.val_set.open_image = data.train_set.open_image = None  # type: ignore[assignment]
    again = score_before_training(colour_learner().model, data, CPU, cache)
    assert again[:2] == first[:2]
    data.query_set.open_image = None  # type: ignore[assignment]
    with pytest.raises(OSError, match="Cannot read the image"):  # the file is not about the test classes
        score_before_training(colour_learner().model, data, CPU, cache, test=True)
    assert first.statistics is not None
    assert again.statistics is not None
    assert all(map(torch.equal, first.statistics.sums(), again.statistics.sums()))
    (file,) = cache.iterdir()
    file.write_bytes(b"damaged")
    assert score_before_training(colour_learner().model, photographs(tmp_path / "images"), CPU, cache)[:2] == first[:2]


def test_other_images_or_weights_are_not_taken_from_the_cache(tmp_path: Path) -> None:
    cache, other = tmp_path / "cache", colour_learner()
    torch.nn.init.ones_(next(other.model.backbone.parameters()))
    for number, (model, colour) in enumerate(((colour_learner(), 0), (other, 0), (colour_learner(), 1)), start=1):
        score_before_training(model.model, photographs(tmp_path / "images", colour), CPU, cache)
        assert len(list(cache.iterdir())) == number


@pytest.mark.parametrize("reference", [True, False])
def test_the_head_is_fitted_to_the_features_of_the_comparison(reference: bool, tmp_path: Path) -> None:
    """With and without the comparison it is the same, bit for bit, and the images are opened once."""
    data, model = photographs(tmp_path), colour_learner(head_init="whitening")
    expected = colour_learner(head_init="whitening")
    fit = {"max_steps": 0, "logger": False, "accelerator": "cpu", "enable_checkpointing": False}
    Trainer(**fit).fit(expected, photographs(tmp_path))
    opened: list[int] = []
    images, open_image = data.train_set, data.train_set.open_image
    images.open_image = lambda row: opened.append(row) or open_image(row)  # type: ignore[func-returns-value]
    if reference:
        model.head_statistics = score_before_training(model.model, data, CPU).statistics
    Trainer(**fit).fit(model, data)
    assert torch.equal(model.model.head.weight, expected.model.head.weight)
    assert len(opened) == len(images)
