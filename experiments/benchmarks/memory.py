"""Times what `MemoryCallback` adds to a training step, without the loss, against a ResNet-50 step on the same machine.

Gather, checks, enqueue and bookkeeping of `on_train_batch_end`, called as the Trainer does, on one rank and on two
(gloo, two processes); what a momentum encoder adds apart. Times are CPU time on one thread, the mean over enough steps
to go round the memory several times, least of the rounds. The ResNet-50 step (forward, backward, SGD) is timed with
`--images` images and taken times `batch / images`. Counted as well: collectives of torch.distributed per step, and
bytes that a step allocates, of which a copy of the memory would be most.

    python experiments/benchmarks/memory.py --batch 64 --memory 65536 --dim 128
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchvision.models import resnet50

from lightning_memdml import InstanceMemory, MemoryCallback, MomentumEncoder

Step = Callable[[], object]
KINDS = ("FIFO", "FIFO, float16", "instance")


def make_callback(kind: str, rows: int) -> MemoryCallback:
    """Return a callback with one of the memories."""
    if kind == "instance":
        return MemoryCallback(memory=InstanceMemory(rows))
    return MemoryCallback(rows, dtype="float16" if "16" in kind else "float32")


def make_step(kind: str, batch: int, rows: int, dim: int) -> tuple[Step, MemoryCallback]:
    """Return what a training step adds: both hooks of the callback, with this rank's batch."""
    callback = make_callback(kind, rows)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    trainer: Any = SimpleNamespace(global_step=0, accumulate_grad_batches=1, is_global_zero=True)
    module: Any = SimpleNamespace(automatic_optimization=True)
    generator = torch.Generator().manual_seed(rank)
    embeddings = nn.functional.normalize(torch.randn(batch, dim, generator=generator))
    labels = torch.arange(batch) // 4
    callback.memory.was_read = True

    def step() -> None:
        first = (trainer.global_step * ranks + rank) * batch
        outputs = {"embeddings": embeddings, "labels": labels, "indices": torch.arange(first, first + batch) % rows}
        callback.on_train_batch_start(trainer, module, None, 0)
        callback.on_train_batch_end(trainer, module, outputs, None, 0)
        trainer.global_step += 1

    return step, callback


def milliseconds(step: Step, repeats: int, rounds: int) -> float:
    """Return the CPU time of a step."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(repeats):
            step()
        times.append(1000 * (time.process_time() - start) / repeats)
    return min(times)


def allocated(step: Step) -> int:
    """Return the bytes a step asks for, all together."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    return sum(max(0, event.self_cpu_memory_usage) for event in profiled.events())


def collectives(step: Step) -> int:
    """Return how many collectives a step takes part in."""
    calls = []
    names = [name for name in dir(dist) if name.startswith(("all_", "broadcast", "gather", "reduce", "scatter"))]
    originals: dict[str, Any] = {name: getattr(dist, name) for name in names if callable(getattr(dist, name))}
    for name, original in originals.items():
        setattr(dist, name, lambda *args, call=original, **named: (calls.append(call), call(*args, **named))[1])
    try:
        step()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return len(calls)


def measure(kind: str, options: argparse.Namespace) -> dict[str, float]:
    """Return what one memory costs per step."""
    step, callback = make_step(kind, options.batch, options.memory, options.dim)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    once_round = 5 * options.memory // (4 * options.batch * ranks)
    for _ in range(once_round + 1):  # full, and what a step allocates once is there
        step()
    time_of_step = milliseconds(step, 4 * once_round, options.rounds)
    return {
        "ms": time_of_step, "collectives": collectives(step), "allocated": allocated(step),
        "memory": callback.memory.nbytes,
    }  # fmt: skip


def on_rank(rank: int, port: int, folder: str, options: argparse.Namespace) -> None:
    """Measure on one of two ranks."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo")
    found = {kind: measure(kind, options) for kind in KINDS}
    if rank == 0:
        torch.save(found, Path(folder, "found.pt"))
    dist.destroy_process_group()


def on_two_ranks(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return what each memory costs per step on rank 0 of two."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_rank, (port, folder, options), nprocs=2)
        return torch.load(Path(folder, "found.pt"))


def resnet_step(images: int) -> tuple[Step, Step, Step]:
    """Return a training step of a ResNet-50, and what a momentum encoder adds: its forward, and its update."""
    model = resnet50(num_classes=128)
    keys = MomentumEncoder(model, 0.99)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pictures: Tensor = torch.randn(images, 3, 224, 224)

    def step() -> None:
        model(pictures).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda: keys(pictures), lambda: keys.update(model)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64, help="images per rank")
    parser.add_argument("--memory", type=int, default=65536)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--images", type=int, default=8, help="images per batch in the timing of the ResNet-50")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, forward, update = resnet_step(options.images)
    for warm in (train, forward, update):
        warm()
    per_batch = options.batch / options.images
    whole = per_batch * milliseconds(train, 1, options.rounds)
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, one thread per process; B={options.batch} per"
    )
    print(f"rank, M={options.memory}, D={options.dim}. A ResNet-50 step at 224 pixels takes {whole:,.0f} ms.\n")
    print("| what | ranks | ms per step | % of the ResNet-50 step | collectives | MB allocated | MB of the memory |")
    print("|---|---|---|---|---|---|---|")
    for ranks, found in ((1, {kind: measure(kind, options) for kind in KINDS}), (2, on_two_ranks(options))):
        for kind, numbers in found.items():
            cost = f"{numbers['ms']:.3f} | {100 * numbers['ms'] / whole:.4f} | {numbers['collectives']}"
            print(f"| {kind} | {ranks} | {cost} | {numbers['allocated'] / 1e6:.2f} | {numbers['memory'] / 1e6:.1f} |")
    made = per_batch * milliseconds(forward, 1, options.rounds)
    moved = milliseconds(update, 3, options.rounds)
    print(f"| momentum encoder: forward | 1 | {made:,.0f} | {100 * made / whole:.1f} | 0 | - | - |")
    print(f"| momentum encoder: update | 1 | {moved:.1f} | {100 * moved / whole:.3f} | 0 | - | - |")


if __name__ == "__main__":
    main()
