"""What follows from the rows that `gpu_checks.py` measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import geometric_mean

from lightning_memdml.losses.backends import Backend

BACKENDS: tuple[Backend, ...] = ("blocks", "triton", "triton_blocks")
NARROW = 256  # numbers of a row up to which one backend is the default, and above which another one may be
SMALL = 65_536  # rows of a memory, where a step may take longer to launch than to compute


def verdicts(rows: Iterable[dict]) -> list[str]:
    """Return each rule, and whether it holds for the rows."""
    rows = list(rows)
    sections = {name: [row for row in rows if row["section"] == name] for name in ("graphs", "enqueue", "rivals")}
    by_size: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["section"] == "losses" and "backend" in row:
            key = row["batch"], row["memory"], row["dim"], row["regime"], row["method"]
            by_size.setdefault(key, {})[row["backend"]] = row
    found = [row for of_size in by_size.values() for row in of_size.values() if row["backend"] != "blocks"]
    found = [row for row in found if "error" in row or "failed" in row]
    compiled = []
    for row in sections["rivals"]:
        of_size = by_size.get((row["batch"], row["memory"], row["dim"], "trained", row["method"]), {})
        compiled += [row["device"] / of_size["blocks"]["device"]] if "device" in of_size.get("blocks", {}) else []
    narrow, wide = (
        _default([of_size for key, of_size in by_size.items() if (key[2] > NARROW) is is_wide])
        for is_wide in (False, True)
    )
    return [
        _verdict(
            "The kernels are right: their gradients are off by at most 2e-3",
            found,
            lambda: all(row.get("error", 1.0) <= 2e-3 for row in found),
        ),
        "A kernel should be the default if on the GPU it takes at most 0.8 of the time of blocks everywhere, and at "
        f"{SMALL:,} rows at most 1.1 of their wall time. The first choice is `triton`, and `triton_blocks` if `triton` "
        f"takes more than 1.25 times its time (geometric mean). For rows of at most {NARROW} numbers: {narrow}.",
        f"By the same rule, for rows of more than {NARROW} numbers: {wide}.",
        *_lists(row for row in rows if row["section"] == "lists"),
        _verdict("Blocks are faster than compiled torch", compiled, lambda: min(compiled) > 1),
        _verdict(
            "Every step can be captured as a CUDA graph",
            sections["graphs"],
            lambda: not any("failed" in row for row in sections["graphs"]),
        ),
        _verdict(
            "Storing a batch waits for the GPU at most once",
            sections["enqueue"],
            lambda: all(row["waits"] <= 1 for row in sections["enqueue"]),
        ),
    ]


def _default(sizes: list[dict[str, dict]]) -> str:
    """Return which backend should be the default, from the rows of each size and loss by backend."""
    complete = [found for found in sizes if set(found) == set(BACKENDS) and "failed" not in found["blocks"]]
    if not complete:
        return "not measured"

    def times(backend: str, clock: str = "device", most: float = float("inf")) -> list[float]:
        """Return those of the memories of at most so many rows. Where the backend failed it is infinite."""
        return [row.get(clock, float("inf")) for found in complete if (row := found[backend])["memory"] <= most]

    def is_faster(backend: str) -> bool:
        device = zip(times(backend), times("blocks"), strict=True)
        wall = zip(times(backend, "wall", SMALL), times("blocks", "wall", SMALL), strict=True)
        return all(own <= 0.8 * other for own, other in device) and all(own <= 1.1 * other for own, other in wall)

    order = ["triton", "triton_blocks"]
    if geometric_mean(times("triton")) > 1.25 * geometric_mean(times("triton_blocks")):
        order.reverse()
    return f"`{next((backend for backend in order if is_faster(backend)), 'blocks')}`"


def _lists(rows: Iterable[dict]) -> list[str]:
    """Return whether lists of the references above a threshold pay, from the same steps with and without them."""
    times = {(row["regime"], row["dim"], row["method"], row["lists"]): row.get("device", float("inf")) for row in rows}
    ratios = {
        of_regime: [
            taken / times[regime, dim, method, False]
            for (regime, dim, method, has_lists), taken in times.items()
            if has_lists and regime == of_regime and (regime, dim, method, False) in times
        ]
        for of_regime in ("trained", "untrained")
    }
    return [
        _verdict(
            "Lists of the references above a threshold take at most 0.8 of the time without them in the trained regime",
            ratios["trained"],
            lambda: max(ratios["trained"]) <= 0.8,
        ),
        _verdict(
            "In the untrained regime they take at most 1.1 of it",
            ratios["untrained"],
            lambda: max(ratios["untrained"]) <= 1.1,
        ),
    ]


def _verdict(rule: str, measured: object, holds: Callable[[], bool]) -> str:
    return f"{rule}: {'not measured' if not measured else 'yes' if holds() else '**no**'}."
