"""MetricLearner after training: its scores against plain loops, predictions, copies and checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from support.learners import DIM, IMAGES, SIZE, Flat, Record, data, learner, loader, trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_memdml import ContrastiveLoss, MemoryCallback, MetricLearner
from lightning_memdml.trust import UntrustedFileError

# ------------------------------------------------------------------ evaluation


def recall(queries: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor, k: int, same: bool) -> float:
    """The share of queries with a match among the k nearest, one by one."""
    hits = []
    for i, query in enumerate(queries):
        order = sorted(
            (j for j in range(len(gallery)) if not (same and j == i)), key=lambda j: -(query @ gallery[j]).item()
        )
        hits.append(any(gallery_labels[j] == labels[i] for j in order[:k]))
    return sum(hits) / len(hits)


def embed(model: MetricLearner) -> tuple[Tensor, Tensor]:
    images, labels, _ = data()[:]
    with torch.no_grad():
        return model.eval()(images).double(), labels


@pytest.mark.parametrize("with_indices", [True, False])
@pytest.mark.parametrize("stage", ["val", "test"])
def test_one_loader_is_queries_and_gallery(stage: str, with_indices: bool) -> None:
    model, run = learner(), trainer()
    (run.validate if stage == "val" else run.test)(model, loader(with_indices), verbose=False)
    embeddings, labels = embed(model)
    for k in (1, 2):
        expected = recall(embeddings, labels, embeddings, labels, k, same=True)
        assert run.callback_metrics[f"{stage}/recall_at_{k}"].item() == pytest.approx(expected)
    assert {f"{stage}/map_at_r", f"{stage}/r_precision"} <= set(run.callback_metrics)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_two_loaders_are_queries_and_gallery(stage: str) -> None:
    model, run = learner(), trainer()
    queries = TensorDataset(*data()[:5][:2])
    gallery = TensorDataset(*data()[5:][:2])
    loaders = [DataLoader(queries, 2), DataLoader(gallery, 3)]
    (run.validate if stage == "val" else run.test)(model, loaders, verbose=False)
    embeddings, labels = embed(model)
    for k in (1, 2):
        expected = recall(embeddings[:5], labels[:5], embeddings[5:], labels[5:], k, same=False)
        assert run.callback_metrics[f"{stage}/recall_at_{k}"].item() == pytest.approx(expected)
    assert run.callback_metrics[f"{stage}/queries"] == 5


@pytest.mark.parametrize("stage", ["val", "test"])
def test_a_query_does_not_find_the_gallery_image_of_its_own_index(stage: str) -> None:
    model, run = learner(), trainer()
    loaders = [DataLoader(TensorDataset(*data()[:5]), 2), loader()]  # the queries are in the gallery too
    (run.validate if stage == "val" else run.test)(model, loaders, verbose=False)
    embeddings, labels = embed(model)
    for k in (1, 2):
        expected = recall(embeddings[:5], labels[:5], embeddings, labels, k, same=True)
        assert run.callback_metrics[f"{stage}/recall_at_{k}"].item() == pytest.approx(expected)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_an_evaluation_that_broke_off_leaves_nothing_in_the_next(stage: str) -> None:
    class OutOfMemory(Callback):
        def on_validation_batch_end(self, *_: Any) -> None:
            raise RuntimeError("out of memory")

        on_test_batch_end = on_validation_batch_end

    model, evaluate = learner(), {"val": "validate", "test": "test"}[stage]
    with pytest.raises(RuntimeError, match="out of memory"):
        getattr(trainer(OutOfMemory()), evaluate)(model, loader(with_indices=False), verbose=False)
    run = trainer()
    getattr(run, evaluate)(model, loader(with_indices=False), verbose=False)
    assert run.callback_metrics[f"{stage}/queries"] == IMAGES


def test_three_loaders_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected one loader, or one of queries and one of the gallery, but got 3"):
        trainer().test(learner(), [loader()] * 3)


def test_scores_after_an_epoch_hold_nothing_of_the_sanity_check_or_the_epoch_before() -> None:
    model, run = learner(), trainer(max_epochs=2)
    run.fit(model, loader(), loader())
    embeddings, labels = embed(model)
    assert run.callback_metrics["val/queries"] == IMAGES
    assert run.callback_metrics["val/recall_at_1"].item() == pytest.approx(
        recall(embeddings, labels, embeddings, labels, 1, same=True)
    )


@pytest.mark.parametrize("with_indices", [True, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_predict_returns_unit_embeddings_with_labels_and_indices(precision: Any, with_indices: bool) -> None:
    batches = trainer(precision=precision).predict(learner(), loader(with_indices))
    assert set(batches[0]) == {"embeddings", "labels"} | ({"indices"} if with_indices else set())
    embeddings = torch.cat([batch["embeddings"] for batch in batches])
    assert embeddings.shape == (IMAGES, DIM)
    assert embeddings.dtype == torch.float32
    assert (embeddings.double().norm(dim=1) - 1).abs().max() < 1e-6
    if with_indices:
        assert torch.cat([batch["indices"] for batch in batches]).tolist() == list(range(IMAGES))


# ------------------------------------------------------------------ copies and checkpoints


@pytest.mark.parametrize("fitted", [False, True])
def test_deep_copy_is_a_learner_of_its_own(fitted: bool) -> None:
    model = learner(memory_loss=ContrastiveLoss(margin=0.2))
    if fitted:
        trainer(MemoryCallback(size=SIZE)).fit(model, loader())
    before = copy.deepcopy(model.state_dict())
    other = copy.deepcopy(model)
    trainer(MemoryCallback(size=SIZE)).fit(other, loader())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not torch.equal(other.model.head.weight, model.model.head.weight)


def checkpoint_of_a_program(path: Path, **options: Any) -> MetricLearner:
    model = learner(memory_loss=ContrastiveLoss(margin=0.2), memory_weight=0.7, **options)
    run = trainer(MemoryCallback(size=SIZE))
    run.fit(model, loader())
    run.save_checkpoint(path)
    return model


def test_checkpoint_of_a_program_holds_no_code_and_asks_for_a_backbone_of_the_users(tmp_path: Path) -> None:
    model = checkpoint_of_a_program(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    assert saved["embedding_dim"] == DIM
    assert saved["memory_weight"] == 0.7
    assert not {"backbone", "loss", "memory_loss", "optimizer"} & set(saved)
    with pytest.raises(
        UntrustedFileError, match=r"^Expected model\.backbone in .*closed list but got '.*\.Flat'\. If you"
    ):
        MetricLearner.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    loaded = MetricLearner.load_from_checkpoint(tmp_path / "a.ckpt", backbone=Flat())
    assert (loaded.loss.margin, loaded.memory_loss.margin) == (0.4, 0.2)  # saved as their names and arguments
    loaded = MetricLearner.load_from_checkpoint(
        tmp_path / "a.ckpt", backbone=Flat(), loss=ContrastiveLoss(margin=0.4), weights_only=True
    )
    assert torch.equal(embed(loaded)[0], embed(model)[0])
    assert loaded.memory_weight == 0.7


def test_training_goes_on_from_the_checkpoint_of_a_program(tmp_path: Path) -> None:
    checkpoint_of_a_program(tmp_path / "a.ckpt")
    records, options = [Record(), Record()], {"memory_loss": ContrastiveLoss(margin=0.2), "memory_weight": 0.7}
    for record, path in zip(records, (None, tmp_path / "a.ckpt"), strict=True):
        run = trainer(MemoryCallback(size=SIZE), record, max_epochs=2)
        run.fit(learner(**options), loader(), ckpt_path=path, weights_only=True)
    assert records[1].losses == records[0].losses[4:]


def test_first_weights_are_not_read_again_from_a_checkpoint(tmp_path: Path) -> None:
    torch.save(Flat().state_dict(), tmp_path / "first.pth")
    model = checkpoint_of_a_program(tmp_path / "a.ckpt", weights=str(tmp_path / "first.pth"))
    (tmp_path / "first.pth").unlink()
    loaded = MetricLearner.load_from_checkpoint(tmp_path / "a.ckpt", backbone=Flat(), loss=ContrastiveLoss())
    assert torch.equal(embed(loaded)[0], embed(model)[0])


def test_memory_is_no_part_of_the_module() -> None:
    model = learner()
    trainer(MemoryCallback(size=SIZE)).fit(model, loader())
    assert not hasattr(model, "memory")
    assert all(key.startswith("model.") for key in model.state_dict())
