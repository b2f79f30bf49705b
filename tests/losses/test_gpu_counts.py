"""What a step costs on a GPU, counted with tensors that are not there: launches, bytes between the products, waits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.gpu import Count, fakes_batched_products

import lightning_memdml as ml
from lightning_memdml.losses import streaming
from lightning_memdml.losses.backends import Backend
from lightning_memdml.losses.pair_loss import PrecomputedGradient

pytest.importorskip("triton", reason="comes with torch for CUDA")

from lightning_memdml.losses.backends.triton import elementwise, kernel, launching, merging, shared

KERNELS = {
    elementwise: ["_weigh", "_add_pieces"],
    kernel: ["add_negatives"],
    merging: ["_merge"],
    shared: ["_find", "_compare", "_gather"],
}
# Launches of a step, forward and backward, by each backend. Lower them when a change saves launches.
LAUNCHES: dict[tuple[int, int], dict[str, dict[Backend, int]]] = {
    (512, 1 << 20): {
        "contrastive": {"blocks": 448, "triton": 25, "triton_blocks": 156},
        "mined MS": {"blocks": 1059, "triton": 40, "triton_blocks": 171},
        "InfoNCE": {"blocks": 818, "triton": 28, "triton_blocks": 159},
        "soft": {"blocks": 1282, "triton": 36, "triton_blocks": 167},
    },
    (64, 65_536): {
        "contrastive": {"blocks": 76, "triton": 25, "triton_blocks": 32},
        "mined MS": {"blocks": 129, "triton": 40, "triton_blocks": 47},
        "InfoNCE": {"blocks": 105, "triton": 28, "triton_blocks": 35},
        "soft": {"blocks": 135, "triton": 36, "triton_blocks": 43},
    },
}


def loss(name: str, backend: Backend) -> ml.PairLoss:
    if name == "contrastive":
        return ml.ContrastiveLoss(backend=backend)
    if name == "mined MS":
        return ml.MultiSimilarityLoss(backend=backend)
    return ml.InfoNCELoss(backend=backend) if name == "InfoNCE" else ml.TripletLoss(soft=True, backend=backend)


class FakeKernel:
    """In place of a compiled kernel. It reads and writes its tensors once; references, for products, do not count."""

    def __init__(self, count: Count, num_references: int) -> None:
        self.count, self.num_references = count, num_references

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.count.launches += 1
            for value in args:
                is_memory = getattr(value, "dtype", None) == torch.float16 and len(value) == self.num_references
                if isinstance(value, torch.Tensor) and not is_memory:
                    self.count.bytes += value.numel() * value.element_size()

        return launch


def count_step(name: str, backend: Backend, rows: int, memory: int, fake_gpu: Any, patch: pytest.MonkeyPatch) -> Count:
    patch.setattr(launching, "device_of", lambda tensor: launching.Device(9, 132, 227 << 10))
    passes, finish = [], streaming.finish
    patch.setattr(streaming, "finish", lambda *args: (passes.append(1), finish(*args))[1])
    with fake_gpu, Count() as counted:
        for module, names in KERNELS.items():
            for of_triton in names:
                patch.setattr(module, of_triton, FakeKernel(counted, memory))
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


@pytest.mark.parametrize("backend", ["triton", "triton_blocks"])
@pytest.mark.parametrize("name", ["contrastive", "mined MS", "InfoNCE", "soft"])
@pytest.mark.parametrize(("rows", "memory"), LAUNCHES)
def test_a_kernel_saves_most_bytes_between_the_products(
    name: str, rows: int, memory: int, backend: Backend, fake_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton_blocks" and not fakes_batched_products(fake_gpu):
        pytest.skip(f"torch {torch.__version__} cannot fake a batched product of 16-bit numbers")
    most = LAUNCHES[rows, memory][name]
    blocks, by_kernel = (count_step(name, of, rows, memory, fake_gpu, monkeypatch) for of in ("blocks", backend))
    assert blocks.bytes >= 5 * by_kernel.bytes
    assert blocks.launches <= most["blocks"]
    assert by_kernel.launches <= most[backend]
    if backend == "triton_blocks":  # a similarity in float32 is read once, and a weight in 16 bits is written
        assert by_kernel.bytes >= 6 * rows * memory


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
