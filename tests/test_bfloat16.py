"""Where bfloat16 products are taken to be fast."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from lightning_memdml import bfloat16, compat

CPU = torch.device("cpu")


@pytest.fixture
def processor_with_bf16(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A processor with AVX512-BF16, and oneDNN without a limit from the environment."""
    monkeypatch.setattr(compat, "has_avx512_bf16", lambda: True)
    for prefix in ("ONEDNN", "DNNL"):
        monkeypatch.delenv(f"{prefix}_MAX_CPU_ISA", raising=False)
    bfloat16.is_onednn_limited_below_bf16.cache_clear()
    yield monkeypatch
    bfloat16.is_onednn_limited_below_bf16.cache_clear()


@pytest.mark.parametrize("has", [True, False])
def test_a_cpu_has_them_with_avx512_bf16_only(has: bool, processor_with_bf16: pytest.MonkeyPatch) -> None:
    processor_with_bf16.setattr(compat, "has_avx512_bf16", lambda: has)
    assert bfloat16.has_fast_bf16_matmul(CPU) is has


def test_a_gpu_is_left_out(processor_with_bf16: pytest.MonkeyPatch) -> None:
    assert not bfloat16.has_fast_bf16_matmul(torch.device("cuda"))


@pytest.mark.parametrize(
    ("onednn", "dnnl", "fast"),
    [
        ("SSE41", None, False),
        ("AVX", None, False),
        ("AVX2", None, False),
        ("avx2", None, False),  # any case
        ("AVX2_VNNI", None, False),
        ("AVX2_VNNI_2", None, False),
        ("AVX512_CORE", None, False),
        ("AVX512_CORE_VNNI", None, False),
        ("AVX512_CORE_BF16", None, True),
        ("AVX512_CORE_AMX", None, True),
        ("AVX10_1_512", None, True),
        ("DEFAULT", None, True),
        ("no such value", None, True),  # no limit
        (None, "AVX2", False),  # the older name
        ("", "AVX2", False),  # empty is as unset
        ("DEFAULT", "AVX2", True),  # the newer name goes first
        ("AVX2", "DEFAULT", False),
    ],
)
def test_onednn_may_be_limited_to_older_instructions(
    onednn: str | None, dnnl: str | None, fast: bool, processor_with_bf16: pytest.MonkeyPatch
) -> None:
    """oneDNN then computes the product without these instructions, in up to 7 times that of a float32 one."""
    for name, value in (("ONEDNN_MAX_CPU_ISA", onednn), ("DNNL_MAX_CPU_ISA", dnnl)):
        if value is not None:
            processor_with_bf16.setenv(name, value)
    assert bfloat16.has_fast_bf16_matmul(CPU) is fast


@pytest.mark.skipif(not compat.has_avx512_bf16(), reason="needs a processor with AVX512-BF16")
@pytest.mark.parametrize(
    ("name", "limit"), [("ONEDNN_MAX_CPU_ISA", "avx2"), ("DNNL_MAX_CPU_ISA", "AVX512_CORE"), ("", "")]
)
def test_the_limit_is_that_of_onednn(name: str, limit: str, processor_with_bf16: pytest.MonkeyPatch) -> None:
    """In a process with this variable, oneDNN lists the kernels that it runs for a bfloat16 product."""
    if name:
        processor_with_bf16.setenv(name, limit)
    command = [sys.executable, "-c", "import torch; x = torch.ones(64, 64, dtype=torch.bfloat16); x @ x"]
    environment = {**os.environ, "ONEDNN_VERBOSE": "1"}
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    kernels = [line for line in lines if "exec,cpu,matmul" in line]
    uses_bf16 = any("avx512_core_bf16" in kernel or "amx" in kernel or "avx10" in kernel for kernel in kernels)
    assert bfloat16.has_fast_bf16_matmul(CPU) is uses_bf16
    assert uses_bf16 is (name == "")


@pytest.mark.parametrize(("attribute", "value"), [("enabled", False), ("is_available", lambda: False)])
def test_torch_may_be_built_without_onednn_or_told_not_to_use_it(
    attribute: str, value: object, processor_with_bf16: pytest.MonkeyPatch
) -> None:
    assert bfloat16.has_fast_bf16_matmul(CPU)
    with processor_with_bf16.context() as patch:
        patch.setattr(torch.backends.mkldnn, attribute, value)
        assert not bfloat16.has_fast_bf16_matmul(CPU)
    assert bfloat16.has_fast_bf16_matmul(CPU)
