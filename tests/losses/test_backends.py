"""A loss names its backend in one place, and where the backend does not apply, a warning names the reason."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lightning_memdml as ml
from lightning_memdml.losses import accumulators, streaming
from lightning_memdml.losses.backends import WITH_KERNEL, Backend
from lightning_memdml.losses.definition import Pairs
from lightning_memdml.losses.row_ops import HOST_DEVICES


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, r = (F.normalize(torch.randn(rows, 16, generator=generator), dim=1) for rows in (8, 300))
    return x, torch.arange(8), r, torch.arange(300) % 40


def test_auto_is_blocks() -> None:
    assert ml.ContrastiveLoss().backend == "auto"
    assert "auto" not in WITH_KERNEL


@pytest.mark.parametrize("kind", [ml.ContrastiveLoss, ml.InfoNCELoss, ml.TripletLoss, ml.DirectWeightLoss])
def test_an_unknown_backend_is_refused(kind: type[ml.PairLoss]) -> None:
    with pytest.raises(
        ValueError, match=r'^Expected `backend` to be "auto", .* or "triton_blocks" but got \'cuda\'\. '
    ):
        kind(backend="cuda")


def test_the_environment_chooses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_MEMDML_FUSED", "1")
    monkeypatch.setattr(streaming, "TRITON_DEVICES", {"cpu"})
    monkeypatch.setattr(streaming, "_warn_of_blocks", pytest.fail)
    ml.ContrastiveLoss()(*inputs())


@pytest.mark.parametrize("backend", ["triton", "triton_blocks"])
def test_triton_on_a_cpu_warns_and_computes_by_blocks(backend: Backend) -> None:
    expected = f'for `backend="{backend}"` but got references on cpu. Blocks are used instead: leave `backend` out'
    with pytest.warns(UserWarning, match=expected):
        value = ml.ContrastiveLoss(backend=backend)(*inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value == ml.ContrastiveLoss(backend="blocks")(*inputs())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_device_without_a_widening_product_widens_the_references(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Apple's MPS: the host must not wait for it, and `torch.mm` has no `out_dtype` there, as on a CPU."""
    x, y, r, ry = inputs()
    wanted = streaming.evaluate(ml.MultiSimilarityLoss(), Pairs(x, y, r.to(dtype).float(), ry))
    monkeypatch.setattr(accumulators, "add_product_in_16_bits", pytest.fail)
    HOST_DEVICES.discard("cpu")
    try:
        found = streaming.evaluate(ml.MultiSimilarityLoss(), Pairs(x, y, r.to(dtype), ry, max_shared=[100]))
    finally:
        HOST_DEVICES.add("cpu")
    torch.testing.assert_close(found, wanted)
