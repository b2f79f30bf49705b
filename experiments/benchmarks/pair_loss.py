r"""Measures the memory term of one training step, forward and backward, against its two matrix products alone.

All methods run on the same inputs in one process, interleaved. The time is CPU time of one thread, or on a GPU that of
`--clock`, and the least of the rounds counts. `ratio` is relative to the floor: the similarities `S = X M^T` and the
gradient `G = W M`, the faster of the whole products and of products in blocks. On a GPU `ratio_16` is relative to the
floor in 16 bits, whatever the type of the references is. `--threads 1 2` measures every method with one thread and with
two, in turns, by the time that passes; `gain` is how many times as fast it is as with the first number of threads. The
losses of this package get the references in bfloat16 too, as a memory keeps them, unless `--no-copy` is given.

In `trained` inputs about 1 of 2,000 pairs is a hard negative. In `untrained` inputs all embeddings share a direction,
so nearly all negatives are above the margin. In `crowded` inputs 6 % of the negatives are, and as many are mined, as
with really trained networks. With `--checkpoint`, the embeddings of a trained network are measured too: of augmented
training images, as a memory holds them. Peak memory is measured in a process of its own, on a GPU by its allocator.

    python experiments/benchmarks/pair_loss.py --batch 64 --memory 65536 --dim 128 512 --json pairs.jsonl
    python experiments/benchmarks/pair_loss.py --regime --checkpoint runs/memdml/version_0/checkpoints/last.ckpt
    python experiments/benchmarks/pair_loss.py --device cuda --dtype bfloat16 --batch 512 --memory 1048576 --dim 512 \
        --clock device --make-on device --max-shared memory --compiled
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from clocks import CLOCKS, Step, least_seconds, peak_on_gpu, profile, read_status
from engine import set_engine
from torch import Tensor

import lightning_memdml as ml
from lightning_memdml.bfloat16_copy import BFloat16Copy
from lightning_memdml.losses.backends import Backend
from lightning_memdml.memory.shared_rows import SharedRowCounts

OURS: dict[str, ml.PairLoss] = {
    "contrastive": ml.ContrastiveLoss(0.5),
    "direct, threshold": ml.DirectWeightLoss(negative=ml.Threshold(0.5)),
    "direct, exponential": ml.DirectWeightLoss(negative=ml.Exponential(10)),
    "direct, 16 hardest": ml.DirectWeightLoss(negative=ml.Constant(), hardest_negatives=16),
    "multi-similarity, mined": ml.MultiSimilarityLoss(),
    "multi-similarity": ml.MultiSimilarityLoss(epsilon=None),
    "hybrid (contrastive, MS)": ml.HybridLoss(ml.ContrastiveLoss(), ml.MultiSimilarityLoss(epsilon=None)),
    "binomial deviance": ml.BinomialDevianceLoss(),
    "lifted structure": ml.LiftedStructureLoss(),
    "triplet": ml.TripletLoss(),
    "triplet, soft": ml.TripletLoss(soft=True),
    "margin": ml.MarginLoss(),
    "circle": ml.CircleLoss(),
    "InfoNCE": ml.InfoNCELoss(),
    "SupCon": ml.SupConLoss(),
    "NCA": ml.NCALoss(),
}
BACKENDS: tuple[Backend, ...] = ("triton", "triton_blocks")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make_inputs(regime: str, batch: int, memory: int, dim: int, device: str = "cpu") -> Inputs:
    """Return a batch of 4 images per class, and a memory with its classes among thousands of others."""
    generator = torch.Generator(device).manual_seed(0)

    def directions(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, dim, generator=generator, device=device), dim=1)

    classes = max(11_318, memory // 8)
    kinds, class_kind = directions(400), torch.randint(0, 400, (classes,), generator=generator, device=device)
    class_centre = directions(classes)

    def embed(labels: Tensor) -> Tensor:
        noise = directions(len(labels))
        if regime == "untrained":
            return F.normalize(0.8 * kinds[:1] + 0.6 * noise, dim=1)
        if regime == "crowded":  # the kinds lie in a space of 3 dimensions
            near = F.pad(F.normalize(kinds[:, :3], dim=1), (0, dim - 3))
            return F.normalize(0.75 * near[class_kind[labels]] + 0.3 * class_centre[labels] + 0.6 * noise, dim=1)
        return F.normalize(0.66 * kinds[class_kind[labels]] + 0.5 * class_centre[labels] + 0.56 * noise, dim=1)

    labels = torch.randperm(classes, generator=generator, device=device)[: batch // 4].repeat_interleave(4)
    ref_labels = torch.randint(0, classes, (memory,), generator=generator, device=device)
    return embed(labels).requires_grad_(), labels, embed(ref_labels), ref_labels


@functools.cache
def embed_training_images(checkpoint: str, rows: int) -> tuple[Tensor, Tensor]:
    """Return embeddings and labels of so many augmented training images, batch after batch, by a trained network."""
    import yaml

    from lightning_memdml.lightning_cli import MemdmlCLI
    from lightning_memdml.runs import CONFIG_IN_CHECKPOINT, read_checkpoint

    config = yaml.safe_load(read_checkpoint(checkpoint)[CONFIG_IN_CHECKPOINT])
    sys.argv[1:] = []  # the arguments of the benchmark are not for the command line
    cli = MemdmlCLI(run=False, args={key: config[key] for key in ("trainer", "model", "data")})
    model = ml.MetricLearner.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True).eval()
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    embeddings, labels, found = [], [], 0
    with torch.no_grad():
        while found < rows:
            for images, classes, _ in cli.datamodule.train_dataloader():
                embeddings.append(model(images))
                labels.append(classes)
                found += len(classes)
                if found >= rows:
                    break
    return torch.cat(embeddings)[:rows], torch.cat(labels)[:rows]


def trained_inputs(checkpoint: str, batch: int, memory: int) -> Inputs:
    """Return a batch and the memory it would meet: the images trained on before it."""
    embeddings, labels = embed_training_images(checkpoint, memory + batch)
    return embeddings[memory:].clone().requires_grad_(), labels[memory:], embeddings[:memory], labels[:memory]


def floors(inputs: Inputs, dtype: torch.dtype) -> list[Step]:
    """Return the two bare products of a type, whole and in blocks."""
    m = inputs[2].to(dtype)
    x = inputs[0].detach().to(m.dtype)
    similarity, gradient, block = x.new_empty(len(x), len(m)), torch.empty_like(x), x.new_empty(len(x), 8192)

    def whole() -> None:
        torch.mm(x, m.T, out=similarity)
        torch.mm(similarity, m, out=gradient)

    def blocks() -> None:
        gradient.zero_()
        for part in m.split(8192):
            target = block if len(part) == 8192 else block.new_empty(len(x), len(part))
            gradient.addmm_(torch.mm(x, part.T, out=target), part)

    return [whole, blocks]


def step(loss: Callable[..., Tensor], inputs: Inputs, **options: object) -> Step:
    """Return forward and backward of a loss called as this package's are."""

    def run() -> None:
        inputs[0].grad = None
        loss(*inputs, **options).backward()

    return run


