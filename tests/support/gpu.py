"""What a step would cost on a GPU that is not here: launches, bytes and waits, counted with fake or CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_memdml.losses import row_ops
from lightning_memdml.memory import rows

aten = torch.ops.aten
# Operations whose result has a shape or a number that only the device knows.
WAITS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.bincount,
}  # fmt: skip
PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm}
# They launch nothing: they make views, or only reserve memory.
NO_LAUNCH = {aten.empty, aten.new_empty, aten.empty_like, aten.detach, aten.lift_fresh, aten.empty_strided}


class Count(TorchDispatchMode):
    """Counts what reaches the device.

    Attributes:
        launches: Operations that run a kernel.
        waits: Operations for which the host waits.
        from_host: Copies from the host to a GPU, which a CUDA graph cannot contain.
        bytes: Read and written by operations other than products and copies to and from the host.
        multiplications: Of products.
    """

    def __init__(self, smallest: int = 0) -> None:
        super().__init__()
        self.launches = self.waits = self.from_host = self.bytes = self.multiplications = 0
        self.smallest = smallest
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        given = [value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        made = [value for value in torch.utils._pytree.tree_leaves(out) if isinstance(value, Tensor)]
        masked = packet in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if packet in WAITS or masked:
            self.waits += 1
        if packet in (aten._to_copy, aten.copy_) and made[0].is_cuda and not all(value.is_cuda for value in given):
            self.from_host += 1
        if packet in NO_LAUNCH or func.is_view or not made:
            return out
        self.launches += 1
        self.names.append(str(packet))
        if packet in PRODUCTS:
            left, right = [value for value in args if isinstance(value, Tensor) and value.ndim >= 2][-2:]  # not `out`
            self.multiplications += left.numel() * right.shape[-1]
        elif max(value.numel() for value in (*given, *made)) >= self.smallest:
            self.bytes += sum(value.numel() * value.element_size() for value in (*given, *made))
        return out


def fakes_batched_products(fake_gpu: Any) -> bool:
    """Whether torch has a batched product of tensors that are not there, as `triton_blocks` needs: 2.10 has none."""
    with fake_gpu:
        factor = torch.empty(2, 2, 2, device="cuda", dtype=torch.float16)
        try:
            torch.bmm(factor, factor, out_dtype=torch.float32, out=torch.empty(2, 2, 2, device="cuda"))
        except RuntimeError:  # it then tries to compute one
            return False
    return True


@contextmanager
def like_a_gpu() -> Iterator[list[str]]:
    """Treat the CPU as a device that the host must not wait for. The list collects copies to the host."""
    copies: list[str] = []
    copy_to_host = Tensor.cpu

    def recorded(tensor: Tensor) -> Tensor:
        copies.append(str(tuple(tensor.shape)))
        return copy_to_host(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "cpu", recorded)
        for devices in (row_ops.HOST_DEVICES, rows.HOST_DEVICES):
            devices.discard("cpu")
        try:
            yield copies
        finally:
            for devices in (row_ops.HOST_DEVICES, rows.HOST_DEVICES):
                devices.add("cpu")
