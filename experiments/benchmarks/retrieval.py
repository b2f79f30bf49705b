"""Exact retrieval evaluation against its peers: time, extra memory, and agreement with float64.

Every method gets the same unit embeddings (classes of 2 to 12 images, as in Stanford Online Products) and one
thread. Times are CPU seconds, the minimum over rounds in which the methods take turns, and are given as ratios to
the floor: one bare float32 product of all queries with the whole gallery, in tiles that are overwritten. The peers
may be run on the first `--queries` samples and are then extrapolated in proportion; the table marks them. Extra memory
is the growth of the peak resident set of a process of its own, which has made the inputs and warmed up before.

    python experiments/benchmarks/retrieval.py --rounds 2 --check 2000 --output retrieval.jsonl
    python experiments/benchmarks/retrieval.py --queries 2048
    python experiments/benchmarks/retrieval.py --samples 500000 --classes 93500 --dims 128 --queries 4096 --part
    python experiments/benchmarks/retrieval.py --samples 500000 --classes 93500 --dims 128 --self --threads 2

`--part` is for sets too large to run: the floor and our method, too, run on `--queries` queries only. Ours then
compares two sets, which costs twice as much per query as self-retrieval. `--self` runs our method alone, once, on all
images against each other, with a progress bar; the floor runs on 4,096 queries, unless `--queries` gives another
number. With more than one thread times are elapsed seconds. `--threads 1 2` measures with one thread, then with two,
and prints how many times as fast each method is; only on an idle machine are the two clocks the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from itertools import product
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from lightning_memdml.retrieval import QueryRanks, rank_queries


def make_samples(samples: int, classes: int, dim: int, noise: float) -> tuple[Tensor, Tensor]:
    """Shuffled unit embeddings around class centres, some far noisier than others, as real ones are."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(2, 13, (classes,), generator=generator)
    while excess := int(sizes.sum()) - samples:
        step = -1 if excess > 0 else 1
        movable = ((sizes + step >= 2) & (sizes + step <= 12)).nonzero().squeeze(1)
        if len(movable) == 0:
            raise SystemExit(f"{samples} samples cannot be split into {classes} classes of 2 to 12.")
        sizes[movable[torch.randperm(len(movable), generator=generator)[: abs(excess)]]] += step
    labels = torch.repeat_interleave(torch.arange(classes), sizes)
    centres = F.normalize(torch.randn(classes, dim, generator=generator), dim=1)
    # Negatives spread as dim**-0.5; noise that grows as dim**0.36 keeps R@1 at about 0.8.
    noise = noise * (dim / 128) ** 0.36
    scale = noise * torch.exp(0.5 * torch.randn(samples, 1, generator=generator)) / dim**0.5
    embeddings = torch.randn(samples, dim, generator=generator).mul_(scale).add_(centres[labels])
    order = torch.randperm(samples, generator=generator)
    return F.normalize(embeddings, dim=1)[order], labels[order]


def floor(embeddings: Tensor, labels: Tensor, queries: int) -> dict[str, float]:
    tile = torch.empty(2048 * 2048)
    for rows in embeddings[:queries].split(2048):
        for columns in embeddings.split(2048):
            torch.mm(rows, columns.T, out=tile[: len(rows) * len(columns)].view(len(rows), len(columns)))
    return {}


def ours(embeddings: Tensor, labels: Tensor, queries: int) -> dict[str, float]:
    if queries == len(labels):
        return rank_queries(embeddings, labels).scores()
    indices = torch.arange(len(labels))
    part = embeddings[:queries], labels[:queries]
    return rank_queries(*part, embeddings, labels, indices=indices[:queries], gallery_indices=indices).scores()


def matmul_topk(embeddings: Tensor, labels: Tensor, queries: int) -> dict[str, float]:
    best = []
    for rows in torch.arange(queries).split(512):
        similarity = embeddings[rows] @ embeddings.T
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        best.append(similarity.topk(min(1000, len(labels) - 1), dim=1).indices)
    return scores_of_neighbours(torch.cat(best), labels, queries)


