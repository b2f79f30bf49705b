"""Compiles what a step would launch on a GPU that is not here, in a process without Triton's interpreter."""

from __future__ import annotations

import re
import subprocess
import tempfile
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


def multiplications(built: Any, warps: int) -> int:
    """Return how many numbers the tensor cores of compute capability 9.0 multiply in the text of a kernel."""
    widths = re.findall(r"wgmma\.mma_async\S*\.m64n(\d+)k16", built.asm["ptx"])
    return sum(map(int, widths)) * 64 * 16 * warps // 4  # by 4 warps each


def stack_bytes(built: Any) -> int:
    """Return the bytes of each thread for what its registers do not hold."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", printed)
    assert found is not None, printed
    return int(found[1])