def ours(inputs: Inputs, names: list[str] | None, bound: str = "exact", with_copy: bool = True) -> dict[str, Step]:
    """Return this package's losses. On a GPU with references in 16 bits, return them with the kernels of Triton too.

    Args:
        inputs: The batch and the memory.
        names: Which losses; None for all.
        bound: Of the references that share a class with the batch: their `exact` number, or what a `memory` gives,
            which does not know the batch.
        with_copy: Whether the references are in bfloat16 too, as a memory keeps them. It is made in the first round.
    """
    _, labels, references, ref_labels = inputs
    max_shared: int | tuple[int, ...] = int(torch.isin(ref_labels, labels).sum())
    if bound == "memory":
        counts = SharedRowCounts(len(ref_labels))
        counts.update(np.stack([ref_labels.cpu().numpy(), np.arange(len(ref_labels))]))
        max_shared = counts.bounds()
    chosen = {name: loss for name, loss in OURS.items() if not names or name in names}
    if references.is_cuda and references.dtype != torch.float32:
        for (name, loss), backend in product(list(chosen.items()), BACKENDS):
            chosen[f"{name} ({backend})"] = by_triton = copy.deepcopy(loss)
            by_triton.backend = backend
    rounded = functools.partial(BFloat16Copy(references).read, slice(0, len(references))) if with_copy else None
    return {name: step(loss, inputs, max_shared=max_shared, ref_rounded=rounded) for name, loss in chosen.items()}


