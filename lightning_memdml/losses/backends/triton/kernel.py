"""Adds negatives by one Triton kernel in place of two matrix products and what is between them.

Each program takes some anchors and a share of the references (`lightning_memdml.losses.backends.triton.program`). The
totals of the shares are then merged like those of several ranks.

The kernel runs once for the plain negatives, and once for those among the shared references, under their mask.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lightning_memdml.losses.backends.triton import launching
from lightning_memdml.losses.backends.triton.codegen import Terms
from lightning_memdml.losses.backends.triton.launching import Device, SharedNegatives, compile_terms
from lightning_memdml.losses.backends.triton.program import COUNTS, PARTS, add_negatives
from lightning_memdml.losses.definition import LossDefinition

# Compute capabilities. Triton does not use older tensor cores; newer ones keep the sums elsewhere and need other tiles.
GENERATIONS = (8, 9)
# Whether a loss with a threshold lists the references above it first. Only a benchmark turns it off, to compare.
LISTS = True
# Before training the first phase ends after one of so many parts of a share. It is multiplied once more than needed.
PARTS_OF_SHARE = (1 << PARTS.value) // 2
KILOBYTE = 1 << 10
MOST_SHARES = 256  # whose states are merged by one program for each anchor
MOST_ROUNDS = 12
TILES_OF_A_STATE = 4  # to write and to read the state of a program takes as many bytes as so many tiles


class Tiles(NamedTuple):
    """How much work one program does.

    Attributes:
        anchors: Anchors per program.
        references: References per tile.
        warps: Warps per program.
        stages: Tiles that are loaded at once.
        programs: Programs that run on a multiprocessor at once, where its memory allows it. While one of them waits
            for rows or weighs pairs, another one multiplies. Of 8 warps the registers allow one.
        generation: The lowest compute capability that they are for.
    """

    anchors: int
    references: int
    warps: int
    stages: int
    programs: int = 1
    generation: int = 8

    def shared_memory(self, dim: int) -> int:
        """Return the bytes that the anchors, the tiles being loaded and the weights of one tile take."""
        return 2 * ((self.anchors + self.stages * self.references) * dim + self.anchors * self.references)

    def at_once(self, dim: int, device: Device) -> int:
        """Return how many programs run on a GPU at once."""
        needed = self.programs * (self.shared_memory(dim) + KILOBYTE) - KILOBYTE  # the system takes one of each program
        return device.processors * (self.programs if needed <= device.shared_memory else 1)


# Per width of rows, the first that fits. What decided, in what Triton 3.8 compiles; `gpu_checks.py` measures others.
# - With 8 warps for 64 anchors, compute capability 9.0 computes the first product twice: its instruction takes 4 warps
#   and 64 rows. 4 warps compute it once, and have registers for gradients of 256 numbers, but not of 512. Before that
#   capability nothing is computed twice, and 4 warps lack registers at 256 numbers.
# - With 32 references, the first phase of a loss with a threshold would not use that instruction.
# - A row of 384 numbers is padded to 512, since Triton needs powers of two. In two parts, of 256 and of 128 numbers,
#   every line that reads a row or adds to the gradient would stand twice.
TILES = {
    64: [Tiles(128, 128, 8, 3), Tiles(64, 64, 4, 4, programs=2)],
    128: [Tiles(128, 128, 8, 3), Tiles(64, 64, 4, 3, programs=2)],
    256: [
        Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2, programs=2, generation=9), Tiles(64, 64, 8, 3), Tiles(64, 32, 8, 2),
    ],
    512: [Tiles(64, 64, 8, 2), Tiles(32, 32, 8, 2)],
}  # fmt: skip


def reason_against(anchors: Tensor, references: Tensor) -> str | None:
    """Return what the kernel cannot serve, or `None` if it can serve both.

    Args:
        anchors: `(B, D)`.
        references: `(M, D)`.
    """
    if (reason := launching.reason_against(anchors, references)) is not None:
        return reason
    if references.shape[1] > max(TILES):
        return f"{references.shape[1]} numbers"
    generation = launching.device_of(references).generation
    return None if generation in GENERATIONS else f"a GPU of compute capability {generation}"


def launch(
    loss: LossDefinition,
    terms: Terms,
    anchors: Tensor,
    references: Tensor,
    is_shared: Tensor,
    with_gradient: bool,
    shared: SharedNegatives | None = None,
) -> Tensor:
    """Return the state of every share of the references, and of the `shared` ones, `(shares, B, 3 + D + S)`."""
    (rows, dim), device = anchors.shape, launching.device_of(references)
    padded_dim, tiles = choose_tiles(rows, dim, device)
    groups = triton.cdiv(rows, tiles.anchors)
    columns, num_columns = launching.stack_columns(terms, anchors), len(terms.columns)
    rounded = anchors.to(references.dtype)  # in the kernel it would cost registers, of which it has none left
    runs = [(references.shape[0], is_shared, is_shared, False)]
    if shared is not None and len(shared.columns):
        runs.append((len(shared.columns), shared.negative, shared.columns, True))
    of_runs = [choose_share(number, tiles.references, groups, tiles.at_once(padded_dim, device)) for number, *_ in runs]
    shares = [triton.cdiv(number, share) for (number, *_), share in zip(runs, of_runs, strict=True)]
    width = 3 + (dim if with_gradient else 0) + terms.num_sums
    states = anchors.new_empty(sum(shares), rows, width)
    limit, thresholds = _thresholds(terms, anchors)
    listed, lists = thresholds is not None or limit > -1, is_shared
    if listed:
        lists = _empty_lists(groups * shares[0], of_runs[0], anchors.device)
    for (number, marked, places, gathered), share, part in zip(runs, of_runs, states.split(shares), strict=True):
        first_part = max(2, triton.cdiv(share, PARTS_OF_SHARE * tiles.references)) * tiles.references
        add_negatives[(groups, len(part))](
            rounded, references, marked.view(torch.uint8), places, columns,
            anchors if thresholds is None else thresholds, lists, part,
            rows, number, share, first_part, terms.constants or (0.0,), limit, float(loss.fill_value),
            dim=dim, padded_dim=padded_dim, num_columns=num_columns, terms=compile_terms(terms.text, num_columns),
            exponential=loss.exponential, has_values=terms.has_values, needs_hardest=loss.needs_hardest,
            with_gradient=with_gradient, num_sums=terms.num_sums, padded_sums=terms.padded_sums, gathered=gathered,
            listed=listed and not gathered, threshold_per_anchor=thresholds is not None,
            anchors_per_program=tiles.anchors, references_per_tile=tiles.references,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return states


def _thresholds(terms: Terms, anchors: Tensor) -> tuple[float, Tensor | None]:
    """Return the threshold of a loss: -inf for none, and where each anchor has its own `(B,)`."""
    if not LISTS:
        return -math.inf, None
    if isinstance(terms.threshold, Tensor):
        return -math.inf, terms.threshold.to(anchors).expand(len(anchors)).contiguous()
    return float(terms.threshold), None


def _empty_lists(programs: int, share: int, device: torch.device) -> Tensor:
    """Return memory for the lists of references: 4 bytes for each reference and group of anchors."""
    return torch.empty(programs, COUNTS.value + share, dtype=torch.int32, device=device)


def choose_tiles(rows: int, dim: int, device: Device) -> tuple[int, Tiles]:
    """Return the padded width of rows, and the first tiles that fit and are not mostly padding."""
    padded_dim = next(size for size in TILES if size >= dim)
    fitting = [
        tiles
        for tiles in TILES[padded_dim]
        if tiles.shared_memory(padded_dim) <= device.shared_memory
        and tiles.anchors <= max(rows, 64)
        and tiles.generation <= device.generation
    ]
    return padded_dim, (fitting or TILES[padded_dim][-1:])[0]


@functools.lru_cache(maxsize=1024)
def choose_share(references: int, references_per_tile: int, groups: int, at_once: int) -> int:
    """Return how many references a program should take, so that few multiprocessors are idle.

    Programs run in rounds, `at_once` in each, and the last round may not be full. More shares fill it better, but each
    program also takes time for its anchors and its state, and states take memory. So this is the largest share whose
    time is at most 5 % above the shortest.

    Args:
        references: How many there are.
        references_per_tile: Of which a share is a multiple.
        groups: Programs of one share.
        at_once: Programs that run at once.
    """
    tiles = triton.cdiv(references, references_per_tile)
    most = min(tiles, MOST_SHARES, max(1, triton.cdiv(MOST_ROUNDS * at_once, groups)))
    lengths = {triton.cdiv(tiles, shares): None for shares in range(1, most + 1)}  # in tiles, descending
    times = {}
    for length in lengths:
        rounds = triton.cdiv(groups * triton.cdiv(tiles, length), at_once)
        times[length] = rounds * (length + TILES_OF_A_STATE)
    shortest = min(times.values())
    return references_per_tile * next(length for length, time in times.items() if time <= 1.05 * shortest)
