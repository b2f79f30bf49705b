"""Which devices are taken to have fast bfloat16 products."""

from __future__ import annotations

import pytest
import torch

from lightning_memdml import bfloat16, compat


@pytest.mark.parametrize("has", [True, False])
def test_a_cpu_has_them_with_avx512_bf16_only(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "has_avx512_bf16", lambda: has)
    assert bfloat16.has_fast_bf16_matmul(torch.device("cpu")) is has


def test_a_gpu_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "has_avx512_bf16", lambda: True)
    assert not bfloat16.has_fast_bf16_matmul(torch.device("cuda"))