def faiss_flat(embeddings: Tensor, labels: Tensor, queries: int) -> dict[str, float]:
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(embeddings.shape[1])
    index.add(embeddings.numpy())
    found = torch.from_numpy(index.search(embeddings[:queries].numpy(), min(1001, len(labels)))[1])
    others = found != torch.arange(queries)[:, None]
    others[others.all(1), -1] = False  # lost among equals: drop the last instead
    return scores_of_neighbours(found[others].view(queries, -1), labels, queries)


def metric_learning(embeddings: Tensor, labels: Tensor, queries: int) -> dict[str, float]:
    import faiss
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    faiss.omp_set_num_threads(1)
    names = {
        "precision_at_1": "recall_at_1",
        "mean_average_precision_at_r": "map_at_r",
        "r_precision": "r_precision",
    }
    calculator = AccuracyCalculator(include=tuple(names), k="max_bin_count", device=torch.device("cpu"))
    if queries == len(labels):
        found = calculator.get_accuracy(embeddings, labels)
    else:
        # The first rows of the reference are the queries: each is kept from finding itself.
        found = calculator.get_accuracy(
            embeddings[:queries], labels[:queries], embeddings, labels, ref_includes_query=True
        )
    return {ours: float(found[name]) for name, ours in names.items()}


def scores_of_neighbours(found: Tensor, labels: Tensor, queries: int) -> dict[str, float]:
    """R@K and MAP@R from the neighbours a top-k search found, at least as many as the largest class."""
    match = labels[found] == labels[:queries, None]
    relevant = torch.bincount(labels)[labels[:queries]] - 1
    place = torch.arange(1, int(relevant.max()) + 1)
    first = match[:, : len(place)]
    within = first & (place <= relevant[:, None])
    precision = first.cumsum(1) / place
    scores = {f"recall_at_{k}": match[:, :k].any(1).double().mean().item() for k in (1, 10, 100, 1000)}
    scores["map_at_r"] = ((precision * within).sum(1) / relevant).double().mean().item()
    return scores


METHODS: dict[str, Callable[[Tensor, Tensor, int], dict[str, float]]] = {
    "floor": floor,
    "ours": ours,
    "pml": metric_learning,
    "faiss": faiss_flat,
    "topk": matmul_topk,
}
TITLES = {
    "floor": "one matrix product (floor)",
    "ours": "rank counting (this package)",
    "pml": "pytorch-metric-learning AccuracyCalculator",
    "faiss": "faiss IndexFlatIP, k = 1001",
    "topk": "matmul + topk(1000)",
}


def peak_kilobytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def measure_memory(name: str, arguments: argparse.Namespace, dim: int) -> None:
    """Print the growth of the peak resident set, in MB, that one run of a method causes."""
    embeddings, labels = make_samples(arguments.samples, arguments.classes, dim, arguments.noise)
    METHODS[name](*make_samples(3000, 450, dim, arguments.noise), 500)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present
    before = peak_kilobytes()
    METHODS[name](embeddings, labels, queries_of(name, arguments))
    print((peak_kilobytes() - before) / 1024)


