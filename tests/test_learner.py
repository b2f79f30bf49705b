"""MetricLearner: what it trains on against loops written from the formulas, its losses and its optimiser."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import ReduceLROnPlateau
from support.learners import DIM, IMAGES, SIZE, Record, data, learner, loader, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_memdml import (
    ContrastiveLoss,
    InstanceMemory,
    MemoryCallback,
    MetricLearner,
    MultiSimilarityLoss,
    SmallConvNet,
)
from lightning_memdml.schedules import LinearRamp

# ------------------------------------------------------------------ what it trains on


Row = tuple[Tensor, int, int]  # embedding, label, image (-1: unknown)


def pairs(anchor: Row, references: Sequence[Row]) -> tuple[list[Tensor], list[Tensor]]:
    """Similarities of an anchor to its positives and to its negatives, without itself and without its own image."""
    others = [row for row in references if row[0] is not anchor[0] and not (row[2] == anchor[2] != -1)]
    similarity = {id(row): anchor[0] @ row[0] for row in others}
    positives = [similarity[id(row)] for row in others if row[1] == anchor[1]]
    return positives, [similarity[id(row)] for row in others if row[1] != anchor[1]]


def contrastive(anchors: Sequence[Row], references: Sequence[Row]) -> Tensor:
    """sum_P (1 - s) + sum_{N, s > 0.4} s, mean over anchors."""
    total = 0 * sum(row[0].sum() for row in anchors)
    for anchor in anchors:
        positives, negatives = pairs(anchor, references)
        total = total + sum(1 - s for s in positives) + sum(s for s in negatives if s > 0.4)
    return total / len(anchors)


def multi_similarity(anchor: Row, references: Sequence[Row]) -> Tensor:
    """log(1 + sum_P exp(-2 (s - 0.5))) / 2 + log(1 + sum_N exp(5 (s - 0.5))) / 5: all pairs of a row matter to each."""
    positives, negatives = pairs(anchor, references)
    positive = 1 + sum(torch.exp(-2 * (s - 0.5)) for s in positives)
    negative = 1 + sum(torch.exp(5 * (s - 0.5)) for s in negatives)
    return torch.as_tensor(positive).log() / 2 + torch.as_tensor(negative).log() / 5


def train_by_hand(order: str, epochs: int, with_indices: bool) -> tuple[list[float], dict[str, Tensor]]:
    """SGD in a loop, with 0.7 times the multi-similarity loss against a memory of the last SIZE rows."""
    net = learner().model
    memory: list[Row] = []
    losses = []
    for _ in range(epochs):
        for images, labels, *indices in loader(with_indices, repeat=True):
            features = net.head(net.backbone(images))
            embeddings = features / features.pow(2).sum(1, keepdim=True).sqrt()
            known = indices[0].tolist() if with_indices else [-1] * len(labels)
            batch = list(zip(embeddings, labels.tolist(), known, strict=True))
            loss = contrastive(batch, batch)
            entered = (memory + [(row.detach(), label, image) for row, label, image in batch])[-SIZE:]
            for i, row in enumerate(batch):
                own = len(entered) - len(batch) + i
                held = {"none": [], "after": memory, "before": entered[:own] + entered[own + 1 :]}[order]
                if memory and held:
                    loss = loss + 0.7 * multi_similarity(row, held) / len(batch)
            memory = entered
            loss.backward()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
            losses.append(loss.item())
    return losses, net.state_dict()


@pytest.mark.parametrize("with_indices", [True, False], ids=["indices", "no indices"])
@pytest.mark.parametrize("order", ["none", "after", "before"])
def test_training_equals_the_loop(order: str, with_indices: bool) -> None:
    """No memory; the memory read before the batch enters; and after it (XBM's own code), each row without itself.

    14 images in batches of 4, 4, 4 and 2 against 20 rows: the memory goes round, the last batch is smaller, images
    meet their own earlier embeddings, and one image is twice in a batch.
    """
    expected, weights = train_by_hand(order, 3, with_indices)
    options: dict[str, Any] = {"memory_includes_batch": order == "before"}
    if order != "none":
        loss = MultiSimilarityLoss(alpha=2, beta=5, base=0.5, epsilon=None)
        options |= {"memory_loss": loss, "memory_weight": 0.7}
    model, record = learner(**options), Record()
    callbacks = [record] if order == "none" else [MemoryCallback(size=SIZE), record]
    trainer(*callbacks, max_epochs=3).fit(model, loader(with_indices, repeat=True))
    torch.testing.assert_close(torch.tensor(record.losses), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.model.state_dict(), weights, rtol=1e-4, atol=1e-6)


def test_the_ways_differ() -> None:
    """Otherwise the test above would not tell them apart."""
    ways = [(order, known) for order in ("none", "after", "before") for known in (True, False)]
    totals = sorted(sum(train_by_hand(order, 2, known)[0]) for order, known in ways)
    assert all(b - a > 1e-2 for a, b in pairwise(totals))


def test_memory_term_takes_the_loss_of_the_batch_unless_it_has_its_own() -> None:
    records = [Record(), Record()]
    for record, options in zip(records, ({}, {"memory_loss": ContrastiveLoss(margin=0.4)}), strict=True):
        trainer(MemoryCallback(size=SIZE), record).fit(learner(**options), loader())
    assert records[0].losses == records[1].losses


def test_logged_terms_add_up_to_the_loss() -> None:
    record = Record()
    fitted = trainer(MemoryCallback(size=SIZE), record)
    fitted.fit(learner(memory_weight=0.3), loader())
    logged = fitted.logged_metrics
    assert logged["train/loss"].item() == pytest.approx(record.losses[-1])
    assert (logged["train/batch_loss"] + logged["train/memory_loss"]).item() == pytest.approx(record.losses[-1])
    assert logged["train/memory_loss"] > 0


@pytest.mark.parametrize("with_indices", [True, False])
def test_step_returns_what_the_memory_stores(with_indices: bool) -> None:
    record = Record()
    trainer(record).fit(learner(), loader(with_indices))
    assert set(record.outputs[0]) == {"loss", "embeddings", "labels"} | ({"indices"} if with_indices else set())
    assert torch.equal(record.outputs[1]["labels"], data()[4:8][1])


@pytest.mark.parametrize("batch", [[torch.zeros(2, 1, 2, 2)], {"image": torch.zeros(2, 1, 2, 2)}, torch.zeros(2, 4)])
def test_batch_of_another_form_is_refused(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected a batch of \(images, labels\) or \(images, labels, indices\)"):
        learner().training_step(batch, 0)


# ------------------------------------------------------------------ losses


@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_losses_of_pytorch_metric_learning_serve_batch_and_memory(stored: Any) -> None:
    pytest.importorskip("pytorch_metric_learning", reason="its losses are accepted, not needed")
    from pytorch_metric_learning import distances, losses

    loss = losses.ContrastiveLoss(pos_margin=1, neg_margin=0.4, distance=distances.CosineSimilarity())
    seen = []

    class Compare(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
            embeddings, labels = outputs["embeddings"], outputs["labels"]
            expected = loss(embeddings, labels)
            if len(pl_module.memory):
                references, ref_labels, _ = pl_module.memory.read()
                expected = expected + 0.5 * loss(embeddings, labels, ref_emb=references.float(), ref_labels=ref_labels)
            seen.append((outputs["loss"].item(), expected.item()))

    # Before the memory callback, so that the memory is still what the step read.
    callbacks = Compare(), MemoryCallback(size=SIZE, dtype=stored)
    trainer(*callbacks).fit(learner(loss=loss, memory_weight=0.5), loader())
    assert len(seen) == 4
    assert [got for got, _ in seen] == pytest.approx([expected for _, expected in seen])


def test_similarities_of_any_loss_are_taken_in_full_precision() -> None:
    dtypes = []

    def loss(embeddings: Tensor, labels: Tensor) -> Tensor:
        dtypes.append((embeddings @ embeddings.T).dtype)
        return (embeddings @ embeddings.T).mean()

    trainer(precision="bf16-mixed").fit(learner(loss=loss), loader())
    assert set(dtypes) == {torch.float32}


def test_order_of_the_authors_needs_a_loss_that_can_leave_pairs_out() -> None:
    with pytest.raises(ValueError, match="Expected a PairLoss against the memory with `memory_includes_batch`"):
        learner(loss=lambda z, y: z.sum(), memory_includes_batch=True)
    learner(loss=lambda z, y: z.sum(), memory_loss=ContrastiveLoss(), memory_includes_batch=True)


@pytest.mark.parametrize(
    "option",
    [
        {"memory_loss": ContrastiveLoss()},
        {"memory_includes_batch": True},
        {"memory_excludes_own_image": False},
        {"memory_weight": 0.3},
        {"memory_weight": lambda step: 1.0},
        {"memory_weight": 0.3, "memory_loss": ContrastiveLoss()},
    ],
)
def test_options_of_a_memory_without_one_are_refused_before_the_first_step(option: dict[str, Any]) -> None:
    names = " and ".join(f"`{name}`" for name in sorted(option))
    verb = "is" if len(option) == 1 else "are"
    remedy = "Pass `Trainer(callbacks=[MemoryCallback(size=8192)])`, or leave out what is set."
    whole = f"Expected a memory, as {names} {verb} set, but there is none. {remedy}"

    class Started(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
            raise AssertionError("the fit has started")

    with pytest.raises(ValueError, match=f"^{re.escape(whole)}$"):
        trainer(Started()).fit(learner(**option), loader())


@pytest.mark.parametrize("weight", [0, 1, 1.0])
def test_a_memory_weight_that_asks_for_no_memory_is_accepted_without_one(weight: float) -> None:
    trainer().fit(learner(memory_weight=weight), loader())


def memory_terms(model: MetricLearner, *callbacks: Callback, epochs: int = 2, **options: Any) -> list[float]:
    """The logged memory term of every step, weight included."""
    terms = []

    class Note(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            terms.append(trainer.callback_metrics["train/memory_loss"].item())

    trainer(*callbacks, Note(), max_epochs=epochs, **options).fit(model, loader())
    return terms


@pytest.mark.parametrize("accumulate", [1, 2])
def test_memory_weight_follows_its_schedule_of_optimiser_steps(accumulate: int) -> None:
    """A learning rate of 0 keeps the terms comparable; 4 batches an epoch."""
    still = {"optimizer": partial(torch.optim.SGD, lr=0.0)}
    constant = memory_terms(learner(**still), MemoryCallback(size=SIZE), accumulate_grad_batches=accumulate)
    for weight in (LinearRamp(2, 6, start=0.5, stop=2), lambda step: {0: 0.5, 1: 0.5, 2: 0.5}.get(step, 2) + step / 9):
        terms = memory_terms(
            learner(memory_weight=weight, **still), MemoryCallback(size=SIZE), accumulate_grad_batches=accumulate
        )
        expected = [weight(batch // accumulate) * term for batch, term in enumerate(constant)]
        assert terms == pytest.approx(expected)
        assert terms[-1] > 0


def test_a_ramp_is_constant_before_and_after_and_refuses_an_empty_way() -> None:
    ramp = LinearRamp(10, 20, start=1, stop=0)
    assert [ramp(step) for step in (0, 10, 15, 20, 99)] == [1, 1, 0.5, 0, 0]
    with pytest.raises(ValueError, match="`stop_step` above `start_step`, 5, but got 5"):
        LinearRamp(5, 5)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_a_schedule_that_gives_no_weight_is_stopped_at_that_step(weight: float) -> None:
    with pytest.raises(
        ValueError, match=r"`memory_weight` to return a finite weight of at least 0 but got .* at step 2"
    ):
        memory_terms(learner(memory_weight=lambda step: weight if step == 2 else 1.0), MemoryCallback(size=SIZE))


def test_rows_of_the_own_image_are_left_out_by_index_unless_asked_for() -> None:
    """In the second epoch every anchor meets its own earlier row; the network stands still, so it is at distance 0."""
    still = {"optimizer": partial(torch.optim.SGD, lr=0.0), "loss": lambda z, y: z[:0].sum()}

    class Pairs(ContrastiveLoss):
        """Counts positive pairs, and those of an image with itself."""

        def forward(self, z: Tensor, y: Tensor, ref_z: Any = None, ref_y: Any = None, **kw: Any) -> Tensor:
            positive, _ = self.pair_weights(z, y, ref_z, ref_y, **kw)
            itself = z @ ref_z.T > 1 - 1e-5
            found.append((int((positive > 0).sum()), int(((positive > 0) & itself).sum())))
            return super().forward(z, y, ref_z, ref_y, **kw)

    counts = {}
    for excluded in (True, False):
        found: list[tuple[int, int]] = []
        model = learner(memory_loss=Pairs(), memory_excludes_own_image=excluded, **still)
        trainer(MemoryCallback(size=SIZE), max_epochs=2).fit(model, loader())
        counts[excluded] = found[-1]
    assert counts[True][1] == 0
    assert counts[False][1] == 2  # the last batch has two images
    assert counts[False][0] == counts[True][0] + 2


def test_one_row_per_image_cannot_hold_older_copies_of_an_image() -> None:
    model = learner(memory_includes_batch=True, memory_excludes_own_image=False)
    with pytest.raises(ValueError, match=r"^Expected the index of each image to read an InstanceMemory .* got none\."):
        trainer(MemoryCallback(memory=InstanceMemory())).fit(model, loader())


@pytest.mark.parametrize("includes", [True, False])
def test_instance_memory_trains_in_both_orders(includes: bool) -> None:
    """At momentum 0 and with all images in one epoch it holds what a FIFO as long as the data set does."""
    records = [Record(), Record()]
    memories = {"memory": InstanceMemory(momentum=0)}, {"size": IMAGES}
    for record, options in zip(records, memories, strict=True):
        model = learner(memory_includes_batch=includes)
        trainer(MemoryCallback(**options), record, max_epochs=3).fit(model, loader())
    # Sums are made in another order, as rows stand in another.
    assert records[0].losses == pytest.approx(records[1].losses, rel=1e-4)


@pytest.mark.parametrize("weight", [-0.1, math.nan])
def test_a_memory_weight_out_of_range_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=f"Expected `memory_weight` of at least 0 but got {weight}"):
        learner(memory_weight=weight)


# ------------------------------------------------------------------ optimiser and scheduler


class Proxies(nn.Module):
    """A loss with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.proxies = nn.Parameter(torch.ones(3, DIM))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return -(embeddings * self.proxies[labels]).sum(1).mean()


def test_backbone_has_its_own_rate_and_all_else_the_other() -> None:
    model = learner(loss=Proxies(), backbone_lr=0.01)
    head, backbone = model.configure_optimizers().param_groups
    assert (head["lr"], backbone["lr"]) == (0.1, 0.01)
    assert {id(p) for p in backbone["params"]} == {id(p) for p in model.model.backbone.parameters()}
    assert {id(p) for p in head["params"]} == {id(p) for p in (*model.model.head.parameters(), model.loss.proxies)}


def test_frozen_parameters_are_not_given_to_the_optimizer() -> None:
    model = learner()
    model.model.backbone.requires_grad_(False)
    (group,) = model.configure_optimizers().param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in model.model.head.parameters()}


