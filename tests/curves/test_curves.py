"""Curves against the formulas, measured weights against `pair_weights` and against loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memdml import (
    BinomialDevianceLoss,
    CircleLoss,
    Constant,
    ContrastiveLoss,
    DirectWeightLoss,
    Exponential,
    HybridLoss,
    InfoNCELoss,
    LiftedStructureLoss,
    MarginLoss,
    MultiSimilarityLoss,
    NCALoss,
    PairLoss,
    Piecewise,
    Power,
    SupConLoss,
    TripletLoss,
)
from lightning_memdml.curves import LossInputs, exact_curve, format_loss, plot_readings, read_weights, save_readings
from lightning_memdml.curves import reading as module


def distance(s: float) -> float:
    return math.sqrt(max(2 - 2 * s, 1e-6))


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


Formula = Callable[[float], float]
# loss, w+(s), w-(s), whether they are divided by the numbers of pairs
CURVES: list[tuple[PairLoss, Formula, Formula, bool]] = [
    (ContrastiveLoss(margin=0.5), lambda s: 1.0, lambda s: float(s > 0.5), False),
    (
        MarginLoss(margin=0.25, beta=1.1),
        lambda s: (distance(s) > 0.85) / distance(s),
        lambda s: (distance(s) < 1.35) / distance(s),
        False,
    ),
    (
        BinomialDevianceLoss(alpha=3.0, beta=7.0, base=0.4),
        lambda s: 3 * logistic(3 * (0.4 - s)),
        lambda s: 7 * logistic(7 * (s - 0.4)),
        True,
    ),
    (
        DirectWeightLoss(positive=lambda s: 1 - s, negative=Power(threshold=0.2, power=2)),
        lambda s: 1 - s,
        lambda s: (max(0.0, s - 0.2) / 0.8) ** 2,
        False,
    ),
    (
        DirectWeightLoss(positive=Constant(3.0), negative=Constant(0.5), normalize="sum"),
        lambda s: 1.0,
        lambda s: 1.0,
        True,
    ),
]


@pytest.mark.parametrize(("loss", "positive", "negative", "divided"), CURVES, ids=lambda x: type(x).__name__)
def test_a_curve_is_the_formula_at_every_point(
    loss: PairLoss, positive: Formula, negative: Formula, divided: bool
) -> None:
    reading = read_weights(loss)
    assert reading.is_exact
    for side, formula in ((reading.positive, positive), (reading.negative, negative)):
        assert side.measured is None
        assert side.curve is not None
        assert side.curve.divided == divided
        similarity = side.curve.similarity
        assert similarity.tolist() == sorted(similarity.tolist())
        assert (float(similarity[0]), float(similarity[-1]), len(similarity)) == (-1, 1, 1001)
        assert 0.5 in similarity, "an edge at a round number is met exactly"
        expected = torch.tensor([formula(s) for s in similarity.tolist()])
        torch.testing.assert_close(side.curve.weight, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        MultiSimilarityLoss(),
        MultiSimilarityLoss(epsilon=None),
        LiftedStructureLoss(),
        TripletLoss(),
        TripletLoss(soft=True),
        CircleLoss(),
        InfoNCELoss(),
        SupConLoss(),
        NCALoss(),
        DirectWeightLoss(positive=Exponential(), negative=Exponential(), normalize="sum"),
    ],
    ids=format_loss,
)
def test_a_weight_that_other_pairs_change_is_no_curve(loss: PairLoss) -> None:
    assert exact_curve(loss, "positive") is None
    assert exact_curve(loss, "negative") is None


def test_each_side_is_judged_alone() -> None:
    loss = HybridLoss(positive=ContrastiveLoss(), negative=MultiSimilarityLoss())
    assert exact_curve(loss, "positive") is not None
    assert exact_curve(loss, "negative") is None
    assert not read_weights(loss).is_exact
    turned = HybridLoss(positive=SupConLoss(), negative=BinomialDevianceLoss())
    assert exact_curve(turned, "positive") is None
    curve = exact_curve(turned, "negative")
    assert curve is not None
    assert curve.divided


class OnlyTheHardest(ContrastiveLoss):
    """Weighs the 100 hardest negatives: a curve in every small row."""

    def rows(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, positive_weights, negative_weights = super().rows(similarity, positive, negative)
        hidden = similarity.masked_fill(~negative, -2)
        edge = hidden.topk(min(100, hidden.shape[1]), dim=1).values[:, -1:]
        return value, positive_weights, negative_weights * (hidden >= edge)


def test_a_long_row_tells_what_a_short_one_does_not() -> None:
    assert exact_curve(OnlyTheHardest(), "positive") is not None
    assert exact_curve(OnlyTheHardest(), "negative") is None


# ------------------------------------------------------------------------------------------------ measured
def pairs(in_batch: bool = False, anchors: int = 12, references: int = 40, seed: int = 0) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)

    def rows(number: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(number) % 5
        noise = torch.randn(number, 6, generator=generator)
        return F.normalize(0.5 * F.one_hot(labels, 6) + 0.3 * noise, dim=1), labels

    embeddings, labels = rows(anchors)
    if in_batch:
        return LossInputs(embeddings, labels)
    ref_indices = torch.arange(references)
    ref_indices[-1] = -1
    return LossInputs(embeddings, labels, *rows(references), torch.arange(anchors), ref_indices)


def ordered(found: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    # In a batch each similarity is there twice, and may differ in its last bit.
    return sorted(found, key=lambda pair: (round(pair[0], 5), pair[1]))


def weighed(loss: PairLoss, given: LossInputs, side: int) -> list[tuple[float, float]]:
    """Similarity and weight of each pair of one side, by loops over `pair_weights`."""
    weights = loss.pair_weights(*given[:4], indices=given.indices, ref_indices=given.ref_indices)[side]
    references = given.embeddings if given.ref_embeddings is None else given.ref_embeddings
    ref_labels = given.labels if given.ref_labels is None else given.ref_labels
    found = []
    for i in range(len(given.labels)):
        for j in range(len(ref_labels)):
            itself = i == j if given.ref_labels is None else i == given.ref_indices[j]
            if not itself and (given.labels[i] == ref_labels[j]) == (side == 0):
                found.append((float(given.embeddings[i] @ references[j]), float(weights[i, j])))
    return ordered(found)


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("loss", [MultiSimilarityLoss(), CircleLoss(), SupConLoss(), BinomialDevianceLoss()])
def test_measured_weights_are_those_of_the_training(
    loss: PairLoss, in_batch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 100)  # two anchors at a time
    monkeypatch.setattr(module, "SAMPLE_PER_BIN", 1000)  # all pairs are in the sample
    given = pairs(in_batch)
    reading = read_weights(loss, given)
    assert (reading.anchors, reading.references, reading.in_batch) == (12, 12 if in_batch else 40, in_batch)
    for side, name in enumerate(("positive", "negative")):
        measured = reading.side(name).measured
        assert measured is not None
        expected = weighed(loss, given, side)
        found = ordered(zip(measured.similarity.tolist(), measured.weight.tolist(), strict=True))
        assert len(found) == len(expected)
        for (s, w), (expected_s, expected_w) in zip(found, expected, strict=True):
            assert s == pytest.approx(expected_s, abs=1e-6)
            assert w == pytest.approx(expected_w, rel=1e-4, abs=1e-6)
        assert measured.active == sum(w != 0 for _, w in expected)
        assert int(measured.pairs.sum()) == len(expected)
        assert float(measured.mass.sum()) == pytest.approx(sum(w for _, w in expected), rel=1e-5, abs=1e-6)
        for edge in (-0.5, 0.0, 0.5):
            low = int(measured.pairs[: round((edge + 1) * 50)].sum())
            assert low == sum(s < edge for s, _ in expected)
        numbers = reading.per_anchor()
        assert numbers[f"{name}s"] == pytest.approx(measured.active / 12)
        assert numbers[f"{name}_mass"] == pytest.approx(sum(w for _, w in expected) / 12, rel=1e-5, abs=1e-6)


def test_the_sample_shows_every_similarity_and_nothing_but_pairs() -> None:
    given = pairs(anchors=20, references=300)
    measured = read_weights(MultiSimilarityLoss(), given).negative.measured
    assert measured is not None
    bins = ((measured.similarity + 1) * 50).long()
    assert measured.pairs.max() > module.SAMPLE_PER_BIN
    assert torch.equal(bins.bincount(minlength=100), measured.pairs.clamp(max=module.SAMPLE_PER_BIN))
    shown = torch.stack([measured.similarity, measured.weight], dim=1)
    there = torch.tensor(weighed(MultiSimilarityLoss(), given, 1))
    assert torch.cdist(shown, there, p=torch.inf).amin(dim=1).max() < 1e-6
    assert len(shown.unique(dim=0)) > 0.98 * len(shown), "no pair is shown twice"


def test_reading_leaves_the_random_numbers_of_the_training_alone() -> None:
    before = torch.get_rng_state()
    read_weights(MultiSimilarityLoss(), pairs())
    assert torch.equal(before, torch.get_rng_state())


def test_no_references_and_no_anchors_are_read_as_no_pairs() -> None:
    given = pairs()
    empty = given._replace(ref_embeddings=torch.empty(0, 6), ref_labels=torch.empty(0).long(), ref_indices=None)
    reading = read_weights(TripletLoss(), empty)
    assert reading.per_anchor() == {
        "positives": 0, "positive_mass": 0, "negatives": 0, "negative_mass": 0
    }  # fmt: skip
    plot_readings([reading])
    assert read_weights(TripletLoss(), LossInputs(torch.empty(0, 6), torch.empty(0).long())).per_anchor() == {}


def test_what_is_no_pair_loss_or_not_finite_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Expected a PairLoss, .* but got MSELoss"):
        read_weights(torch.nn.MSELoss())  # type: ignore[arg-type]
    broken = pairs()
    broken.ref_embeddings[3, 2] = torch.nan  # type: ignore[index]
    with pytest.raises(ValueError, match="finite `ref_embeddings`"):
        read_weights(ContrastiveLoss(), broken)
    with pytest.raises(ValueError, match="unit length"):
        read_weights(ContrastiveLoss(), LossInputs(2 * pairs().embeddings, pairs().labels))


# ------------------------------------------------------------------------------------------------ words and files
def test_a_loss_is_described_as_it_was_built() -> None:
    def halved(similarity: Tensor) -> Tensor:
        return similarity / 2

    assert format_loss(ContrastiveLoss(margin=0.25)) == "ContrastiveLoss(margin=0.25)"
    assert (
        format_loss(MultiSimilarityLoss(epsilon=None))
        == "MultiSimilarityLoss(alpha=2, beta=50, base=0.5, epsilon=None)"
    )
    assert format_loss(TripletLoss(soft=True)) == "TripletLoss(margin=0.1, soft=True)"
    loss = DirectWeightLoss(positive=halved, negative=Piecewise([0.0, 1.0], [0.0, 0.5]), normalize="sum")
    assert format_loss(loss) == (
        "DirectWeightLoss(positive=halved, negative=Piecewise(similarities=[0.0, 1.0], weights=[0.0, 0.5]), "
        "normalize='sum')"
    )


def test_files_hold_curves_pairs_and_histogram(tmp_path: Path) -> None:
    losses = [BinomialDevianceLoss(), HybridLoss(positive=ContrastiveLoss(), negative=SupConLoss())]
    readings = [read_weights(loss, pairs()) for loss in losses]
    picture, table, histogram = save_readings(readings, tmp_path / "new", "both")
    assert picture.read_bytes().startswith(b"\x89PNG")
    weights = pd.read_csv(table)
    assert list(weights) == ["loss", "side", "kind", "similarity", "weight"]
    kinds = {tuple(row) for row in weights[["loss", "side", "kind"]].drop_duplicates().to_numpy().tolist()}
    binomial, hybrid = (format_loss(loss) for loss in losses)
    assert kinds == {
        (binomial, "positive", "curve / |P|"), (binomial, "negative", "curve / |N|"),
        (binomial, "positive", "measured"), (binomial, "negative", "measured"),
        (hybrid, "positive", "curve"), (hybrid, "positive", "measured"), (hybrid, "negative", "measured"),
    }  # fmt: skip
    measured = readings[1].negative.measured
    rows = weights[(weights.loss == hybrid) & (weights.side == "negative")]
    assert measured is not None
    torch.testing.assert_close(torch.tensor(rows.weight.to_numpy()).float(), measured.weight)
    counts = pd.read_csv(histogram)
    assert list(counts) == ["loss", "side", "low", "high", "pairs", "weight"]
    counts = counts[(counts.loss == hybrid) & (counts.side == "negative")]
    assert counts.pairs.tolist() == measured.pairs.tolist()
    assert counts.weight.sum() == pytest.approx(float(measured.mass.sum()), rel=1e-5)
    assert counts.low.tolist() == pytest.approx([-1 + 0.02 * k for k in range(100)])


def test_without_pairs_there_is_no_histogram(tmp_path: Path) -> None:
    paths = save_readings([read_weights(ContrastiveLoss())], tmp_path, "curve")
    assert [path.name for path in paths] == ["curve.png", "curve.csv"]


def test_the_picture_shares_its_axis_and_says_what_it_shows() -> None:
    loss = HybridLoss(positive=BinomialDevianceLoss(), negative=MultiSimilarityLoss())
    figure = plot_readings([read_weights(loss, pairs())])
    assert [axes.get_xlim() for axes in figure.axes] == [(-1, 1)] * 3
    labels = [axes.get_legend_handles_labels()[1] for axes in figure.axes]
    assert labels[:2] == [["exact, drawn times $|P|$"], ["measured pairs, and their mean"]]
    assert figure.axes[2].get_yscale() == "symlog"
    curve = read_weights(loss).positive.curve
    assert curve is not None
    drawn = figure.axes[0].lines[-1]
    assert torch.equal(torch.as_tensor(drawn.get_ydata()), curve.weight)
    assert "HybridLoss(positive=BinomialDevianceLoss" in figure.get_suptitle()


def test_several_losses_are_told_apart_without_colour() -> None:
    readings = [read_weights(DirectWeightLoss(negative=Power(power=p))) for p in (0.5, 1, 2, 3, 4, 5)]
    figure = plot_readings(readings)
    assert len(figure.axes) == 2
    lines = figure.axes[1].lines[-6:]
    assert len({str((line.get_linestyle(), line._unscaled_dash_pattern)) for line in lines}) == 6
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [reading.loss for reading in readings]
    with pytest.raises(ValueError, match="1 to 6 losses in one picture but got 7"):
        plot_readings([*readings, readings[0]])


def test_a_spike_does_not_flatten_the_curve() -> None:
    axes = plot_readings([read_weights(MarginLoss())]).axes[1]
    assert axes.get_ylim()[1] < 20, "1/d reaches 1000 at d = 0.001"
    assert [text.get_text() for text in axes.texts] == ["up to 1,000"]


def test_a_weight_that_depends_on_other_pairs_has_no_row_until_it_is_measured(tmp_path: Path) -> None:
    picture, table = save_readings([read_weights(NCALoss())], tmp_path, "nothing")
    assert picture.is_file()
    assert pd.read_csv(table).empty
