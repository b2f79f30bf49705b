"""Two ranks whose batches travel during the backward pass: the same rows and weights, and no further collective."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from support.children import run_ranks
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_memdml import ContrastiveLoss, MemoryCallback, MetricLearner, against_memory
from lightning_memdml.memory import gather

ROWS = [(4, 4), (4, 3), (1, 4), (2, 5), (4, 4), (3, 1), (4, 4)]
"""Rows of rank 0 and rank 1, step by step; the fourth step has more rows than any rank had before."""


class Batches:
    def __len__(self) -> int:
        return len(ROWS)

    def __iter__(self) -> Iterator[list[Tensor]]:
        for number, rows in enumerate(ROWS):
            indices = (torch.arange(sum(rows)) + 10 * number).split(rows)[dist.get_rank()]
            yield [torch.stack([torch.sin(indices * k * 0.7) for k in range(1, 7)], dim=1), indices % 5, indices]


class Learner(LightningModule):
    """Gives its batch at the end of the step (`late`), before it (`early`), or another one first (`changed`)."""

    def __init__(self, when: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.when = nn.Linear(6, 8), when
        self.loss = ContrastiveLoss(0.2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        x, y, indices = batch
        z = normalize(self.net(x), dim=1)
        if self.when == "late":
            loss = self.loss(z, y, *self.memory.read()[:2]) + 0 * z.sum()
            return {"loss": loss, "embeddings": z, "labels": y, "indices": indices}
        given = z if self.when == "early" else -z
        loss = against_memory(self, self.loss, given, y) + 0 * z.sum()
        if self.when == "changed":
            loss = self.loss(z, y, *self.memory.read()[:2]) + 0 * z.sum()
        self.memory.given = {**self.memory.given, "indices": indices}
        return loss if self.when == "early" else {"loss": loss, "embeddings": z, "labels": y, "indices": indices}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Diary(MemoryCallback):
    """Notes after each step how many messages were sent before the backward pass and in all."""

    def __init__(self) -> None:
        super().__init__(30)
        self.sent: list[list[int]] = []

    def on_before_backward(self, *args: Any) -> None:
        super().on_before_backward(*args)
        self.sent.append([len(CALLS)])

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end(*args, **kwargs)
        self.sent[-1].append(len(CALLS))
        CALLS.clear()

    @property
    def state_key(self) -> str:
        return "MemoryCallback"


CALLS: list[str] = []


def run_as_rank() -> dict[str, Any]:
    found = {}
    send = gather.all_gather_single
    gather.all_gather_single = lambda *args, **kwargs: (CALLS.append("gather"), send(*args, **kwargs))[1]
    learner = MetricLearner(nn.Linear(6, 8), ContrastiveLoss(0.2), num_features=8, embedding_dim=8)
    for name, module in {**{when: Learner(when) for when in ("late", "early", "changed")}, "learner": learner}.items():
        diary = Diary()
        trainer = Trainer(
            accelerator="cpu", strategy="ddp", devices=2, max_epochs=1, logger=False, callbacks=[diary],
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, Batches())
        found[name] = {"weights": module.state_dict(), "memory": diary.memory.state_dict(), "sent": diary.sent}
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(2, run_as_rank)


@pytest.mark.parametrize("when", ["early", "changed"])
def test_rows_and_weights_are_bit_for_bit_those_of_a_gather_after_the_step(ranks: list[Any], when: str) -> None:
    for rank in ranks:
        for part in ("memory", "weights"):
            for name, value in rank["late"][part].items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(rank[when][part][name])), name
    assert torch.equal(ranks[0][when]["memory"]["embeddings"], ranks[1][when]["memory"]["embeddings"])


@pytest.mark.parametrize("when", ["late", "early", "learner"])
def test_a_step_still_has_one_collective_and_a_second_one_only_when_a_batch_outgrows_all_before(
    ranks: list[Any], when: str
) -> None:
    in_all = [2, 1, 1, 2, 1, 1, 1]
    before = [0 if when == "late" else 1] * len(ROWS)
    for rank in ranks:
        assert rank[when]["sent"] == [list(pair) for pair in zip(before, in_all, strict=True)]
