r"""Measures on one NVIDIA GPU, in about six minutes, what the package costs there, and what follows from it.

It compares the ways to compute a loss against a memory, `backend="blocks"`, `"triton"` and `"triton_blocks"`, with the
two bare matrix products in 16 bits (the floor) and with the same loss in plain torch, compiled. It also measures tiles
and block sizes, the replay of a step as a CUDA graph, storing rows, and retrieval. At the end it states which of the
rules in `gpu_rules.py` hold, and which backend should be the default for which width of rows.

`device` is the time on the GPU alone, with its L2 cache flushed and the host ahead; `wall` is that of one synchronised
call. Both are medians in milliseconds. `ratio` is `device` relative to the floor of the same size.

    python experiments/benchmarks/gpu_checks.py --output pair_loss_gpu.md
    python experiments/benchmarks/gpu_checks.py --device cpu --only losses enqueue  # tiny sizes, to see that it runs

First run the tests of the kernel: `python -m pytest tests/losses/test_triton_kernel.py`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import torch
from clocks import capture, time_step
from engine import set_block
from gpu_rules import BACKENDS, verdicts
from pair_loss import Inputs, Step, floors, make_inputs, step
from torch import Tensor
from torch.nn.functional import normalize

import lightning_memdml as ml
from lightning_memdml.losses import streaming
from lightning_memdml.losses.backends import Backend
from lightning_memdml.memory.shared_rows import SharedRowCounts
from lightning_memdml.retrieval import rank_queries

LOSSES: dict[str, Callable[..., ml.PairLoss]] = {
    "contrastive": ml.ContrastiveLoss,
    "multi-similarity, mined": ml.MultiSimilarityLoss,
    "InfoNCE": ml.InfoNCELoss,
    "triplet, soft": lambda backend: ml.TripletLoss(soft=True, backend=backend),
}
LARGE, SMALL = (512, 1 << 20), (64, 65_536)
SIZES = [(*LARGE, 512), (*LARGE, 128), (256, 65_536, 128), (*SMALL, 128), (*SMALL, 512)]
# Anchors, references, warps, stages and programs at once; the first ones are what the package takes.
TILES = {
    64: [(128, 128, 8, 3, 1), (64, 64, 4, 4, 2), (128, 64, 4, 3, 2)],
    128: [(128, 128, 8, 3, 1), (128, 64, 8, 3, 1), (64, 64, 4, 3, 2), (64, 64, 4, 2, 2)],
    256: [(64, 64, 4, 2, 2), (64, 64, 4, 3, 1), (64, 64, 8, 3, 1), (64, 32, 4, 3, 2), (128, 64, 8, 3, 1)],
    512: [(64, 64, 8, 2, 1), (64, 32, 8, 4, 1), (64, 32, 8, 3, 1)],
}
TINY = [(16, 512, 32)]  # on a CPU


class Checks:
    """The machine, the time that is left, and the rows measured so far.

    Args:
        device: `cuda` or `cpu`.
        budget: Seconds in all.
    """

    def __init__(self, device: str, budget: float) -> None:
        self.device, self.end = device, time.perf_counter() + budget
        self.on_gpu = device == "cuda"
        self.dtype = torch.float16 if self.on_gpu else torch.float32
        self.sizes = SIZES if self.on_gpu else TINY
        self.backends: tuple[Backend, ...] = BACKENDS if self.on_gpu else ("blocks",)
        self.rows: list[dict] = []

    @property
    def seconds_left(self) -> float:
        """How much of the budget is left."""
        return self.end - time.perf_counter()

    def add(self, section: str, **row: object) -> None:
        """Keep and print a row."""
        self.rows.append({"section": section, **row})
        print("  ".join(f"{key}={shown(value)}" for key, value in row.items()), flush=True)

    def clock(self, run: Step, rounds: int = 6) -> dict[str, float]:
        """Return the milliseconds of a step by each clock."""
        clocks = ("device", "wall") if self.on_gpu else ("cpu",)
        run()  # allocates and compiles
        taken = {name: [time_step(run, name) for _ in range(rounds if self.on_gpu else 1)] for name in clocks}
        return {name if name == "wall" else "device": 1e3 * statistics.median(taken[name]) for name in clocks}

    def inputs(self, regime: str, batch: int, memory: int, dim: int) -> Inputs:
        """Return a batch and a memory in 16 bits, made on the device."""
        x, y, r, ry = make_inputs(regime, batch, memory, dim, self.device)
        return x.detach().requires_grad_(), y, r.to(self.dtype), ry

    def floor(self, inputs: Inputs) -> float:
        """Return the milliseconds of the two bare products, the faster of the whole ones and of blocks."""
        return min(self.clock(run, 4)["device"] for run in floors(inputs, self.dtype))


def shown(value: object) -> str:
    """Return a number with three digits, and anything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def bounds_of(inputs: Inputs) -> tuple[int, ...]:
    """Return the bounds of the shared references that a memory of these rows gives."""
    counts = SharedRowCounts(len(inputs[3]))
    counts.update(np.stack([inputs[3].cpu().numpy(), np.arange(len(inputs[3]))]))
    return counts.bounds()


