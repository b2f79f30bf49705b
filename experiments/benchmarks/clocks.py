"""Ways to measure a step: CPU time, on a CUDA GPU also its own time or that of a replayed graph, and memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

Step = Callable[[], object]
CLOCKS = ("cpu", "elapsed", "wall", "device", "graph")
FLUSHED_BYTES = 1 << 28  # more than the L2 cache of any GPU
FLUSHES = 100  # which keep a GPU busy for 5 to 10 ms, while the host enqueues the step


def time_step(run: Step, clock: str) -> float:
    """Return the seconds of one call.

    Args:
        run: The step.
        clock: `cpu`: CPU time of this process. `elapsed`: the time that passes, for several threads. `wall`: from the
            call until the GPU has done it. `device`: between two events on the GPU, with its L2 cache flushed and the
            host ahead. `graph`: the same of a CUDA graph, which is captured here; a step in which the host waits for
            the GPU cannot be captured.

    Raises:
        RuntimeError: If the step cannot be captured.
    """
    if clock == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    if clock == "elapsed":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    if clock == "wall":
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    if clock == "graph":
        run = capture(run)
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    for _ in range(FLUSHES):
        flushed.zero_()
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def least_seconds(
    steps: dict[str, Step], clock: str, rounds: int, slow: Collection[str] = (), threads: Sequence[int] = (1,)
) -> dict[int, dict[str, float]]:
    """Return the least seconds of each step over some rounds, for each number of threads.

    In a round every step runs once with each number of threads. What cannot be captured as a CUDA graph is left out.

    Args:
        steps: The steps by name.
        clock: As of `time_step`.
        rounds: Rounds that count, after one to warm up.
        slow: Steps of which one round counts.
        threads: Numbers of threads of torch; the last one stays set.
    """
    best = {number: dict.fromkeys(steps, float("inf")) for number in threads}
    for k in range(rounds + 1):
        for number, of_number in best.items():
            torch.set_num_threads(number)
            next(iter(steps.values()))()  # starts the threads
            for name in list(of_number):
                if k > 1 and name in slow:
                    continue
                try:
                    taken = time_step(steps[name], clock)
                except RuntimeError as error:
                    if clock != "graph":
                        raise
                    print(f"{name} cannot be captured: {str(error).splitlines()[0]}", file=sys.stderr)
                    del of_number[name]
                    continue
                if k:
                    of_number[name] = min(of_number[name], taken)
    return best


def capture(run: Step) -> Step:
    """Return a function that replays a step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the first calls allocate, on a stream of their own
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def profile(run: Step, device: str) -> str:
    """Return what one call runs, operation by operation, as a table."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        run()
    return profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=15)


def peak_on_gpu(run: Step) -> float:
    """Return by how many megabytes a step raises what is allocated."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def read_status(key: str) -> int:
    """Return a line of the process's status in kilobytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])