def masked_contrastive(x: Tensor, y: Tensor, m: Tensor, my: Tensor) -> Tensor:
    """Compute the contrastive loss in the few lines of torch that most users would write."""
    m = m.to(x.dtype)
    s, same = x @ m.T, y[:, None] == my
    return (((1 - s) * same).sum() + (s * (~same & (s > 0.5))).sum()) / len(x)


def masked_multi_similarity(x: Tensor, y: Tensor, m: Tensor, my: Tensor) -> Tensor:
    """Compute the mined multi-similarity loss in the few lines of torch that most users would write."""
    m = m.to(x.dtype)
    s, same = x @ m.T, y[:, None] == my
    with torch.no_grad():
        least = s.masked_fill(~same, torch.inf).amin(1, keepdim=True)
        largest = s.masked_fill(same, -torch.inf).amax(1, keepdim=True)
        positive, negative = same & (s - 0.1 < largest), ~same & (s + 0.1 > least)
    terms = torch.log1p((torch.exp(-2 * (s - 0.5)) * positive).sum(1)) / 2
    return (terms + torch.log1p((torch.exp(50 * (s - 0.5)) * negative).sum(1)) / 50).mean()


def peers(inputs: Inputs) -> dict[str, Step]:
    """Return pytorch-metric-learning's CrossBatchMemory around its losses, with the same memory; none without it."""
    try:
        from pytorch_metric_learning import distances, losses, miners
    except ImportError:
        print("pytorch-metric-learning is not installed: its rows are left out", file=sys.stderr)
        return {}
    x, y, m, my = inputs
    contrastive = losses.ContrastiveLoss(pos_margin=1, neg_margin=0.5, distance=distances.CosineSimilarity())
    multi = losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)
    steps = {}
    for name, loss, miner in (
        ("contrastive (pytorch-metric-learning)", contrastive, None),
        ("multi-similarity, mined (pytorch-metric-learning)", multi, miners.MultiSimilarityMiner(0.1)),
    ):
        memory = losses.CrossBatchMemory(loss, m.shape[1], memory_size=len(m), miner=miner)
        memory.embedding_memory, memory.label_memory = m.to(x.dtype, copy=True), my.clone()
        memory.has_been_filled = True

        def run(memory: torch.nn.Module = memory) -> None:
            x.grad = None
            memory(x, y).backward()

        steps[name] = run
    return steps