def masked(kind: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return a loss as most users would write it, with the product in 16 bits."""

    def contrastive(x: Tensor, y: Tensor, m: Tensor, my: Tensor) -> Tensor:
        s, same = (x.to(m.dtype) @ m.T).float(), y[:, None] == my
        return (((1 - s) * same).sum() + (s * (~same & (s > 0.5))).sum()) / len(x)

    def mined(x: Tensor, y: Tensor, m: Tensor, my: Tensor) -> Tensor:
        s, same = (x.to(m.dtype) @ m.T).float(), y[:, None] == my
        least = s.detach().masked_fill(~same, 2.0).amin(1, keepdim=True)
        largest = s.detach().masked_fill(same, -2.0).amax(1, keepdim=True)
        positive, negative = same & (s - 0.1 < largest), ~same & (s + 0.1 > least)
        terms = torch.log1p((torch.exp(-2 * (s - 0.5)) * positive).sum(1)) / 2
        return (terms + torch.log1p((torch.exp(50 * (s - 0.5)) * negative).sum(1)) / 50).mean()

    return contrastive if kind == "contrastive" else mined


def gradient(loss: ml.PairLoss, x: Tensor, *others: Tensor) -> Tensor:
    """Return the gradient of the anchors in float64."""
    x = x.detach().clone().requires_grad_()
    loss(x, *others).backward()
    assert x.grad is not None
    return x.grad.double()


def error_of(make: Callable[..., ml.PairLoss], backend: Backend, inputs: Inputs) -> float:
    """Return the error of a gradient, relative to that of blocks in float64, for 64 anchors."""
    (x, y, r, ry), dtype = inputs, inputs[2].dtype
    x, y = x.detach()[:64].to(dtype), y[:64]
    wanted = gradient(make(backend="blocks"), x.double(), y, r.double(), ry)
    found = gradient(make(backend=backend), x.float(), y, r, ry)
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))


def first_line(error: Exception) -> str:
    """Return what a row tells of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:100]


# ------------------------------------------------------------------------------------------------ what is measured
def ceilings(checks: Checks) -> None:
    """What the GPU can do: copies and a large product in 16 bits."""
    size = 1 << (28 if checks.on_gpu else 20)
    source = torch.empty(size, device=checks.device)
    target = torch.empty_like(source)
    copied = checks.clock(lambda: target.copy_(source))["device"]
    side = 8192 if checks.on_gpu else 128
    square = torch.randn(side, side, device=checks.device).to(checks.dtype)
    product = checks.clock(lambda: square @ square)["device"]
    checks.add("ceilings", copy_TB_per_s=8 * size / copied / 1e9, product_TFLOP_per_s=2 * side**3 / product / 1e9)


def losses(checks: Checks) -> None:
    """Each loss by each backend, against the floor, and the error of its gradient."""
    for batch, memory, dim in checks.sizes:
        for regime in ("trained", "untrained") if (batch, memory) == LARGE else ("trained",):
            if checks.seconds_left < 60:
                return
            inputs = checks.inputs(regime, batch, memory, dim)
            bounds, floor = bounds_of(inputs), checks.floor(inputs)
            size = {"batch": batch, "memory": memory, "dim": dim, "regime": regime}
            checks.add("losses", **size, method="floor", ratio=1.0, device=floor)
            for name, make in LOSSES.items():
                for backend in checks.backends:
                    named = {**size, "method": name, "backend": backend}
                    try:
                        taken = checks.clock(step(make(backend=backend), inputs, max_shared=bounds))
                        row = {"ratio": taken["device"] / floor, **taken}
                        if memory <= SMALL[1]:
                            row["error"] = error_of(make, backend, inputs)
                    except Exception as error:  # of Triton's compiler, too: the other backends are still measured
                        row = {"failed": first_line(error)}
                    checks.add("losses", **named, **row)


