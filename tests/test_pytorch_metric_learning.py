"""Losses and miners of pytorch-metric-learning: used where they can be, and refused by name where they cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.learners import DIM, SIZE, data, learner, loader, trainer
from torch import Tensor

from lightning_memdml import ContrastiveLoss, MemoryCallback, MinedLoss
from lightning_memdml.memory.rows import MemoryRows
from lightning_memdml.memory_term import loss_term

pml = pytest.importorskip("pytorch_metric_learning", reason="a development dependency")
from pytorch_metric_learning import losses, miners  # noqa: E402

CLASSES = 3
WITHOUT_REFERENCES = {
    "CrossBatchMemory": lambda: losses.CrossBatchMemory(losses.ContrastiveLoss(), DIM, memory_size=SIZE),
    "ProxyAnchorLoss": lambda: losses.ProxyAnchorLoss(CLASSES, DIM),
    "ArcFaceLoss": lambda: losses.ArcFaceLoss(CLASSES, DIM),
}


def rows() -> tuple[Tensor, Tensor, MemoryRows]:
    torch.manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(12, DIM), dim=1)
    labels = torch.arange(12) % CLASSES
    return embeddings[:4], labels[:4], MemoryRows(embeddings[4:], labels[4:], torch.full((8,), -1))


@pytest.mark.parametrize("name", WITHOUT_REFERENCES)
def test_a_loss_without_references_is_refused_against_the_memory_with_the_way_out(name: str) -> None:
    loss: Any = WITHOUT_REFERENCES[name]()
    message = (
        rf"^Expected a loss that compares with references against the memory but got {name}, which takes "
        r"none\. Pass another one for the memory: `memory_loss=ContrastiveLoss\(\)`, or `against_memory\(self, "
        r"ContrastiveLoss\(\), \.\.\.\)`\.$"
    )
    with pytest.raises(ValueError, match=message):
        trainer(MemoryCallback(size=SIZE)).fit(learner(loss=loss), loader())


@pytest.mark.parametrize("name", WITHOUT_REFERENCES)
def test_such_a_loss_trains_in_the_batch_beside_another_one_against_the_memory(name: str) -> None:
    model = learner(loss=WITHOUT_REFERENCES[name](), memory_loss=ContrastiveLoss())
    before = model.model.head.weight.clone()
    memory = MemoryCallback(size=SIZE)
    trainer(memory).fit(model, loader())
    assert len(memory.memory) == len(data())
    assert not model.model.head.weight.equal(before)
    for parameter in model.loss.parameters():
        assert parameter.grad is not None  # proxies learn


def test_a_function_of_two_arguments_is_refused_against_the_memory() -> None:
    def spread(embeddings: Tensor, labels: Tensor) -> Tensor:
        return embeddings.var()

    embeddings, labels, memory = rows()
    assert loss_term(spread, embeddings, labels) == embeddings.var()
    with pytest.raises(ValueError, match="but got spread, which takes none"):
        loss_term(spread, embeddings, labels, memory)


def test_another_error_of_a_loss_is_its_own() -> None:
    class Broken(losses.ContrastiveLoss):
        def forward(self, *args: Any, ref_emb: Any = None, **kwargs: Any) -> Tensor:
            raise ValueError("broken")

    with pytest.raises(ValueError, match=r"^broken$"):
        loss_term(Broken(), *rows())


def test_a_mined_loss_is_the_loss_of_what_the_miner_chose() -> None:
    embeddings, labels, memory = rows()
    loss, miner = losses.TripletMarginLoss(margin=0.3), miners.TripletMarginMiner(margin=0.3)
    mined = MinedLoss(loss, miner)
    assert loss_term(mined, embeddings, labels).equal(loss(embeddings, labels, miner(embeddings, labels)))
    chosen = miner(embeddings, labels, memory.embeddings, memory.labels)
    expected = loss(embeddings, labels, chosen, memory.embeddings, memory.labels)
    assert loss_term(mined, embeddings, labels, memory).equal(expected)
    trainer(MemoryCallback(size=SIZE)).fit(learner(loss=mined), loader())


@pytest.mark.parametrize("loss", [miners.TripletMarginMiner(), ContrastiveLoss(), 3])
def test_a_mined_loss_of_what_is_no_loss_of_that_library_is_refused(loss: Any) -> None:
    with pytest.raises(TypeError, match=r"^Expected `loss` to be a loss of pytorch-metric-learning but got"):
        MinedLoss(loss, miners.TripletMarginMiner())


@pytest.mark.parametrize("miner", [losses.TripletMarginLoss(), None])
def test_a_mined_loss_without_a_miner_is_refused(miner: Any) -> None:
    with pytest.raises(TypeError, match=r"^Expected `miner` to be a miner of pytorch-metric-learning but got"):
        MinedLoss(losses.TripletMarginLoss(), miner)


def test_a_miner_in_the_place_of_a_loss_is_refused_by_name() -> None:
    for options in ({"loss": miners.TripletMarginMiner()}, {"memory_loss": miners.TripletMarginMiner()}):
        (name,) = options
        with pytest.raises(
            TypeError,
            match=rf"^Expected `{name}` to be a loss but got the miner TripletMarginMiner\. Pass both: MinedLoss\(loss",
        ):
            learner(**options)
