"""A head that is fitted to the training images before the first step: once, and never over trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from support.children import run_ranks
from torch import Tensor, nn

from lightning_memdml import ContrastiveLoss, GlyphDataModule, MemoryCallback, MetricLearner
from lightning_memdml.backbones import SmallConvNet, build_backbone
from lightning_memdml.heads import FeatureStatistics, fit_head


def glyphs(cache: str) -> GlyphDataModule:
    return GlyphDataModule(num_classes=30, batch_size=8, images_per_class=2, cache_dir=cache, num_workers=0)


class Recording(MetricLearner):
    """Keeps the images of every batch."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        self.__dict__.setdefault("batches", []).append(batch[0].clone())
        return super().training_step(batch, batch_idx)


def learner(**options: Any) -> Any:
    seed_everything(0)
    return Recording(SmallConvNet(width=4), ContrastiveLoss(), embedding_dim=8, **options)


def trainer(**options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(**{"max_steps": 0, "enable_checkpointing": False, **quiet, **options})


def closed_form(model: MetricLearner, data: GlyphDataModule, init: Any) -> nn.Linear:
    """The head from all features at once."""
    data.prepare_data()
    data.setup("fit")
    images = data.plain_train_set
    model.eval()
    with torch.no_grad():
        pictures = torch.stack([images[position][0] for position in range(len(images))])
        features = model.model(pictures, features_only=True)
    statistics = FeatureStatistics(features.shape[1], int(images.labels.max()) + 1)
    statistics.add(features, images.labels)
    head = nn.Linear(features.shape[1], 8)
    fit_head(head, statistics, init)
    return head


@pytest.mark.parametrize("init", ["pca", "whitening"])
def test_the_head_is_the_closed_form_before_the_first_step(init: str, glyph_cache: str) -> None:
    data, model = glyphs(glyph_cache), learner(head_init=init)
    trainer().fit(model, data)
    expected = closed_form(learner(), data, init)
    torch.testing.assert_close(model.model.head.weight, expected.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.model.head.bias, expected.bias, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("init", ["pca", "whitening"])
def test_scores_before_the_first_step_are_those_of_the_closed_form(init: str, glyph_cache: str) -> None:
    scores = {}

    class Score(Callback):
        """The sanity check runs after the head is fitted and before the first step."""

        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            scores["steps"] = trainer.global_step

        def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.sanity_checking:
                scores["fitted"] = pl_module.val_metrics.compute()

    trainer(max_steps=1, num_sanity_val_steps=-1, callbacks=[Score()]).fit(learner(head_init=init), glyphs(glyph_cache))
    expected = learner()
    expected.model.head = closed_form(learner(), glyphs(glyph_cache), init)
    (found,) = trainer().validate(expected, glyphs(glyph_cache), verbose=False)
    assert scores["steps"] == 0
    for name in ("recall_at_1", "map_at_r"):
        assert float(scores["fitted"][name]) == pytest.approx(found[f"val/{name}"], abs=1e-4)


def fit_as_rank(cache: str) -> Tensor:
    data, model = glyphs(cache), learner(head_init="whitening")
    trainer(devices=2, strategy="ddp").fit(model, data)
    return torch.cat([model.model.head.weight.detach().flatten(), model.model.head.bias.detach()])


def test_two_ranks_fit_the_head_of_one(glyph_cache: str) -> None:
    """Each embeds half of the images, and both get the head of all."""
    glyphs(glyph_cache).prepare_data()
    first, second = run_ranks(2, fit_as_rank, glyph_cache)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    expected = closed_form(learner(), glyphs(glyph_cache), "whitening")
    features = torch.rand(20, expected.in_features, generator=torch.Generator().manual_seed(0))
    embeddings = torch.nn.functional.normalize(expected(features), dim=1)
    fitted = torch.nn.functional.normalize(features @ first[:-8].view(8, -1).T + first[-8:], dim=1)
    torch.testing.assert_close(fitted @ fitted.T, embeddings @ embeddings.T, rtol=0, atol=1e-3)


def test_fitting_leaves_the_mode_and_the_random_numbers_of_the_training_alone(glyph_cache: str) -> None:
    """The batches are those of a run without fitting."""
    seen = {}
    for init in ("default", "whitening"):
        model = learner(head_init=init)
        trainer(max_steps=3).fit(model, glyphs(glyph_cache))
        seen[init] = model.batches
        assert model.model.training
    assert len(seen["default"]) == 3
    assert all(torch.equal(*pair) for pair in zip(seen["default"], seen["whitening"], strict=True))


def test_a_trained_head_is_never_fitted_again(glyph_cache: str, tmp_path: Path) -> None:
    data, model = glyphs(glyph_cache), learner(head_init="whitening")
    first = trainer(max_steps=2, enable_checkpointing=True, default_root_dir=tmp_path)
    first.fit(model, data)
    trained = model.model.head.weight.clone()
    trainer().fit(model, glyphs(glyph_cache))
    torch.testing.assert_close(model.model.head.weight, trained, rtol=0, atol=0)
    first.save_checkpoint(tmp_path / "run.ckpt")
    resumed = learner(head_init="whitening")
    trainer(max_steps=2).fit(resumed, glyphs(glyph_cache), ckpt_path=tmp_path / "run.ckpt")
    torch.testing.assert_close(resumed.model.head.weight, trained, rtol=0, atol=0)
    loaded = MetricLearner.load_from_checkpoint(
        tmp_path / "run.ckpt", backbone=SmallConvNet(width=4), loss=ContrastiveLoss(), head_init="whitening"
    )
    trainer().fit(loaded, glyphs(glyph_cache))
    torch.testing.assert_close(loaded.model.head.weight, trained, rtol=0, atol=0)


def test_a_resumed_run_equals_the_whole_one_bit_for_bit(glyph_cache: str, tmp_path: Path) -> None:
    def fit(steps: int, checkpoint: Path | None = None) -> tuple[dict[str, Tensor], Any]:
        model, memory = learner(head_init="whitening"), MemoryCallback(size=32)
        saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, enable_version_counter=False)
        run = trainer(max_steps=steps, callbacks=[memory, saver], enable_checkpointing=True)
        run.fit(model, glyphs(glyph_cache), ckpt_path=checkpoint)
        return model.state_dict(), memory.memory.read()

    whole, rows = fit(6)
    fit(3)
    resumed, resumed_rows = fit(6, tmp_path / "step=3.ckpt")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert all(torch.equal(*pair) for pair in zip(rows, resumed_rows, strict=True))


def test_the_momentum_encoder_starts_with_the_fitted_head(glyph_cache: str) -> None:
    """Its first rows are those of the network with the fitted head, before the first step."""
    data, memory = glyphs(glyph_cache), MemoryCallback(size=64, encoder_momentum=0.999, encoder_batch_norm="running")
    model = learner(head_init="whitening")
    trainer(max_steps=1, callbacks=[memory]).fit(model, data)
    fitted = learner()
    head = closed_form(fitted, data, "whitening")
    fitted.model.head = head
    with torch.no_grad():
        expected = fitted.eval()(model.batches[0])
    torch.testing.assert_close(memory.memory.read().embeddings, expected, rtol=1e-3, atol=1e-3)


def test_a_head_is_fitted_where_the_number_of_workers_is_left_open(glyph_cache: str) -> None:
    data = glyphs(glyph_cache)
    data.num_workers = None  # the default: as many as there are cores
    fitted = learner(head_init="pca")
    trainer().fit(fitted, data)
    assert torch.equal(fitted.model.head.weight, closed_form(fitted, data, "pca").weight)


def test_a_stream_without_labels_is_refused_with_a_way_out() -> None:
    images = [(torch.rand(1, 28, 28), number % 3) for number in range(12)]
    with pytest.raises(ValueError, match=r"Expected a training set with `labels`.* or pass `head_init='default'`"):
        trainer(max_steps=1).fit(learner(head_init="pca"), torch.utils.data.DataLoader(images, batch_size=4))


def test_no_head_gives_the_normalised_features() -> None:
    model = learner(head="none").eval()
    images = torch.rand(2, 1, 28, 28)
    features = model.model.backbone(images)
    torch.testing.assert_close(model(images), torch.nn.functional.normalize(features, dim=1))


@pytest.mark.parametrize("neck", ["layer", "batch"])
def test_a_neck_normalises_the_features_before_the_head(neck: str) -> None:
    model = learner(neck=neck, head="none").train()
    features = model.model(torch.rand(16, 1, 28, 28), features_only=True)
    axis = 1 if neck == "layer" else 0
    used = features.var(dim=axis) > 0.1
    torch.testing.assert_close(features.mean(dim=axis)[used], torch.zeros(int(used.sum())), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("resnet18", 512),
        ("mobilenet_v2", 1280),
        ("mobilenet_v3_small", 576),
        ("efficientnet_b0", 1280),
        ("convnext_tiny", 768),
        ("densenet121", 1024),
        ("shufflenet_v2_x0_5", 1024),
        ("regnet_x_400mf", 400),
        ("mnasnet0_5", 1280),
        ("squeezenet1_0", 512),
    ],
)
def test_pooling_of_torchvisions_networks(name: str, width: int) -> None:
    _, found = build_backbone(name, feature_map=True)
    assert found == width
    model = MetricLearner(name, ContrastiveLoss(), embedding_dim=4, pooling="both").eval()
    assert model.model.num_features == 2 * width
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 4)


def test_average_pooling_is_the_networks_own() -> None:
    torch.manual_seed(0)
    own, _ = build_backbone("resnet18")
    torch.manual_seed(0)
    trunk, _ = build_backbone("resnet18", feature_map=True)
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(trunk.eval()(images).mean(dim=(2, 3)), own.eval()(images))


def test_pooling_of_a_transformer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected a convolutional network of torchvision .* but got vit"):
        build_backbone("vit_b_16", feature_map=True)
    with pytest.raises(
        ValueError, match=r"to return a map \(B, F, H, W\) or tokens \(B, N, F\) to pool but got \(2, 64\)"
    ):
        MetricLearner(nn.Flatten(), ContrastiveLoss(), num_features=64, pooling="gem")(torch.rand(2, 1, 8, 8))