def graphs(checks: Checks) -> None:
    """The replay of a step as a CUDA graph."""
    for batch, memory, dim in (checks.sizes[0], checks.sizes[-2]) if checks.on_gpu else ():
        inputs = checks.inputs("trained", batch, memory, dim)
        bounds = bounds_of(inputs)
        for name, make in LOSSES.items():
            for backend in checks.backends:
                size = {"batch": batch, "memory": memory, "dim": dim, "method": name, "backend": backend}
                try:
                    replay = capture(step(make(backend=backend), inputs, max_shared=bounds))
                except Exception as error:
                    checks.add("graphs", **size, failed=first_line(error))
                    torch.cuda.synchronize()
                    continue
                checks.add("graphs", **size, **checks.clock(replay))


def blocks(checks: Checks) -> None:
    """How many similarities a block should have."""
    inputs = checks.inputs("trained", *checks.sizes[0])
    bounds, before = bounds_of(inputs), streaming.GPU_BLOCK_ELEMENTS if checks.on_gpu else streaming.BLOCK_ELEMENTS
    try:
        for backend in (name for name in checks.backends if name != "triton"):
            for bits in range(20, 27):
                if checks.seconds_left < 30 and checks.on_gpu:
                    return
                set_block(1 << bits, checks.device)
                run = step(ml.ContrastiveLoss(backend=backend), inputs, max_shared=bounds)
                checks.add("blocks", backend=backend, elements=f"2^{bits}", **checks.clock(run, 4))
    finally:
        set_block(before, checks.device)


def tiles(checks: Checks) -> None:
    """The tiles of the kernel: anchors, references, warps, stages and programs that run on a multiprocessor at once."""
    if not checks.on_gpu:
        return
    from lightning_memdml.losses.backends.triton import kernel

    before = kernel.TILES
    try:
        for (batch, memory), dim in ((LARGE, 64), (LARGE, 128), ((64, 1 << 20), 256), (LARGE, 512)):
            inputs = checks.inputs("trained", batch, memory, dim)
            bounds, floor = bounds_of(inputs), checks.floor(inputs)
            for numbers, name in product(TILES[dim], ("contrastive", "InfoNCE")):
                if checks.seconds_left < 30:
                    return
                kernel.TILES = {dim: [kernel.Tiles(*numbers)]}
                row = {"batch": batch, "dim": dim, "tiles": numbers, "method": name}
                try:
                    taken = checks.clock(step(LOSSES[name](backend="triton"), inputs, max_shared=bounds), 4)
                    checks.add("tiles", **row, ratio=taken["device"] / floor, **taken)
                except Exception as error:  # of tiles that do not fit
                    checks.add("tiles", **row, failed=first_line(error))
    finally:
        kernel.TILES = before


def lists(checks: Checks) -> None:
    """The kernel for losses with a threshold: with lists of the references above it, and without."""
    if not checks.on_gpu:
        return
    from lightning_memdml.losses.backends.triton import kernel

    try:
        for dim, regime in product((128, 512), ("trained", "untrained")):
            inputs = checks.inputs(regime, *LARGE, dim)
            bounds = bounds_of(inputs)
            for name, has_lists in product(("contrastive", "multi-similarity, mined"), (True, False)):
                if checks.seconds_left < 30:
                    return
                kernel.LISTS = has_lists
                row = {"dim": dim, "regime": regime, "method": name, "lists": has_lists}
                try:
                    run = step(LOSSES[name](backend="triton"), inputs, max_shared=bounds)
                    checks.add("lists", **row, **checks.clock(run, 4))
                except Exception as error:  # of Triton's compiler, too
                    checks.add("lists", **row, failed=first_line(error))
    finally:
        kernel.LISTS = True


def rivals(checks: Checks) -> None:
    """The same losses in plain torch, compiled on a GPU."""
    for batch, memory, dim in checks.sizes[:2]:
        inputs = checks.inputs("trained", batch, memory, dim)
        floor = checks.floor(inputs)
        for kind in ("contrastive", "multi-similarity, mined"):
            if checks.seconds_left < 30:
                return
            function = masked(kind)
            run = step(torch.compile(function, dynamic=False) if checks.on_gpu else function, inputs)
            taken = checks.clock(run, 4)
            row = {"batch": batch, "memory": memory, "dim": dim, "method": kind, "ratio": taken["device"] / floor}
            checks.add("rivals", **row, **taken)


