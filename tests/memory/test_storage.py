"""How embeddings are stored: by device with `auto`, with a stated error, and without an effect on scores."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

import lightning_memdml as ml
from lightning_memdml.memory import rows
from lightning_memdml.retrieval import rank_queries


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "FLOAT16_DEVICES", {"cpu"})


def memories() -> list[ml.EmbeddingMemory | ml.InstanceMemory]:
    return [
        ml.EmbeddingMemory(9, "auto"),
        ml.InstanceMemory(9, dtype="auto"),
        ml.MemoryCallback(9, dtype="auto").memory,
    ]


def test_auto_is_float32_on_a_cpu() -> None:
    for memory in memories():
        memory.enqueue(torch.eye(3), torch.arange(3), torch.arange(3))
        assert memory.dtype is memory.read().embeddings.dtype is torch.float32


@pytest.mark.usefixtures("on_a_gpu")
def test_auto_is_float16_on_a_gpu() -> None:
    for memory in memories():
        memory.enqueue(torch.eye(3), torch.arange(3), torch.arange(3))
        assert memory.dtype is memory.read().embeddings.dtype is torch.float16


def test_rows_that_move_to_another_device_are_stored_as_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the rows of a checkpoint, which are restored on a CPU."""
    memory = ml.EmbeddingMemory(9, "auto")
    memory.enqueue(torch.eye(3), torch.arange(3))
    monkeypatch.setattr(rows, "FLOAT16_DEVICES", {"meta"})
    memory.to("meta")
    assert memory.read().embeddings.dtype is torch.float16


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("dim", [8, 128, 512])
def test_similarities_change_by_no_more_than_is_stated(dtype: torch.dtype, bound: float, dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, r = (normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=1) for n in (200, 2000))
    r[:200] = x  # where the errors of all numbers have one sign, they add up
    memory = ml.EmbeddingMemory(2000, dtype)
    memory.enqueue(r, torch.zeros(2000, dtype=torch.int64))
    stored = memory.read().embeddings.double()
    assert (x @ r.T - x @ stored.T).abs().max() <= bound + 1e-6


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("loss", [ml.ContrastiveLoss(0.5), ml.MultiSimilarityLoss(), ml.SupConLoss()])
def test_training_against_float16_rows_gives_the_same_scores(loss: ml.PairLoss) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(60, 32, generator=generator)
    labels = torch.arange(1200) % 60
    images = centres[labels] + 2.0 * torch.randn(1200, 32, generator=generator)
    scores = []
    for dtype in (torch.float32, "auto"):
        torch.manual_seed(0)
        network, memory = nn.Linear(32, 16), ml.EmbeddingMemory(512, dtype)
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
        for step in range(60):
            chosen = torch.arange(64) * 7 + 64 * step
            z, y = normalize(network(images[chosen % 1200]), dim=1), labels[chosen % 1200]
            if len(memory):
                optimizer.zero_grad()
                loss(z, y, *memory.read()[:2]).backward()
                optimizer.step()
            memory.enqueue(z, y)
        scores.append(rank_queries(normalize(network(images), dim=1).detach(), labels).scores())
    for name in ("recall_at_1", "map_at_r"):
        assert abs(scores[0][name] - scores[1][name]) <= 0.005, name