@pytest.mark.parametrize(("interval", "halvings"), [("step", 4), ("epoch", 2)])
def test_scheduler_steps_per_optimizer_step_or_per_epoch(interval: Any, halvings: int) -> None:
    halve = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    model = learner(lr_scheduler=halve, lr_scheduler_interval=interval)
    fitted = trainer(max_epochs=2, accumulate_grad_batches=2)  # 4 batches, 2 optimiser steps an epoch
    fitted.fit(model, loader())
    assert fitted.global_step == 4
    assert fitted.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**halvings)


def test_scheduler_that_reads_a_metric_waits_for_the_validation() -> None:
    plateau = partial(ReduceLROnPlateau, monitor="val/recall_at_1", mode="max", patience=0, factor=0.5, threshold=10)
    fitted = trainer(max_epochs=3)
    fitted.fit(learner(lr_scheduler=plateau), loader(), loader())
    assert fitted.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**2)  # the first is the best so far


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_frozen_batch_norm_keeps_its_statistics_through_a_fit_with_validation() -> None:
    for freeze in (True, False):
        model = learner(backbone=SmallConvNet(width=4, pool=1), freeze_batch_norm=freeze)
        norm = model.model.backbone.layers[1]
        images = TensorDataset(torch.randn(8, 1, 28, 28), torch.arange(8) % 2)
        loaders = DataLoader(images, 4), DataLoader(images, 4)
        trainer(max_epochs=2).fit(model, *loaders)
        assert (norm.running_mean.abs().sum() == 0).item() is freeze
        assert model.model.head.training


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"loss": "ContrastiveLoss"},
            TypeError,
            r"`loss` to be a loss but got 'ContrastiveLoss'. Pass ContrastiveLoss\(\)",
        ),
        ({"memory_loss": 0.7}, TypeError, "`memory_loss` to be a loss but got 0.7"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)], lr=1)}, TypeError, "`optimizer` to be a function .* got SGD"),
        ({"embedding_dim": 0}, ValueError, "`embedding_dim` of at least 1 but got 0"),
    ],
)
def test_what_is_no_loss_or_optimizer_is_refused_at_once(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        MetricLearner(**{"backbone": SmallConvNet(width=4), "loss": ContrastiveLoss(), **options})
