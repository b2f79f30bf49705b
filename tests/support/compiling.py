"""Compiles what a step would launch on a GPU that is not here, in a process without Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import lightning_memdml as ml
from lightning_memdml.losses import streaming
from lightning_memdml.losses.backends.triton import launching
from lightning_memdml.losses.definition import Pairs

Report = Callable[[str, tuple[int, ...], dict[str, Any], Any], None]


class Driver:
    """Of a GPU of this compute capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # by whose number Triton remembers what it compiled

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """In place of a kernel: compiles it at each launch, and reports name, grid, options and what was compiled."""

    def __init__(self, kernel: Any, report: Report) -> None:
        self.kernel, self.report = kernel, report

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            mocked = [triton.MockTensor(value.dtype) if isinstance(value, Tensor) else value for value in args]
            self.report(self.kernel.__name__, grid, options, self.kernel.warmup(*mocked, grid=grid, **options))

        return launch


def compile_only(kernels: dict[ModuleType, list[str]], report: Report) -> None:
    """Replace the kernels of modules."""
    for module, names in kernels.items():
        for name in names:
            setattr(module, name, Compiled(getattr(module, name), report))


def compile_step(
    loss: ml.PairLoss, capability: int, kilobytes: int, dim: int, rows: int = 512, memory: int = 1 << 20
) -> None:
    """Run a step of fake tensors, which compiles what it would launch."""
    driver.set_active(Driver(capability))
    launching.device_of = lambda tensor: launching.Device(capability // 10, 132, kilobytes << 10)
    with FakeTensorMode():
        x, r = torch.empty(rows, dim, device="cuda"), torch.empty(memory, dim, device="cuda", dtype=torch.bfloat16)
        y, ry = (torch.empty(number, dtype=torch.int64, device="cuda") for number in (rows, memory))
        value, gradient = streaming.evaluate(loss, Pairs(x, y, r, ry, y, ry, max_shared=[512]))
    assert (value.shape, gradient.shape) == ((rows,), (rows, dim))
