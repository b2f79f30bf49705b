"""The weights that a loss gives to pairs: as a curve where there is one, and as measured on real pairs.

`exact_curve` finds out whether the weight depends on the pair's similarity alone, and how. `read_weights` also measures
the weights of given pairs, and counts the pairs at each similarity.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_memdml.checks import check_pairs
from lightning_memdml.losses.definition import pair_masks
from lightning_memdml.losses.pair_loss import PairLoss

Side = Literal["positive", "negative"]
SIDES: tuple[Side, Side] = ("positive", "negative")

CURVE_POINTS = 1001
BINS = 100  # of similarity, each 0.02 wide
EDGES = torch.linspace(-1, 1, BINS + 1, dtype=torch.float64)
SAMPLE_PER_BIN = 30  # pairs kept for the picture; the sums are over all pairs
BLOCK_ELEMENTS = 1 << 20  # pairs weighed at once: about 100 MB with the temporaries of a loss

# Similarities of the other positives and of the other negatives in the rows in which a pair is weighed.
_MANY = torch.linspace(-0.99, 0.99, 500).tolist()
_ROWS: tuple[tuple[list[float], list[float]], ...] = (([], []), ([-0.4, 0.1, 0.9], [-0.6, 0.3]), (_MANY, _MANY))


class LossInputs(NamedTuple):
    """The arguments of a `PairLoss`: anchors and references; without references the batch is compared with itself.

    Attributes:
        embeddings: `(B, D)`.
        labels: `(B,)`.
        ref_embeddings: `(M, D)`.
        ref_labels: `(M,)`.
        indices: `(B,)` image of each anchor, -1 where unknown.
        ref_indices: `(M,)` image of each reference.
    """

    embeddings: Tensor
    labels: Tensor
    ref_embeddings: Tensor | None = None
    ref_labels: Tensor | None = None
    indices: Tensor | None = None
    ref_indices: Tensor | None = None


class Curve(NamedTuple):
    """A weight that depends on the similarity alone.

    Attributes:
        similarity: Ascending over [-1, 1], `(G,)`.
        weight: The weight there, `(G,)`.
        divided: Whether a pair's weight is that of the curve divided by the number of pairs of its side in the
            anchor's row (`w = curve / |P|`, or `/ |N|`).
    """

    similarity: Tensor
    weight: Tensor
    divided: bool


@dataclass(frozen=True)
class MeasuredWeights:
    """The weights of real pairs of one side, on the CPU; bin k is `[-1 + 0.02 k, -1 + 0.02 (k + 1))`.

    Attributes:
        similarity: Similarities of a random sample of the pairs, at most 30 of each bin, `(n,)`.
        weight: Their weights, per anchor and before the division by B, `(n,)`.
        pairs: Number of all pairs in each bin, `(100,)`.
        mass: Sum of all weights in each bin, `(100,)`.
        active: Number of all pairs whose weight is not 0.
    """

    similarity: Tensor
    weight: Tensor
    pairs: Tensor
    mass: Tensor
    active: int


class SideReading(NamedTuple):
    """One side of a loss.

    Attributes:
        curve: Its curve, or None if the weight also depends on other pairs.
        measured: The weights of the given pairs, or None if none were given.
    """

    curve: Curve | None
    measured: MeasuredWeights | None


@dataclass(frozen=True)
class Reading:
    """The weights of one loss.

    Attributes:
        loss: The loss and its parameters, as text.
        anchors: Number of anchors measured; 0 if no pairs were given.
        references: Number of references they were compared with.
        in_batch: Whether the references are the anchors themselves.
        positive: Weights of the positives.
        negative: Weights of the negatives.
    """

    loss: str
    anchors: int
    references: int
    in_batch: bool
    positive: SideReading
    negative: SideReading

    def side(self, side: Side) -> SideReading:
        """Return one side by its name."""
        return self.positive if side == "positive" else self.negative

    @property
    def is_exact(self) -> bool:
        """Whether both sides are curves of the similarity alone."""
        return self.positive.curve is not None and self.negative.curve is not None

    def per_anchor(self) -> dict[str, float]:
        """Return the pairs of nonzero weight and the sum of weights of each side, divided by the number of anchors."""
        numbers = {}
        for side in SIDES:
            measured = self.side(side).measured
            if measured is not None:
                numbers[f"{side}s"] = measured.active / self.anchors
                numbers[f"{side}_mass"] = float(measured.mass.sum()) / self.anchors
        return numbers


@torch.no_grad()
def read_weights(loss: PairLoss, pairs: LossInputs | None = None) -> Reading:
    """Return the weights that a loss gives: the exact curve, if there is one, and the weights of given pairs.

    Anchors are weighed in blocks, each with its whole row, so the memory needed does not grow with the number of
    anchors. The state of torch's random numbers is not changed.

    Args:
        loss: The loss.
        pairs: Anchors `(B, D)` and references `(M, D)`, of unit length and finite; by default curves only.

    Raises:
        TypeError: If `loss` is not a `PairLoss`: others have no pair weights.
        ValueError: If the shapes of the pairs disagree, or they hold NaN or infinity.

    Example:
        >>> from lightning_memdml import ContrastiveLoss
        >>> reading = read_weights(ContrastiveLoss(margin=0.5))
        >>> reading.loss, reading.is_exact
        ('ContrastiveLoss(margin=0.5)', True)
        >>> curve = reading.negative.curve
        >>> curve.similarity[curve.weight > 0].min()
        tensor(0.5020)
    """
    if not isinstance(loss, PairLoss):
        raise TypeError(
            f"Expected a PairLoss, which has pair weights, but got {type(loss).__name__}. Losses of other packages "
            "have a value only."
        )
    measured: dict[Side, MeasuredWeights] = {}
    if pairs is not None and len(pairs.labels):
        measured = _measure(loss, pairs)
    in_batch = pairs is not None and pairs.ref_labels is None
    anchors = 0 if pairs is None else len(pairs.labels)
    references = anchors if pairs is None or pairs.ref_labels is None else len(pairs.ref_labels)
    sides = [SideReading(exact_curve(loss, side), measured.get(side)) for side in SIDES]
    return Reading(format_loss(loss), anchors, references, in_batch, *sides)


@torch.no_grad()
def exact_curve(loss: PairLoss, side: Side) -> Curve | None:
    """Return the weight as a curve of the similarity, or None if it also depends on other pairs of the row.

    This is tested by experiment, so it works for any loss: a pair of each similarity is weighed alone, in a short row,
    and in a row of 500 positives and 500 negatives. There is a curve if the weight is the same in all rows, or, for a
    loss that takes means, if the weight times the number of pairs of that side is.

    Args:
        loss: The loss.
        side: `positive` or `negative`.

    Example:
        >>> from lightning_memdml import BinomialDevianceLoss, MultiSimilarityLoss
        >>> exact_curve(BinomialDevianceLoss(), "positive").divided
        True
        >>> exact_curve(MultiSimilarityLoss(), "positive") is None
        True
    """
    device = next(chain(loss.parameters(), loss.buffers()), torch.empty(0)).device
    coarse, fine = (_grid(points).to(device) for points in (81, CURVE_POINTS))
    weights = torch.stack([_swept(loss, side, coarse, *row) for row in _ROWS])  # (rows, 81)
    numbers = weights.new_tensor([1 + len(row[SIDES.index(side)]) for row in _ROWS])
    for divided in (False, True):
        candidates = weights * numbers[:, None] if divided else weights
        slack = 1e-6 * float(candidates[0].abs().max())
        if torch.allclose(candidates, candidates[:1].expand_as(candidates), rtol=1e-4, atol=slack):
            return Curve(fine.cpu(), _swept(loss, side, fine, [], []).cpu(), divided)
    return None


def _grid(points: int) -> Tensor:
    # Computed in float64: a float32 grid would miss similarities such as 0.5, and edges there, by a rounding error.
    return torch.linspace(-1, 1, points, dtype=torch.float64).float()


def _swept(
    loss: PairLoss, side: Side, similarity: Tensor, positives: Sequence[float], negatives: Sequence[float]
) -> Tensor:
    """Return the weight of a pair at each similarity `(G,)`, in a row beside the given other pairs."""
    others = similarity.new_tensor([*positives, *negatives]).expand(len(similarity), -1)
    row = torch.cat([similarity[:, None], others], dim=1)  # (G, 1 + others)
    positive = torch.zeros_like(row, dtype=torch.bool)
    positive[:, 0] = side == "positive"
    positive[:, 1 : 1 + len(positives)] = True
    _, positive_weights, negative_weights = loss.rows(row, positive, ~positive)
    return (positive_weights if side == "positive" else negative_weights)[:, 0]


# ------------------------------------------------------------------------------------------------ measured weights
def _measure(loss: PairLoss, pairs: LossInputs) -> dict[Side, MeasuredWeights]:
    check_pairs(*pairs)
    for name, embeddings in (("embeddings", pairs.embeddings), ("ref_embeddings", pairs.ref_embeddings)):
        if embeddings is not None and not embeddings.isfinite().all():
            raise ValueError(f"Expected finite `{name}` but got NaN or infinity. Leave these rows out.")
    tallies = {side: _Tally() for side in SIDES}
    for similarity, positive, negative in _blocks(pairs):
        _, positive_weights, negative_weights = loss.rows(similarity, positive, negative)
        tallies["positive"].add(similarity[positive].cpu(), positive_weights[positive].cpu())
        tallies["negative"].add(similarity[negative].cpu(), negative_weights[negative].cpu())
    return {side: tallies[side].result() for side in SIDES}


def _blocks(pairs: LossInputs) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield similarities of some anchors to all references, and the masks of positives and negatives."""
    anchors, labels, indices = pairs.embeddings.detach().float(), pairs.labels, pairs.indices
    if pairs.ref_embeddings is None or pairs.ref_labels is None:
        yield anchors @ anchors.T, *pair_masks(labels, labels, indices, indices, in_batch=True)
        return
    references = pairs.ref_embeddings.detach().float()
    if len(references) == 0:
        return
    for some in torch.arange(len(anchors), device=anchors.device).split(max(1, BLOCK_ELEMENTS // len(references))):
        some_indices = None if indices is None else indices[some]
        yield anchors[some] @ references.T, *pair_masks(labels[some], pairs.ref_labels, some_indices, pairs.ref_indices)


class _Tally:
    """Sums over pairs, block by block, and a random sample of the pairs."""

    def __init__(self) -> None:
        self.pairs = torch.zeros(BINS, dtype=torch.long)
        self.mass = torch.zeros(BINS, dtype=torch.float64)
        self.active = 0
        self.similarity, self.weight = torch.empty(0), torch.empty(0)
        self.generator = torch.Generator().manual_seed(0)

    def add(self, similarity: Tensor, weight: Tensor) -> None:
        """Add the pairs of a block to the sums, and sample again from the earlier sample and these."""
        bins = _bins(similarity)
        self.pairs += bins.bincount(minlength=BINS)
        self.mass += bins.bincount(weight.double(), minlength=BINS)
        self.active += int(weight.count_nonzero())
        chosen = _sample(bins, self.generator)
        similarity = torch.cat([self.similarity, similarity[chosen]])
        weight = torch.cat([self.weight, weight[chosen]])
        chosen = _sample(_bins(similarity), self.generator)
        self.similarity, self.weight = similarity[chosen], weight[chosen]

    def result(self) -> MeasuredWeights:
        return MeasuredWeights(self.similarity, self.weight, self.pairs, self.mass, self.active)


def _bins(similarity: Tensor) -> Tensor:
    return ((similarity + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)


def _sample(bins: Tensor, generator: torch.Generator) -> Tensor:
    """Return the positions of at most `SAMPLE_PER_BIN` random entries of each bin."""
    # Millions of pairs are thinned first, since shuffling and sorting them would be most of the cost. A bin is thinned
    # to four times the sample; that fewer than the sample remain has a probability of about 1e-30.
    chance = (4 * SAMPLE_PER_BIN / bins.bincount(minlength=BINS).clamp_min(1)).clamp_max(1)
    left = (torch.rand(len(bins), generator=generator) < chance[bins]).nonzero().squeeze(1)
    left = left[torch.randperm(len(left), generator=generator)]
    ordered, order = bins[left].sort(stable=True)
    first_of_bin = torch.searchsorted(ordered, ordered)
    return left[order[torch.arange(len(left)) - first_of_bin < SAMPLE_PER_BIN]]


#: Numbers of a loss that change nothing by default.
NEUTRAL = {"dropped_positives", "positive_scale", "negative_scale"}


def format_loss(part: Any) -> str:
    """Return a loss or a weight function as text, without options that change nothing by default.

    Args:
        part: A loss, a weight function, or any option of them.

    Example:
        >>> from lightning_memdml import DirectWeightLoss, Power
        >>> format_loss(DirectWeightLoss(negative=Power(threshold=0.5)))
        'DirectWeightLoss(positive=Constant(value=1), negative=Power(threshold=0.5, power=1))'
    """
    if isinstance(part, nn.Module):
        arguments = [
            f"{name}={format_loss(getattr(part, name))}"
            for name, parameter in inspect.signature(type(part)).parameters.items()
            if hasattr(part, name) and not _is_left_out(name, getattr(part, name), parameter.default)
        ]
        return f"{type(part).__name__}({', '.join(arguments)})"
    if isinstance(part, float):
        return f"{part:g}"
    if isinstance(part, Tensor):
        return str(part.tolist())
    return getattr(part, "__name__", repr(part))


def _is_left_out(name: str, value: Any, default: Any) -> bool:
    is_flag = value is None or isinstance(value, bool | str)
    # Equal and not only the same: the words of a checkpoint are copies.
    return (is_flag or name in NEUTRAL) and type(value) is type(default) and value == default
