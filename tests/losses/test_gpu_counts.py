"""What a step costs on a GPU, counted with tensors that are not there: launches, bytes between the products, waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.gpu import Count

import lightning_memdml as ml
from lightning_memdml.losses import streaming
from lightning_memdml.losses.backends import Backend
from lightning_memdml.losses.definition import Pairs

pytest.importorskip("triton", reason="comes with torch for CUDA")

from lightning_memdml.losses.backends.triton import kernel

# Launches of a step by blocks and with the kernel. Lower the numbers when a change saves launches.
LAUNCHES = {
    (512, 1 << 20): {"contrastive": (444, 66), "mined MS": (1055, 115), "InfoNCE": (814, 94), "soft": (1280, 105)},
    (64, 65_536): {"contrastive": (72, 66), "mined MS": (125, 115), "InfoNCE": (101, 94), "soft": (133, 105)},
}


def loss(name: str, backend: Backend) -> ml.PairLoss:
    if name == "contrastive":
        return ml.ContrastiveLoss(backend=backend)
    if name == "mined MS":
        return ml.MultiSimilarityLoss(backend=backend)
    return ml.InfoNCELoss(backend=backend) if name == "InfoNCE" else ml.TripletLoss(soft=True, backend=backend)


class FakeKernel:
    """In place of the compiled kernel, in which nothing is written to memory between the products."""

    def __init__(self, count: Count) -> None:
        self.count = count

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.count.launches += 1

        return launch


def count_step(name: str, backend: Backend, rows: int, memory: int, fake_gpu: Any, patch: pytest.MonkeyPatch) -> Count:
    patch.setattr(kernel, "_device", lambda device: kernel._Device(9, 132, 227 << 10))
    passes, add = [], streaming.add_plain_negatives
    patch.setattr(streaming, "add_plain_negatives", lambda *args: (passes.append(1), add(*args)))
    with fake_gpu, Count() as counted:
        patch.setattr(kernel, "_add_negatives", FakeKernel(counted))
        x, r = torch.empty(rows, 128, device="cuda"), torch.empty(memory, 128, device="cuda", dtype=torch.float16)
        y, ry = (torch.empty(n, dtype=torch.int64, device="cuda") for n in (rows, memory))
        # Twice the references of a batch in the classes of Stanford Online Products, rounded up.
        bound = [1 << (16 * rows - 1).bit_length()]
        streaming.evaluate(loss(name, backend), Pairs(x, y, r, ry, y, ry, max_shared=bound))
    patch.undo()
    assert len(passes) == 1
    assert counted.waits == 0
    return counted


@pytest.mark.parametrize("name", ["contrastive", "mined MS", "InfoNCE", "soft"])
@pytest.mark.parametrize(("rows", "memory"), LAUNCHES)
def test_the_kernel_saves_most_bytes_between_the_products(
    name: str, rows: int, memory: int, fake_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = count_step(name, "blocks", rows, memory, fake_gpu, monkeypatch)
    fused = count_step(name, "triton", rows, memory, fake_gpu, monkeypatch)
    assert blocks.bytes >= 5 * fused.bytes
    most = LAUNCHES[rows, memory][name]
    assert blocks.launches <= most[0]
    assert fused.launches <= most[1]
