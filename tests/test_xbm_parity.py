"""The published setting of XBM against an independent loop, in a short form: `tests/xbm_parity.py` has the long one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from support.learners import IMAGES, learner, loader, trainer
from torch import Tensor
from xbm_parity import compare, relative_difference

from lightning_memdml import ContrastiveLoss, EmbeddingMemory, MemoryCallback

SHORT: dict[str, Any] = {"steps": 30, "size": 300, "start_step": 5, "rate": 1e-3}  # the memory is full at step 15


def test_losses_and_recall_are_those_of_the_loop() -> None:
    found = compare(**SHORT)
    assert relative_difference(found, 30) < 1e-4
    assert found["recall"]["package"] == pytest.approx(found["recall"]["loop"], abs=0.3)
    assert found["package"][5] > 1.9 * found["loop"][4], "the memory of the first step that stores is the batch"


@pytest.mark.parametrize("option", ["memory_includes_batch", "memory_excludes_own_image", "batch_excludes_own_image"])
def test_the_default_of_each_option_trains_otherwise(option: str) -> None:
    found = compare(**{**SHORT, "steps": 22}, **{option: option != "memory_includes_batch"})
    assert relative_difference(found, 22) > 5e-4


def rows(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.nn.functional.normalize(torch.randn(count, 4, generator=draw)),
        torch.arange(count),
        torch.arange(count),
    )


@pytest.mark.parametrize(("held", "kept"), [(0, 0), (3, 3), (6, 4)])
def test_a_memory_read_by_position_numbers_the_batch_alone(held: int, kept: int) -> None:
    """Stored rows of the same indices are unknown then, and the oldest make room."""
    memory, (embeddings, labels, _) = EmbeddingMemory(6), rows(2, 1)
    if held:
        memory.enqueue(*rows(held, 0))
    before = memory.state_dict()
    read = memory.read_with(embeddings, labels, None)
    assert read.indices.tolist() == [-1] * kept + [0, 1]
    assert torch.equal(read.embeddings[kept:], embeddings)
    assert read.labels.tolist() == [*range(held - kept, held), 0, 1]
    assert all(torch.equal(value, before[key]) for key, value in memory.state_dict().items() if key == "indices")


def test_the_callback_announces_which_batches_it_stores() -> None:
    seen = []

    class Look(Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append((trainer.global_step, pl_module.memory.stores_batch, len(pl_module.memory)))

    trainer(MemoryCallback(size=8, start_step=2), Look()).fit(learner(), loader())
    assert seen == [(0, False, 0), (1, False, 0), (2, True, 0), (3, True, 4)]


def test_a_memory_filled_first_is_met_with_the_batch_in_it() -> None:
    """In the first step that stores: rows of all images, and the batch, of which each row's own entry is left out."""

    class Recorded(ContrastiveLoss):
        def forward(self, *arguments: Any, **options: Any) -> Tensor:
            seen.append((len(arguments[3]), options["indices"].tolist(), options["ref_indices"].tolist()))
            return super().forward(*arguments, **options)

    seen: list[Any] = []
    options = {"memory_includes_batch": True, "memory_excludes_own_image": False}
    callback = MemoryCallback(size=20, start_step=1, prefill=True)
    trainer(callback, max_steps=3).fit(learner(memory_loss=Recorded(), **options), loader())
    own = list(range(4))
    assert seen == [(rows, own, [-1] * (rows - 4) + own) for rows in (IMAGES + 4, 20)]