def benchmark(inputs: Inputs, regime: str, options: argparse.Namespace) -> list[dict]:
    """Measure one size, and return a row per method."""
    inputs = to_device(inputs, options.device, options.dtype)
    batch, memory, dim = len(inputs[0]), *inputs[2].shape
    on_gpu = options.device == "cuda"
    dtype = inputs[2].dtype if on_gpu else torch.float32  # CPUs have no fast product in 16 bits
    steps = {f"floor {k}": run for k, run in enumerate(floors(inputs, dtype))}
    if on_gpu:
        half = torch.float16 if dtype == torch.float32 else dtype
        steps |= {f"floor in 16 bits {k}": run for k, run in enumerate(floors(inputs, half))}
    steps |= ours(inputs, options.losses, options.max_shared, not options.no_copy)
    if not options.ours_only and batch * memory <= options.most_pairs:
        masked = {"contrastive": masked_contrastive, "multi-similarity, mined": masked_multi_similarity}
        for name, function in masked.items():
            steps[f"{name} (masked torch)"] = step(function, inputs)
            if options.compiled:
                steps[f"{name} (masked torch, compiled)"] = step(torch.compile(function, dynamic=False), inputs)
        steps |= peers(inputs)
    slow = [name for name in steps if "(pytorch-metric-learning)" in name]
    found = least_seconds(steps, options.clock, options.rounds, slow, options.threads)
    size = {"device": options.device, "clock": options.clock, "dtype": options.dtype, "regime": regime, "batch": batch}
    size |= {"memory": memory, "dim": dim}
    rows = [row for threads, best in found.items() for row in as_rows({**size, "threads": threads}, best)]
    for row in rows if len(found) > 1 else ():
        first = next(other for other in rows if other["method"] == row["method"])
        for name in ("floor_", ""):
            row[f"{name}gain"] = round(first[f"{name}ms"] / row[f"{name}ms"], 2)
    if options.peak:
        for row in rows if regime != "network" else ():
            row["peak_mb"] = peak_megabytes(row) if options.device == "cpu" else peak_on_gpu(steps[row["method"]])
    if options.profile:
        with options.profile.open("a") as file:
            for name in steps:
                print(f"{name}, {regime}, B={batch}, M={memory}, D={dim}", file=file)
                print(profile(steps[name], options.device), file=file)
    return rows


def as_rows(size: dict, best: dict[str, float]) -> list[dict]:
    """Return a row per method."""
    halves = [best[name] for name in best if name.startswith("floor in 16 bits")]
    floor, floor_16 = min(best["floor 0"], best["floor 1"]), min(halves, default=None)
    size = {**size, "floor_ms": round(1e3 * floor, 3)}
    rows = []
    for name, value in best.items():
        if name.startswith("floor"):
            continue
        rows.append({**size, "method": name, "ms": round(1e3 * value, 3), "ratio": round(value / floor, 2)})
        if floor_16 is not None:
            rows[-1] |= {"floor_16_ms": round(1e3 * floor_16, 3), "ratio_16": round(value / floor_16, 2)}
    return rows


def to_device(inputs: Inputs, device: str, dtype: str) -> Inputs:
    """Return the inputs where they are measured, the references in the type of a memory."""
    x, y, m, my = inputs
    return x.detach().to(device).requires_grad_(), y.to(device), m.to(device, getattr(torch, dtype)), my.to(device)