def memory_of(name: str, arguments: argparse.Namespace, dim: int) -> float | None:
    """Extra memory of a method in a fresh process; None where the system cannot tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    options = ["samples", "classes", "noise", "queries", "threads"]
    command = [
        sys.executable,
        __file__,
        "--memory-of",
        name,
        "--dims",
        str(dim),
        *(["--part"] * arguments.part),
    ]
    command += [part for option in options for part in (f"--{option}", str(getattr(arguments, option)))]
    # Blocks of 1 MB go back to the system when freed, so that the peak is what was held at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def queries_of(name: str, arguments: argparse.Namespace) -> int:
    """How many queries a method runs: all, unless `--queries` limits the peers, and with `--part` everyone."""
    some = arguments.queries and (arguments.part or name not in ("floor", "ours"))
    return min(arguments.queries, arguments.samples) if some else arguments.samples


def measure(dim: int, arguments: argparse.Namespace) -> list[dict]:
    """Time the methods in turns, then their memory; one record each. One that cannot run says why."""
    embeddings, labels = make_samples(arguments.samples, arguments.classes, dim, arguments.noise)
    records = [
        {"method": name, "dim": dim, "samples": arguments.samples, "queries": queries_of(name, arguments)}
        for name in ("floor", *(name for name in arguments.methods if name != "floor"))
    ]
    small = make_samples(3000, 450, dim, arguments.noise)
    for _ in range(arguments.rounds):
        for record in records:
            method = METHODS[record["method"]]
            try:
                method(*small, 500)  # warm up
                start = clock(arguments.threads)
                record["scores"] = method(embeddings, labels, record["queries"])
                seconds = clock(arguments.threads) - start
            except (ImportError, MemoryError, RuntimeError) as error:
                record["failed"] = str(error).splitlines()[0][:200]
            else:
                record["measured_s"] = min(seconds, record.get("measured_s", float("inf")))
    base = records[0]["measured_s"] / records[0]["queries"]
    for record in records:
        if "failed" not in record:
            record["full_s"] = record["measured_s"] / record["queries"] * arguments.samples
            record["ratio"] = record["measured_s"] / record["queries"] / base
            record["extra_mb"] = memory_of(record["method"], arguments, dim) if arguments.memory else None
    return records


def clock(threads: int) -> float:
    """Return CPU seconds, or with several threads the seconds that passed."""
    return time.process_time() if threads == 1 else time.perf_counter()


def self_retrieval(embeddings: Tensor, labels: Tensor) -> QueryRanks:
    """Rank all images against each other, with a progress bar."""
    with tqdm(desc="similarities", unit="", unit_scale=True, smoothing=0) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return rank_queries(embeddings, labels, progress=show)


def measure_self(dim: int, arguments: argparse.Namespace) -> tuple[list[dict], QueryRanks]:
    """Time the floor on some queries, then our method on all; return a record of each, and the ranks."""
    embeddings, labels = make_samples(arguments.samples, arguments.classes, dim, arguments.noise)
    queries = min(arguments.queries or 4096, arguments.samples)
    small = make_samples(3000, 450, dim, arguments.noise)
    floor(*small, 3000)
    rank_queries(*small)
    start = clock(arguments.threads)
    floor(embeddings, labels, queries)
    middle = clock(arguments.threads)
    ranks = self_retrieval(embeddings, labels)
    seconds = clock(arguments.threads) - middle
    sizes = {"dim": dim, "samples": arguments.samples, "threads": arguments.threads}
    full = (middle - start) / queries * arguments.samples
    return [
        {**sizes, "method": "floor", "queries": queries, "measured_s": middle - start, "full_s": full, "ratio": 1.0,
         "scores": {}},
        {**sizes, "method": "ours", "queries": arguments.samples, "measured_s": seconds, "full_s": seconds,
         "ratio": seconds / full, "scores": ranks.scores()},
    ], ranks  # fmt: skip


def check_against_float64(dim: int, arguments: argparse.Namespace, counted: QueryRanks | None = None) -> dict:
    """Count queries whose best rank or average precision differs from a float64 sort of the whole gallery."""
    embeddings, labels = make_samples(arguments.samples, arguments.classes, dim, arguments.noise)
    counted = rank_queries(embeddings, labels, depth=1000) if counted is None else counted
    exact = F.normalize(embeddings.double(), dim=1)
    ranks_differ = precisions_differ = 0
    for rows in torch.arange(arguments.check).split(64):
        similarity = exact[rows] @ exact.T
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        match = labels[similarity.argsort(dim=1, descending=True)] == labels[rows, None]
        match[:, -1] = False  # the query itself
        relevant = match.sum(1)
        best = match.double().argmax(1) + 1
        place = torch.arange(1, len(labels) + 1)
        within = match & (place <= relevant[:, None])
        precision = ((match.cumsum(1) / place.double()) * within).sum(1) / relevant
        ranks_differ += int((counted.best_rank[rows] != best.clamp_max(1001)).sum())
        precisions_differ += int(((counted.average_precision_at_r[rows] - precision).abs() > 1e-12).sum())
    return {
        "method": "differences from float64",
        "dim": dim,
        "samples": arguments.samples,
        "queries": arguments.check,
        "best_ranks": ranks_differ,
        "average_precisions": precisions_differ,
    }


def as_table(records: list[dict]) -> str:
    """The records of one dimension as a Markdown table."""
    lines = [
        "| method | queries run | s | all queries, s | ratio to floor | extra MB | R@1 | MAP@R |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        title = TITLES[record["method"]]
        if "failed" in record:
            lines.append(f"| {title} | {record['queries']:,} | not run: {record['failed']} | | | | | |")
            continue
        scores, memory = record["scores"], record.get("extra_mb")
        note = "" if record["queries"] == record["samples"] else " (extrapolated)"
        cells = [
            title,
            f"{record['queries']:,}",
            f"{record['measured_s']:.2f}",
            f"{record['full_s']:.1f}{note}",
            f"{record['ratio']:.2f}",
            "" if memory is None else f"{memory:.0f}",
            *(f"{scores[name]:.5f}" if name in scores else "" for name in ("recall_at_1", "map_at_r")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def version_of(package: str) -> str:
    """Its installed version, or "missing"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def environment(threads: int) -> str:
    """Versions and processor, for the record."""
    versions = [f"{package} {version_of(package)}" for package in ("torch", "faiss-cpu", "pytorch-metric-learning")]
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {threads} thread{'s' * (threads > 1)}; Python {platform.python_version()}, {', '.join(versions)}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=60502, help="images, all of them queries and gallery")
    parser.add_argument("--classes", type=int, default=11316, help="classes of 2 to 12 images")
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--noise", type=float, default=1.25, help="1.25 gives R@1 about 0.8 at the default size")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--queries", type=int, default=0, help="queries the peers run; 0 for all")
    parser.add_argument("--part", action="store_true", help="the floor and our method run --queries queries, too")
    parser.add_argument("--self", action="store_true", help="our method alone, all against all, with a progress bar")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="of torch; one after the other")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", type=int, default=0, help="queries compared with a float64 sort")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--output", type=Path, help="JSON lines, one per method and dimension")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def gains(first: list[dict], last: list[dict]) -> str:
    """Return how many times as fast the methods are as with the first number of threads."""
    times = [
        (TITLES[a["method"]], a["full_s"] / b["full_s"]) for a, b in zip(first, last, strict=True) if "full_s" in b
    ]
    return "gain: " + ", ".join(f"{title} {gain:.2f}" for title, gain in times)


def main() -> None:
    arguments = parse_arguments()
    all_threads, first = arguments.threads, {}
    if arguments.memory_of:
        torch.set_num_threads(all_threads[0])
        measure_memory(arguments.memory_of, arguments, arguments.dims[0])
        return
    records = []
    for dim, threads in product(arguments.dims, all_threads):
        arguments.threads = threads
        torch.set_num_threads(threads)
        print(environment(threads))
        measured, ranks = measure_self(dim, arguments) if arguments.self else (measure(dim, arguments), None)
        print(f"\n{arguments.samples:,} x {arguments.samples:,}, {arguments.classes:,} classes, D = {dim}\n")
        print(as_table(measured), flush=True)
        if first.setdefault(dim, measured) is not measured:
            print(f"\n{gains(first[dim], measured)}")
        records += measured
        if arguments.check:
            records.append(check_against_float64(dim, arguments, ranks))
            print("\n{method}, {queries} queries: {best_ranks} ranks, {average_precisions} APs".format(**records[-1]))
    if arguments.output:
        arguments.output.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    main()
