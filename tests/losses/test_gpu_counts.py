"""What a step costs on a GPU, counted with tensors that are not there: launches, bytes between the products, waits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.gpu import Count

import lightning_memdml as ml
from lightning_memdml.losses import streaming
from lightning_memdml.losses.backends import Backend
from lightning_memdml.losses.pair_loss import PrecomputedGradient

pytest.importorskip("triton", reason="comes with torch for CUDA")

from lightning_memdml.losses.backends.triton import kernel, launching, merging, shared

KERNELS = {kernel: ["_add_negatives"], merging: ["_merge"], shared: ["_find", "_compare", "_gather"]}
# Launches of a step, forward and backward, by blocks and with the kernels. Lower them when a change saves launches.
LAUNCHES = {
    (512, 1 << 20): {"contrastive": (448, 25), "mined MS": (1059, 40), "InfoNCE": (818, 28), "soft": (1282, 36)},
    (64, 65_536): {"contrastive": (76, 25), "mined MS": (129, 40), "InfoNCE": (105, 28), "soft": (135, 36)},
}


def loss(name: str, backend: Backend) -> ml.PairLoss:
    if name == "contrastive":
        return ml.ContrastiveLoss(backend=backend)
    if name == "mined MS":
        return ml.MultiSimilarityLoss(backend=backend)
    return ml.InfoNCELoss(backend=backend) if name == "InfoNCE" else ml.TripletLoss(soft=True, backend=backend)


class FakeKernel:
    """In place of a compiled kernel. It reads and writes its tensors once, and the references for products."""

    def __init__(self, count: Count) -> None:
        self.count = count

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.count.launches += 1
            tensors = [value for value in args if isinstance(value, torch.Tensor) and value.dtype != torch.float16]
            self.count.bytes += sum(value.numel() * value.element_size() for value in tensors)

        return launch


def count_step(name: str, backend: Backend, rows: int, memory: int, fake_gpu: Any, patch: pytest.MonkeyPatch) -> Count:
    patch.setattr(launching, "device_of", lambda tensor: launching.Device(9, 132, 227 << 10))
    passes, finish = [], streaming.finish
    patch.setattr(streaming, "finish", lambda *args: (passes.append(1), finish(*args))[1])
    with fake_gpu, Count() as counted:
        for module, names in KERNELS.items():
            for of_triton in names:
                patch.setattr(module, of_triton, FakeKernel(counted))
        x = torch.empty(rows, 128, device="cuda").requires_grad_()
        r = torch.empty(memory, 128, device="cuda", dtype=torch.float16)
        y, ry = (torch.empty(n, dtype=torch.int64, device="cuda") for n in (rows, memory))
        # Twice the references of a batch in the classes of Stanford Online Products, rounded up.
        bound = [1 << (16 * rows - 1).bit_length()]
        of_step = loss(name, backend)
        for _ in range(2):  # the first step copies constants to the device
            counted.launches = counted.bytes = counted.from_host = 0
            passes.clear()
            value = of_step(x, y, r, ry, indices=y, ref_indices=ry, max_shared=bound)
            node: Any = SimpleNamespace(saved_tensors=value.grad_fn.saved_tensors)
            with torch.no_grad():  # autograd would ask the driver of the GPU
                PrecomputedGradient.backward(node, torch.ones_like(value))
    patch.undo()
    assert len(passes) == 1
    assert (counted.waits, counted.from_host) == (0, 0), "or the step could not be captured as a CUDA graph"
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


GRAPHED = {
    "binomial deviance": ml.BinomialDevianceLoss(),
    "circle": ml.CircleLoss(),
    "lifted structure": ml.LiftedStructureLoss(),
    "margin": ml.MarginLoss(),
    "normalised, hardest": ml.DirectWeightLoss(normalize="sum", hardest_negatives=9, dropped_positives=1),
    "piecewise": ml.DirectWeightLoss(negative=ml.Piecewise([0.0, 1.0], [0.0, 1.0])),
    "soft triplet and SupCon": ml.HybridLoss(ml.TripletLoss(soft=True), ml.SupConLoss()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", GRAPHED)
def test_a_step_that_ran_once_can_be_captured(name: str, dtype: torch.dtype, fake_gpu: Any) -> None:
    """Nothing is read from the device, nothing is copied to it, and no shape depends on its numbers."""
    with fake_gpu, Count() as counted:
        x, r = torch.empty(64, 16, device="cuda"), torch.empty(65_536, 16, device="cuda", dtype=dtype)
        y, ry = (torch.empty(rows, dtype=torch.int64, device="cuda") for rows in (64, 65_536))
        for _ in range(2):
            counted.from_host = 0
            GRAPHED[name](x, y, r, ry, indices=y, ref_indices=ry, max_shared=1024)
    assert (counted.waits, counted.from_host) == (0, 0)