def peak_megabytes(row: dict) -> float:
    """Return what a step adds to the resident memory, measured in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", json.dumps(row)]
    # Nothing that was freed before may serve the step: glibc gives all of it back.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def print_peak(row: dict) -> None:
    """Run one method twice and print by how many megabytes the second call raised the peak (Linux)."""
    inputs = make_inputs(row["regime"], row["batch"], row["memory"], row["dim"])
    steps = ours(inputs, None, with_copy=False) | peers(inputs)
    steps["contrastive (masked torch)"] = step(masked_contrastive, inputs)
    steps["multi-similarity, mined (masked torch)"] = step(masked_multi_similarity, inputs)
    small = make_inputs(row["regime"], row["batch"], 512, row["dim"])
    (OURS["contrastive"](*small)).backward()  # loads the libraries
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = read_status("VmRSS")
    steps[row["method"]]()
    print((read_status("VmHWM") - before) / 1024)


def table(rows: list[dict]) -> str:
    """Return a Markdown table per regime: a row per method, a column per size, in it the ratio to the floor."""
    parts = []
    several = len({row["threads"] for row in rows}) > 1
    for regime in dict.fromkeys(row["regime"] for row in rows):
        cells: dict[str, dict[str, str]] = {"floor, ms": {}}
        for row in (row for row in rows if row["regime"] == regime):
            size = f"B {row['batch']}, M {row['memory']:,}, D {row['dim']}"
            size += f", threads {row['threads']}" if several else ""
            cells["floor, ms"][size] = f"{row['floor_ms']}" + (f", gain {row['floor_gain']}" if several else "")
            peak = f" ({row['peak_mb']:.1f} MB)" if "peak_mb" in row else ""
            gain = f", gain {row['gain']}" if several else ""
            cells.setdefault(row["method"], {})[size] = f"{row['ratio']}{gain}{peak}"
        sizes = list(cells["floor, ms"])
        lines = [f"| {regime} | {' | '.join(sizes)} |", f"|---|{'---|' * len(sizes)}"]
        lines += [f"| {name} | {' | '.join(row.get(size, '-') for size in sizes)} |" for name, row in cells.items()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[64])
    parser.add_argument("--memory", type=int, nargs="+", default=[65_536])
    parser.add_argument("--dim", type=int, nargs="+", default=[128])
    regimes = ["trained", "untrained", "crowded"]
    parser.add_argument("--regime", nargs="*", choices=regimes, default=regimes[:2])
    parser.add_argument("--checkpoint", help="of `memdml fit`: measure on the embeddings of its network too")
    parser.add_argument("--losses", nargs="+", help="only these of ours")
    parser.add_argument("--ours-only", action="store_true", help="leave out the peers, which take minutes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"], help="of references")
    parser.add_argument("--clock", choices=CLOCKS[2:], default="wall", help="on a GPU; on a CPU it is CPU time")
    parser.add_argument("--make-on", choices=["cpu", "device"], default="cpu", help="where the inputs are drawn")
    bound = "of the references in the batch's classes: their number, or what a memory gives for any batch"
    parser.add_argument("--max-shared", choices=["exact", "memory"], default="exact", help=bound)
    parser.add_argument("--compiled", action="store_true", help="also measure the masked losses with torch.compile")
    parser.add_argument("--most-pairs", type=int, default=2**24, help="of the peers, which take up to 53 bytes a pair")
    parser.add_argument("--block", type=int, help="similarities of a block")
    parser.add_argument(
        "--tiles", type=int, nargs=4, metavar=("ANCHORS", "REFERENCES", "WARPS", "STAGES"), help="of the Triton kernel"
    )
    parser.add_argument("--profile", type=Path, help="append what each method runs, operation by operation")
    parser.add_argument("--no-copy", action="store_true", help="of the references in bfloat16, which a memory keeps")
    parser.add_argument("--no-bfloat16", action="store_true", help="on a CPU, as if it had no bfloat16 instructions")
    threads = "of a CPU; with more than one, or several numbers to compare, the time that passes counts"
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help=threads)
    parser.add_argument("--peak", action="store_true", help="also measure the peak extra memory (Linux)")
    parser.add_argument("--json", type=Path, help="append a line per row to this file")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads[0])
    if options.device == "cpu":
        options.clock = "cpu" if options.threads == [1] else "elapsed"
    set_engine(options)
    if options.peak_of:
        print_peak(json.loads(options.peak_of))
        return
    where = (
        torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"threads {' and '.join(map(str, options.threads))}"
    )
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {where}, references in {options.dtype}\n")
    rows = []
    for regime, batch, memory, dim in product(options.regime, options.batch, options.memory, options.dim):
        made = make_inputs(regime, batch, memory, dim, options.device if options.make_on == "device" else "cpu")
        rows += benchmark(made, regime, options)
    for batch, memory in product(options.batch, options.memory) if options.checkpoint else ():
        rows += benchmark(trained_inputs(options.checkpoint, batch, memory), "network", options)
    print(table(rows))
    if options.json:
        with options.json.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