def enqueue(checks: Checks) -> None:
    """Storing a batch in a full memory, and how often the host waits for the GPU meanwhile."""
    for rows, batch in ((1 << 20, 512), (65_536, 64)) if checks.on_gpu else ((256, 8),):
        memory = ml.EmbeddingMemory(rows, checks.dtype)
        generator = torch.Generator(checks.device).manual_seed(0)
        for count in (rows, batch):
            z = normalize(torch.randn(count, 128, generator=generator, device=checks.device), dim=1)
            y = torch.randint(0, rows // 8, (count,), generator=generator, device=checks.device)
            memory.enqueue(z, y, y)
        waits = 0
        if checks.on_gpu:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                memory.enqueue(z, y, y)
                torch.cuda.set_sync_debug_mode("default")
            waits = sum("synchroniz" in str(warning.message) for warning in caught)
        checks.add("enqueue", memory=rows, batch=batch, waits=waits, **checks.clock(lambda: memory.enqueue(z, y, y)))  # noqa: B023


def bounds(checks: Checks) -> None:
    """What a higher bound of the references that share a class with the batch costs."""
    inputs = checks.inputs("trained", *checks.sizes[0])
    for bound in (1 << 13, 1 << 16, 1 << 17, 1 << 19) if checks.on_gpu else (64,):
        run = step(ml.ContrastiveLoss(backend="triton" if checks.on_gpu else "blocks"), inputs, max_shared=bound)
        checks.add("bounds", max_shared=bound, **checks.clock(run, 3))


def retrieval(checks: Checks) -> None:
    """Exact ranking of a set by itself."""
    sets = ((60_502, 11_316, 128), (60_502, 11_316, 512), (500_000, 93_500, 128)) if checks.on_gpu else ((300, 60, 16),)
    for rows, classes, dim in sets:
        if checks.seconds_left < 20:
            return
        generator = torch.Generator(checks.device).manual_seed(0)
        labels = torch.randint(0, classes, (rows,), generator=generator, device=checks.device)
        centres = normalize(torch.randn(classes, dim, generator=generator, device=checks.device), dim=1)
        noise = torch.randn(rows, dim, generator=generator, device=checks.device)
        embeddings = normalize(centres[labels] + noise * 1.1 / dim**0.5, dim=1)
        taken = checks.clock(lambda: rank_queries(embeddings, labels), 1)  # noqa: B023
        checks.add("retrieval", rows=rows, dim=dim, **taken)


#: What is measured, in this order, and the seconds that must be left to start it.
SECTIONS: dict[str, tuple[Callable[[Checks], None], float]] = {
    "ceilings": (ceilings, 5), "losses": (losses, 60), "graphs": (graphs, 40), "lists": (lists, 40),
    "rivals": (rivals, 60), "enqueue": (enqueue, 15), "tiles": (tiles, 60), "blocks": (blocks, 30),
    "bounds": (bounds, 20), "retrieval": (retrieval, 30),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ what is written
def report(checks: Checks) -> str:
    """Return the rules, and a Markdown table for each section."""
    where = torch.cuda.get_device_name() if checks.on_gpu else f"a CPU ({platform.machine()})"
    lines = [f"{where}, torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}.", ""]
    lines += [f"- {line}" for line in (verdicts(checks.rows) if checks.on_gpu else ["Sizes too small for any rule."])]
    for name, (section, _) in SECTIONS.items():
        rows = [{key: value for key, value in row.items() if key != "section"} for row in checks.rows
                if row["section"] == name]  # fmt: skip
        columns = list(dict.fromkeys(key for row in rows for key in row))
        if rows:
            lines += ["", f"## {name}", "", section.__doc__ or "", "", f"| {' | '.join(columns)} |"]
            lines += [f"|{'---|' * len(columns)}"]
            lines += [f"| {' | '.join(shown(row.get(column, '')) for column in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="on a CPU the sizes are tiny")
    parser.add_argument("--budget", type=float, default=360, help="seconds; sections that no longer fit are left out")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="only these sections")
    parser.add_argument(
        "--output", type=Path, help="a Markdown file for rules and tables; the rows go to .jsonl beside"
    )
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("Expected a CUDA GPU but torch finds none. Pass `--device cpu` to see that the script runs.")
    checks = Checks(options.device, options.budget)
    for name, (section, seconds) in SECTIONS.items():
        if options.only and name not in options.only:
            continue
        print(f"\n{name} ({checks.seconds_left:.0f} s left)", flush=True)
        if checks.seconds_left < seconds:
            print("left out")
            continue
        section(checks)
        if options.output:  # after each section, since a later one may fail
            options.output.write_text(report(checks))
            lines = [json.dumps(row) + "\n" for row in checks.rows]
            options.output.with_suffix(".jsonl").write_text("".join(lines))
    print(f"\n{report(checks)}")


if __name__ == "__main__":
    main()
