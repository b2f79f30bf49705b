"""GalleryLogger through the real Trainer: whose queries it shows, when, and where it writes."""

from __future__ import annotations

import io
import re
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_memdml import (
    ContrastiveLoss,
    FeatureDataModule,
    GalleryLogger,
    GlyphDataModule,
    MetricLearner,
    RetrievalMetrics,
    SmallConvNet,
)
from lightning_memdml.retrieval import retrieval_examples

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


def learner() -> MetricLearner:
    torch.manual_seed(0)
    return MetricLearner(SmallConvNet(width=4), ContrastiveLoss(), embedding_dim=8)


def glyphs(cache: str, **options: Any) -> GlyphDataModule:
    return GlyphDataModule(num_classes=24, batch_size=8, images_per_class=2, cache_dir=cache, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Page(HTMLParser):
    """The rows of a page: kind and picture of each figure."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[tuple[str, np.ndarray]]] = []
        self.kind = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag == "section":
            self.rows.append([])
        if tag == "figure":
            self.kind = dict(attributes)["class"]
        if tag == "img":
            picture = Image.open(io.BytesIO(b64decode(dict(attributes)["src"].split(",")[1])))
            self.rows[-1].append((self.kind, np.asarray(picture.convert("L"))))


def test_test_shows_the_hardest_queries_with_their_neighbours(glyph_cache: str, tmp_path: Path) -> None:
    data, model = glyphs(glyph_cache), learner()
    Trainer(callbacks=[GalleryLogger(count=3, neighbours=4, dirpath=str(tmp_path))], **QUIET).test(
        model, data, verbose=False
    )
    assert names(tmp_path) == ["test_0000000.html", "test_0000000.png", "test_map_0000000.png"]
    with torch.inference_mode():
        images = torch.stack([data.query_set[position][0] for position in range(len(data.query_set))])
        embeddings = model.eval()(images)
    examples = retrieval_examples(embeddings, data.query_set.labels, count=3, neighbours=4)
    page = Page((tmp_path / "test_0000000.html").read_text())
    assert len(page.rows) == len(examples) == 3
    for row, example in zip(page.rows, examples, strict=True):
        shown = [example.position, *(neighbour.position for neighbour in example.neighbours)]
        kinds = ["query", *("right" if neighbour.right else "wrong" for neighbour in example.neighbours)]
        if example.best_match is not None and "right" not in kinds:
            shown, kinds = [*shown, example.best_match.position], [*kinds, "right first"]
        assert [kind for kind, _ in row] == kinds
        for (_, picture), position in zip(row, shown, strict=True):
            np.testing.assert_array_equal(picture, np.asarray(data.query_set.picture(position).convert("L")))


def test_training_writes_at_its_interval_and_is_not_changed(glyph_cache: str, tmp_path: Path) -> None:
    """Six validations, of which every second is shown; that before the training is none of them."""
    trained = []
    for callbacks in ([], [GalleryLogger(every_n_validations=2, count=2, embedding_map=None)]):
        model, logger = learner(), CSVLogger(tmp_path, name="run", version=len(callbacks))
        run = {**QUIET, "logger": logger, "max_steps": 6, "val_check_interval": 1, "num_sanity_val_steps": 1}
        Trainer(callbacks=callbacks, **run).fit(model, glyphs(glyph_cache, val_fraction=0.3))
        trained.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert names(tmp_path / "run/version_1/gallery") == [
        f"val_{step:07d}{ending}" for step in (2, 4, 6) for ending in (".html", ".png")
    ]
    assert torch.equal(*trained)
    assert not (tmp_path / "run/version_0/gallery").exists()


def test_a_resumed_run_keeps_the_interval(glyph_cache: str, tmp_path: Path) -> None:
    """Of validations 1 to 4, every third is shown; the run is resumed after the second."""

    def run(steps: int, ckpt: Path | None = None) -> Trainer:
        callback = GalleryLogger(every_n_validations=3, count=2, embedding_map=None, dirpath=str(tmp_path / "gallery"))
        trainer = Trainer(callbacks=[callback], **{**QUIET, "max_steps": steps, "val_check_interval": 1})
        trainer.fit(learner(), glyphs(glyph_cache, val_fraction=0.3), ckpt_path=ckpt)
        return trainer

    run(2).save_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "gallery").exists()
    run(4, tmp_path / "last.ckpt")
    assert names(tmp_path / "gallery") == ["val_0000003.html", "val_0000003.png"]


def test_a_query_is_not_shown_among_its_own_neighbours_where_it_is_in_the_gallery_too(
    glyph_cache: str, tmp_path: Path
) -> None:
    """Queries are every second gallery image, under the same number."""

    class TwoSets(GlyphDataModule):
        def setup(self, stage: str | None = None) -> None:
            if hasattr(self, "classes"):
                return
            super().setup(stage)
            rows = torch.arange(0, len(self.gallery_set), 2)
            self.query_set = self.gallery_set.part(rows, self.gallery_set.transform, rows)

    data = TwoSets(num_classes=24, cache_dir=glyph_cache)
    callback = GalleryLogger(count=5, neighbours=3, order="random", dirpath=str(tmp_path))
    Trainer(callbacks=[callback], **QUIET).test(learner(), data, verbose=False)
    for (_, query), *references in Page((tmp_path / "test_0000000.html").read_text()).rows:
        assert any(
            np.array_equal(query, data.query_set.picture(row).convert("L")) for row in range(len(data.query_set))
        )
        assert not any(np.array_equal(query, picture) for _, picture in references)


class Plain(LightningModule):
    """A module of somebody else, whose images are normalised tensors."""

    def __init__(self, with_indices: bool = True, with_metrics: bool = True) -> None:
        super().__init__()
        self.net = nn.Flatten()
        self.with_indices = with_indices
        if with_metrics:
            self.metrics = RetrievalMetrics(k=(1,))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels, indices = batch
        if hasattr(self, "metrics"):
            self.metrics.update(self.net(images), labels, indices if self.with_indices else None)

    def on_test_epoch_end(self) -> None:
        if hasattr(self, "metrics"):
            self.log_dict(self.metrics.compute())
            self.metrics.reset()


def squares() -> DataLoader:
    images = torch.zeros(6, 1, 8, 8)
    for row in range(6):
        images[row, :, :, row // 2] = 3.0
    return DataLoader(TensorDataset(images - 1, torch.arange(6) // 2, torch.arange(6)), batch_size=4)


def test_any_module_with_the_metrics_and_any_data_set_of_tensors_will_do(tmp_path: Path) -> None:
    Trainer(callbacks=[GalleryLogger(neighbours=1, dirpath=str(tmp_path))], **QUIET).test(
        Plain(), squares(), verbose=False
    )
    rows = Page((tmp_path / "test_0000000.html").read_text()).rows
    assert [[kind for kind, _ in row] for row in rows] == [["query", "right"]] * 6
    for row in rows:
        for _, picture in row:
            assert sorted(np.unique(picture)) == [0, 255]
            assert (picture == 255).sum() == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"with_metrics": False}, "Expected a RetrievalMetrics in Plain"),
        ({"with_indices": False}, "but got unknown ones"),
    ],
)
def test_what_is_missing_is_named(options: dict[str, bool], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(callbacks=[GalleryLogger(dirpath=str(tmp_path))], **QUIET).test(
            Plain(**options), squares(), verbose=False
        )
    assert not list(tmp_path.iterdir())


def test_nothing_to_show_is_a_warning(tmp_path: Path) -> None:
    images = torch.eye(4).view(4, 1, 2, 2)
    alone = DataLoader(TensorDataset(images, torch.arange(4), torch.arange(4)), batch_size=4)
    with pytest.warns(UserWarning, match="GalleryLogger draws nothing: none of the 4 queries has a match"):
        Trainer(callbacks=[GalleryLogger(dirpath=str(tmp_path))], **QUIET).test(Plain(), alone, verbose=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"neighbours": 0}, "Expected `neighbours` of at least 1 but got 0"),
        ({"order": "best"}, "Expected `order` to be 'hardest' or 'random' but got 'best'"),
        ({"embedding_map": "tsne"}, "Expected `embedding_map` to be 'pca', 'umap' or None but got 'tsne'"),
    ],
)
def test_arguments_out_of_range_are_refused_before_the_training(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GalleryLogger(**arguments)


def test_pictures_and_page_go_to_wandb(glyph_cache: str, tmp_path: Path, offline_wandb: ModuleType) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    Trainer(callbacks=[GalleryLogger(count=2)], **{**QUIET, "logger": logger}).test(
        learner(), glyphs(glyph_cache), verbose=False
    )
    offline_wandb.finish()
    media = [path for path in tmp_path.rglob("files/media/**/*") if path.is_file()]
    found = sorted(re.sub(r"_\d+_[0-9a-f]+\.\w+$", "", "/".join(path.parts[-3:])) for path in media)
    assert found == ["html/gallery/test_page", "images/gallery/test", "images/gallery/test_map"]
    (page,) = (path for path in media if path.suffix == ".html")
    assert len(Page(page.read_text()).rows) == 2


def test_of_features_there_is_the_map_alone(tmp_path: Path) -> None:
    labels = np.arange(48) // 4
    rows = np.random.default_rng(0).normal(size=(48, 2, 6)).astype(np.float32)
    np.savez(tmp_path / "features.npz", feature=rows, label=labels, train=labels < 6)
    features = FeatureDataModule(f"{tmp_path}/features.npz", batch_size=4, images_per_class=2, val_fraction=0)
    torch.manual_seed(0)
    head = MetricLearner(nn.Identity(), ContrastiveLoss(), num_features=6, embedding_dim=4)
    trainer = Trainer(callbacks=[GalleryLogger(dirpath=f"{tmp_path}/gallery")], **QUIET)
    with pytest.warns(UserWarning, match="GalleryLogger draws no neighbours: the data set has features"):
        trainer.test(head, features)
    assert names(tmp_path / "gallery") == ["test_map_0000000.png"]
