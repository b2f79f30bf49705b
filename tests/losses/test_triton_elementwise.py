"""How `triton_blocks` cuts blocks into pieces, what it keeps, and what it compiles to. What it computes is tested in
`test_triton_kernel.py`, together with the other backend of Triton."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.children import run_python
from support.gpu import fakes_batched_products

import lightning_memdml as ml

pytest.importorskip("triton", reason="comes with torch for CUDA")

from lightning_memdml.losses.backends.triton import elementwise, launching
from lightning_memdml.losses.backends.triton.codegen import generate_terms
from lightning_memdml.losses.backends.triton.elementwise import Pieces, choose_pieces


@settings(deadline=None)
@given(
    rows=st.integers(1, 1 << 17), dim=st.integers(1, 5000), references=st.integers(1, 1 << 22),
    processors=st.integers(1, 200),
)  # fmt: skip
def test_every_reference_is_in_one_piece(rows: int, dim: int, references: int, processors: int) -> None:
    pieces = choose_pieces(rows, dim, references, processors)
    blocks = pieces.cut(references)
    assert [block.start for block, _ in blocks] == [0, *(block.stop for block, _ in blocks[:-1])]
    assert blocks[-1][0].stop == references
    for block, number in blocks:
        assert number <= pieces.number <= elementwise.MOST_PIECES
        assert (block.stop - block.start) % number == 0
        assert (block.stop - block.start) // number <= pieces.length <= elementwise.LONGEST_PIECE
        most = max(elementwise.SHORTEST_PIECE * rows, elementwise.GPU_BLOCK_ELEMENTS)
        assert rows * (block.stop - block.start) <= max(most, rows * pieces.length)
    assert all(block.start % elementwise.SHORTEST_PIECE == 0 for block, _ in blocks), "reads of 16 bytes are aligned"


def test_pieces_keep_the_processors_busy() -> None:
    """132 processors, as an H100 has: about as many results of 64 x 128 numbers in the second product."""
    assert choose_pieces(512, 128, 1 << 20, 132) == Pieces(length=2048, number=16)
    assert choose_pieces(512, 512, 1 << 20, 132) == Pieces(length=8192, number=4)
    assert choose_pieces(64, 128, 1 << 16, 132) == Pieces(length=512, number=128)
    assert choose_pieces(64, 512, 1 << 16, 132) == Pieces(length=2048, number=32)
    assert choose_pieces(1, 1, 1 << 24, 132) == Pieces(length=8192, number=256)
    assert choose_pieces(64, 128, 100, 132) == Pieces(length=512, number=1)


@pytest.fixture
def faked(fake_gpu: Any) -> Any:
    if not fakes_batched_products(fake_gpu):
        pytest.skip(f"torch {torch.__version__} cannot fake a batched product of 16-bit numbers")
    return fake_gpu


class Recorded:
    """In place of a kernel: keeps what it is given."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: self.launches.append(args)


@pytest.mark.parametrize(("dim", "megabytes"), [(128, 114), (512, 139), (2048, 252)])
def test_all_blocks_share_their_memory(dim: int, megabytes: int, faked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weigh, add = Recorded(), Recorded()
    monkeypatch.setattr(elementwise, "_weigh", weigh)
    monkeypatch.setattr(elementwise, "_add_pieces", add)
    monkeypatch.setattr(launching, "device_of", lambda tensor: launching.Device(9, 132, 227 << 10))
    loss = ml.ContrastiveLoss()
    with faked:
        x, r = torch.empty(512, dim, device="cuda"), torch.empty(1 << 20, dim, device="cuda", dtype=torch.float16)
        shared = torch.empty(1 << 20, device="cuda", dtype=torch.bool)
        states = elementwise.launch(loss, generate_terms(loss, (), 512), x, r, shared, with_gradient=True)
    assert states.shape == (32, 512, 3 + dim), "one for each block"
    assert len(weigh.launches) == 32
    for place, size in ((0, 4 << 24), (1, 2 << 24)):  # similarities and weights
        storages = [args[place].untyped_storage() for args in weigh.launches]
        assert {storage._cdata for storage in storages} == {storages[0]._cdata}
        assert storages[0].nbytes() == size
    used = [value.untyped_storage() for args in (*weigh.launches, *add.launches) for value in args
            if isinstance(value, torch.Tensor)]  # fmt: skip
    given = {tensor.untyped_storage()._cdata for tensor in (x, r, shared)}
    own = {storage._cdata: storage.nbytes() for storage in used if storage._cdata not in given}
    assert round(sum(own.values()) / 1e6) == megabytes


COMPILE = """
import json
import lightning_memdml as ml
from support.compiling import compile_only, compile_step
from lightning_memdml.losses.backends.triton import elementwise, merging, shared

def report(name, grid, options, built):
    if name in ("_weigh", "_add_pieces"):
        moved = [built.asm["ptx"].count(f"{operation}.global.v4.b32") for operation in ("ld", "st")]
        print(json.dumps([name, grid, "scf.for" in built.asm["ttir"], *moved, options.get("gathered")]))

names = {elementwise: ["_weigh", "_add_pieces"], merging: ["_merge"], shared: ["_find", "_compare", "_gather"]}
compile_only(names, report)
backend = "triton_blocks"
compile_step(ml.MultiSimilarityLoss(backend=backend), 80, 163, 128, memory=1 << 18)
compile_step(ml.HybridLoss(ml.SupConLoss(), ml.MarginLoss(), backend=backend), 90, 227, 256, memory=(1 << 17) + 77)
compile_step(ml.ContrastiveLoss(backend=backend), 90, 227, 1024, memory=1 << 17)
compile_step(ml.TripletLoss(soft=True, backend=backend), 90, 227, 128, rows=64, memory=1 << 16)
compile_step(ml.CircleLoss(backend=backend), 100, 227, 2048, rows=64, memory=1 << 16)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for CUDA")
@pytest.mark.usefixtures("faked")
def test_the_kernels_compile_for_devices_that_are_not_here() -> None:
    """With fake tensors, whatever needs the content of a device's tensor raises; so the launches do not wait for it."""
    done = run_python("-c", COMPILE, env={"TRITON_INTERPRET": None})
    launches = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in launches] == ["_weigh", "_add_pieces"] * (len(launches) // 2)
    assert not any(loop for _, _, loop, *_ in launches), "a similarity is read once"
    weighed = [launch for launch in launches if launch[0] == "_weigh"]
    plain = [grid for _, grid, *_, gathered in weighed if not gathered]
    assert plain[:8] == 8 * [[512, 16]], "512 anchors, 32,768 references in pieces of 2,048"
    hybrid = 4 * [[512, 8]] + [[512, 1]]  # 77 references are left over
    assert plain[8:18] == 2 * hybrid
    assert plain[18:] == [*(4 * [[512, 4]]), [64, 128], [64, 8]]
    # All but the rest of 77, and the second part of the hybrid, which writes no weights, and short pieces.
    assert [reads > 0 for _, _, _, reads, *_ in weighed].count(False) == 2
    assert all(writes > 0 for _, _, _, _, writes, _ in weighed[:9]), "16 bytes at once"
