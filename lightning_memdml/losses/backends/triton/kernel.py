"""Adds negatives by one Triton kernel in place of two matrix products and what is between them.

Each program takes some anchors and a share of the references (`lightning_memdml.losses.backends.triton.program`). The
totals of the shares are then merged like those of several ranks.

The kernel runs once for the plain negatives, and once for those among the shared references, under their mask.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lightning_memdml.losses.backends.triton import launching
from lightning_memdml.losses.backends.triton.codegen import Terms
from lightning_memdml.losses.backends.triton.launching import SharedNegatives, compile_terms
from lightning_memdml.losses.backends.triton.program import COUNTS, PARTS, add_negatives
from lightning_memdml.losses.definition import LossDefinition

# Compute capabilities. Triton does not use older tensor cores; newer ones keep the sums elsewhere and need other tiles.
GENERATIONS = (8, 9)
# Whether a loss with a threshold lists the references above it first. Only a benchmark turns it off, to compare.
LISTS = True
# Before training the first phase ends after one of so many parts of a share. It is multiplied once more than needed.
PARTS_OF_SHARE = (1 << PARTS.value) // 2


class Tiles(NamedTuple):
    """How much work one program does.

    Attributes:
        anchors: Anchors per program.
        references: References per tile.
        warps: Warps per program.
        stages: Tiles that are loaded at once.
    """

    anchors: int
    references: int
    warps: int
    stages: int

    def shared_memory(self, dim: int) -> int:
        """Return the bytes that the anchors, the tiles being loaded and the weights of one tile take."""
        return 2 * ((self.anchors + self.stages * self.references) * dim + self.anchors * self.references)


# Per width of rows, the first that fits. With more warps per anchor, reading the anchors takes longer than multiplying.
TILES = {
    128: [Tiles(128, 128, 8, 3), Tiles(64, 64, 4, 3)],
    256: [Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 3), Tiles(64, 32, 8, 2)],
    512: [Tiles(64, 64, 8, 2), Tiles(32, 32, 8, 2)],
}


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
    padded_dim, tiles = choose_tiles(rows, dim, device.shared_memory)
    groups = triton.cdiv(rows, tiles.anchors)
    columns, num_columns = launching.stack_columns(terms, anchors), len(terms.columns)
    rounded = anchors.to(references.dtype)  # in the kernel it would cost registers, of which it has none left

    def share_of(references: int) -> tuple[int, int]:
        """Return how many references a program takes, one program for every processor, and the number of shares."""
        share = triton.cdiv(references, max(1, device.processors // groups))
        share = triton.cdiv(share, tiles.references) * tiles.references
        return share, triton.cdiv(references, share)

    runs = [(references.shape[0], is_shared, is_shared, False)]
    if shared is not None and len(shared.columns):
        runs.append((len(shared.columns), shared.negative, shared.columns, True))
    shares = [share_of(number)[1] for number, *_ in runs]
    width = 3 + (dim if with_gradient else 0) + terms.num_sums
    states = anchors.new_empty(sum(shares), rows, width)
    limit, thresholds = _thresholds(terms, anchors)
    listed, lists = thresholds is not None or limit > -1, is_shared
    if listed:
        lists = _empty_lists(groups * shares[0], share_of(references.shape[0])[0], anchors.device)
    for (number, marked, places, gathered), part in zip(runs, states.split(shares), strict=True):
        share, _ = share_of(number)
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


def choose_tiles(rows: int, dim: int, shared_memory: int) -> tuple[int, Tiles]:
    """Return the padded width of rows, and the largest tiles that fit and are not mostly padding."""
    padded_dim = next(size for size in TILES if size >= dim)
    fitting = [
        tiles
        for tiles in TILES[padded_dim]
        if tiles.shared_memory(padded_dim) <= shared_memory and tiles.anchors <= max(rows, 64)
    ]
    return padded_dim, (fitting or TILES[padded_dim][-1:])[0]
