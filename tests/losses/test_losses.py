"""The contract of every loss: its formula in float64, in the batch, against references, streamed, and as weights.

The losses and their formulas are those of `tests/losses/oracles`; see `support/losses.py`.
"""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from support.losses import (
    loss_cases,
    masks,
    missing_in_docstring,
    public_classes,
    value_of_rows,
    weights_of,
    without_case,
)
from torch import Tensor

import lightning_memdml as ml
from lightning_memdml.curves import exact_curve
from lightning_memdml.losses import streaming

CASES = loss_cases()


@pytest.fixture(params=CASES, name="case")
def _case(request):
    return CASES[request.param]


def unit(rows: int, dim: int = 8, seed: int = 0, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(1, dim, generator=generator, dtype=torch.float64)
    return F.normalize(centre + spread * torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


def labels_of(rows: int, classes: int, seed: int = 1) -> Tensor:
    return torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(seed))


def value_and_gradient(loss, x: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    value = loss(x, *args, **kwargs)
    value.backward()
    return value.detach(), x.grad


def expected(row_loss, x: Tensor, y: Tensor, r: Tensor | None = None, ry: Tensor | None = None, **kwargs):
    x = x.detach().clone().requires_grad_()
    in_batch = r is None
    positive, negative = masks(y, y if in_batch else ry, in_batch=in_batch, **kwargs)
    similarity = x @ (x.T if in_batch else r.T)
    value = value_of_rows(row_loss, similarity, positive, negative)
    value.backward()
    return value.detach(), x.grad


def assert_same(actual, wanted, tolerance: float = 1e-10) -> None:
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_in_batch_value_and_gradient_follow_the_formula(case, spread):
    loss, row_loss = case
    x, y = unit(24, spread=spread), labels_of(24, 5)
    assert_same(value_and_gradient(loss, x, y), expected(row_loss, x, y))


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_against_a_memory_value_and_gradient_follow_the_formula(case, spread):
    loss, row_loss = case
    x, y = unit(12, spread=spread), labels_of(12, 40)
    r, ry = unit(700, seed=2, spread=spread), labels_of(700, 60, seed=3)  # three blocks
    assert_same(value_and_gradient(loss, x, y, r, ry), expected(row_loss, x, y, r, ry))


def test_references_with_gradient_get_the_gradient_of_the_formula(case):
    loss, row_loss = case
    x, y, ry = unit(10), labels_of(10, 4), labels_of(30, 4, seed=3)
    r = unit(30, seed=2).requires_grad_()
    loss(x, y, r, ry).backward()
    wanted = r.detach().clone().requires_grad_()
    value_of_rows(row_loss, x @ wanted.T, *masks(y, ry)).backward()
    torch.testing.assert_close(r.grad, wanted.grad, rtol=1e-10, atol=1e-10)


def test_pairs_of_equal_known_index_are_left_out(case):
    loss, row_loss = case
    x, y = unit(8), labels_of(8, 3)
    r, ry = torch.cat([x, unit(300, seed=5)]), torch.cat([y, labels_of(300, 3, seed=6)])
    indices = torch.tensor([10, 11, 12, 13, 14, 15, -1, -1])
    ref_indices = torch.cat([indices, torch.full((300,), -1)])
    pairs = {"indices": indices, "ref_indices": ref_indices}
    assert_same(value_and_gradient(loss, x, y, r, ry, **pairs), expected(row_loss, x, y, r, ry, **pairs))


def test_pair_weights_are_the_derivatives_of_the_formula(case):
    loss, row_loss = case
    x, y, r, ry = unit(10), labels_of(10, 4), unit(30, seed=2), labels_of(30, 4, seed=3)
    wanted = weights_of(row_loss, x @ r.T, *masks(y, ry))
    assert_same(loss.pair_weights(x, y, r, ry), wanted)


@pytest.mark.parametrize(
    ("y", "ry"),
    [
        ([0, 1, 2], [0, 0, 5, 6, 7]),  # anchors without positives
        ([0, 1, 2], [5, 6, 7, 8, 9]),  # no positives at all
        ([4, 4, 4], [4, 4, 4, 4, 4]),  # all positives
        ([0, 1, 0], [0]),  # one reference
    ],
)
def test_anchors_without_positives_or_negatives_follow_the_formula(case, y, ry):
    loss, row_loss = case
    y, ry = torch.tensor(y), torch.tensor(ry)
    x, r = unit(len(y)), unit(len(ry), seed=2)
    assert_same(value_and_gradient(loss, x, y, r, ry), expected(row_loss, x, y, r, ry))


def test_collapsed_and_duplicate_embeddings_follow_the_formula(case):
    loss, row_loss = case
    x, y = unit(1).expand(6, -1), torch.tensor([0, 0, 1, 1, 2, 3])
    r, ry = unit(1).expand(9, -1), torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8])
    actual, wanted = value_and_gradient(loss, x, y, r, ry), expected(row_loss, x, y, r, ry)
    if isinstance(loss, ml.MarginLoss):  # identical pairs keep the bounded weight where the formula's clamp has none
        actual, wanted = actual[:1], wanted[:1]
    assert_same(actual, wanted, 1e-7)


def test_eight_thousand_near_duplicate_negatives_stay_exact_in_float32(case):
    loss, row_loss = case
    x, y = unit(4, dim=32), torch.arange(4)
    noise = 1e-3 * torch.randn(8000, 32, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    r = F.normalize(x[0] + noise, dim=1)
    ry = torch.full((8000,), 9)
    ry[:4] = torch.arange(4)
    wanted = expected(row_loss, x, y, r, ry)
    value, gradient = value_and_gradient(loss, x.float(), y, r.float(), ry)
    assert abs(value - wanted[0]) <= 2e-4 * abs(wanted[0])
    assert (gradient - wanted[1]).norm() <= 2e-3 * wanted[1].norm()


def test_float32_gradient_is_within_1e_5_of_float64(case):
    loss, _ = case
    x, y = unit(32, dim=64, spread=2.0), labels_of(32, 100)
    r, ry = unit(4096, dim=64, seed=2, spread=2.0), labels_of(4096, 300, seed=3)
    r = r[~_near_an_edge(x @ r.T).any(dim=0)]
    ry = ry[: len(r)]
    _, wanted = value_and_gradient(loss, x, y, r, ry)
    _, actual = value_and_gradient(loss, x.float(), y, r.float(), ry)
    assert (actual - wanted).norm() <= 1e-5 * wanted.norm()


def _near_an_edge(similarity: Tensor) -> Tensor:
    """Pairs so near a step of a weight of these cases that rounding may carry them over it."""
    edges = torch.tensor([0.3, 0.5, 1 - 1.4**2 / 2, 1 - 1.0**2 / 2], dtype=similarity.dtype)
    return ((similarity[..., None] - edges).abs() < 1e-6).any(dim=-1)


def test_the_block_size_does_not_change_the_result(case, monkeypatch):
    loss, _ = case
    x, y, r, ry = (
        unit(16, spread=2.0),
        labels_of(16, 9),
        unit(3000, seed=2, spread=2.0),
        labels_of(3000, 50, seed=3),
    )
    whole = value_and_gradient(loss, x, y, r, ry)
    monkeypatch.setattr(streaming, "BLOCK_ELEMENTS", 16 * 300)
    assert_same(value_and_gradient(loss, x, y, r, ry), whole, 1e-11)


def test_the_order_of_pairs_does_not_matter(case):
    loss, _ = case
    x, y, r, ry = unit(9), labels_of(9, 4), unit(500, seed=2), labels_of(500, 4, seed=3)
    rows, columns = torch.randperm(9), torch.randperm(500)
    value, gradient = value_and_gradient(loss, x, y, r, ry)
    shuffled = value_and_gradient(loss, x[rows], y[rows], r[columns], ry[columns])
    assert_same(shuffled, (value, gradient[rows]))


def test_nothing_to_compare_gives_a_differentiable_zero(case):
    loss, _ = case
    x, y = unit(3), torch.arange(3)
    empty = (torch.zeros(0, 0), torch.zeros(0, dtype=torch.long))
    for args in [(x, y, *empty), (x[:1], y[:1]), (x[:0], y[:0])]:
        value, gradient = value_and_gradient(loss, *args)
        assert value == 0
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_copy_of_a_loss_is_another_loss_with_the_same_value(case):
    loss, _ = case
    x, y, r, ry = unit(4), labels_of(4, 2), unit(20, seed=2), labels_of(20, 2, seed=3)
    duplicate = copy.deepcopy(loss)
    assert duplicate.loss_id != loss.loss_id
    assert duplicate(x, y, r, ry) == loss(x, y, r, ry)


# ---------------------------------------------------------------- what every exported loss must have
LOSSES = public_classes(ml.PairLoss)


def test_every_loss_has_a_formula_beside_it():
    assert without_case(LOSSES, CASES) == [], "add a file to tests/losses/oracles"


@pytest.mark.parametrize("cls", LOSSES, ids=lambda cls: cls.__name__)
def test_every_loss_is_exported_and_documented(cls):
    assert getattr(ml, cls.__name__, None) is cls
    assert getattr(ml.losses, cls.__name__, None) is cls
    assert missing_in_docstring(cls) == []


class Undocumented(ml.ContrastiveLoss):
    """A loss without a formula and without an example."""


def test_a_loss_without_formula_or_documentation_is_found(monkeypatch):
    monkeypatch.setattr(sys.modules[ml.ContrastiveLoss.__module__], "Undocumented", Undocumented, raising=False)
    assert without_case(public_classes(ml.PairLoss), CASES) == ["Undocumented"]
    assert missing_in_docstring(Undocumented) == ["$$", "Args:", "Example:", ">>> ", "Denominator:", "References:"]


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_a_weight_curve_is_exact_where_the_formula_depends_on_the_similarity_alone(case, side):
    """The weight of one pair by the formula, alone in its row and beside other pairs."""
    loss, row_loss = case
    grid = torch.linspace(-0.995, 0.995, 41, dtype=torch.float64)
    many = torch.linspace(-0.99, 0.99, 200).tolist()
    rows = [([], []), ([-0.4, 0.1, 0.9], [-0.6, 0.3]), (many, many)]
    weights, numbers = [], []
    for positives, negatives in rows:
        others = torch.tensor([*positives, *negatives], dtype=torch.float64)
        similarity = torch.cat([grid[:, None], others.expand(len(grid), -1)], dim=1)
        positive = torch.tensor([side == "positive"] + [True] * len(positives) + [False] * len(negatives))
        mask = positive.expand(len(grid), -1)
        weights.append(weights_of(row_loss, similarity, mask, ~mask)[side == "negative"][:, 0])
        numbers.append(1 + len(positives if side == "positive" else negatives))
    curve = exact_curve(loss, side)
    if curve is None:
        scaled = [weight * number for weight, number in zip(weights, numbers, strict=True)]
        assert not all(torch.allclose(weight, weights[0], rtol=1e-4) for weight in weights)
        assert not all(torch.allclose(weight, scaled[0], rtol=1e-4) for weight in scaled)
        return
    places = ((grid + 1) / 2 * (len(curve.similarity) - 1)).round().long()
    assert (curve.similarity[places] - grid).abs().max() < 1.1e-3
    for weight, number in zip(weights, numbers, strict=True):
        expected_weight = weight * (number if curve.divided else 1)
        scale = 1 + expected_weight.abs().max()
        # The grid of the curve is as fine as 0.002: its weights are compared where the formula is smooth there.
        differs = (curve.weight[places].double() - expected_weight).abs() > 0.06 * scale
        assert differs.sum() <= 1, (grid[differs], curve.weight[places][differs], expected_weight[differs])


# ---------------------------------------------------------------- single losses
def test_gradient_is_the_assigned_weight():
    x, y, r, ry = unit(6), labels_of(6, 3), unit(10, seed=2), labels_of(10, 3, seed=3)
    _, gradient = value_and_gradient(ml.DirectWeightLoss(ml.Constant(2), ml.Threshold(0.4)), x, y, r, ry)
    positive, negative = masks(y, ry)
    weights = ((x @ r.T > 0.4) & negative).double() - 2 * positive.double()
    torch.testing.assert_close(gradient, weights @ r / 6)


@pytest.mark.parametrize("positive", [name for name in CASES if not isinstance(CASES[name][0], ml.HybridLoss)])
@pytest.mark.parametrize(
    "negative", ["contrastive", "multi-similarity", "triplet", "circle", "SupCon", "direct hardest"]
)
def test_hybrid_takes_each_side_from_its_loss(positive, negative):
    hybrid = ml.HybridLoss(CASES[positive][0], CASES[negative][0])
    x, y, r, ry = (
        unit(8, spread=2.0),
        labels_of(8, 5),
        unit(400, seed=2, spread=2.0),
        labels_of(400, 30, seed=3),
    )
    wanted_positive = CASES[positive][0].pair_weights(x, y, r, ry)[0]
    wanted_negative = CASES[negative][0].pair_weights(x, y, r, ry)[1]
    assert_same(hybrid.pair_weights(x, y, r, ry), (wanted_positive, wanted_negative))
    value, gradient = value_and_gradient(hybrid, x, y, r, ry)
    similarity = x @ r.T
    torch.testing.assert_close(gradient, (wanted_negative - wanted_positive) @ r / 8)
    total = (wanted_positive * (1 - similarity)).sum() + (wanted_negative * similarity).sum()
    torch.testing.assert_close(value, total / 8)


def test_the_flag_needs_negatives_is_right(case):
    """One anchor with the same positives, and beside them near negatives, far ones, or none."""
    loss, _ = case
    x, y, positives = unit(1, spread=3.0), torch.zeros(1, dtype=torch.int64), unit(8, seed=2, spread=3.0)
    near, far = unit(40, seed=3, spread=0.5), unit(40, seed=4, spread=9.0)
    weights = []
    for negatives in (near, far, far[:0]):
        ry = (torch.arange(8 + len(negatives)) >= 8).long()
        weights.append(loss.pair_weights(x, y, torch.cat([positives, negatives]), ry)[0][:, :8])
    same = all(torch.equal(weight, weights[0]) for weight in weights)
    assert same == (not (loss.positive if isinstance(loss, ml.HybridLoss) else loss).needs_negatives)


@pytest.mark.parametrize("soft", [False, True])
def test_triplets_of_an_anchor_with_many_positives_follow_the_formula(soft):
    loss, row_loss = CASES["soft triplet" if soft else "triplet"]
    x, y = unit(6, spread=1.0), labels_of(6, 3)
    r, ry = unit(400, seed=2, spread=1.0), labels_of(400, 5, seed=3)
    assert (y[:, None] == ry).sum(dim=1).min() > 64  # more than are counted one by one
    assert_same(value_and_gradient(loss, x, y, r, ry), expected(row_loss, x, y, r, ry))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("length", [1.0, 1.009])  # the longest that passes as unit length is 1.01
def test_soft_triplets_are_exact_up_to_rounding_for_all_similarities(dtype, tolerance, length):
    loss, row_loss = CASES["soft triplet"]
    x, y = length * unit(4, dim=3, spread=9.0), torch.arange(4)
    r, ry = length * unit(1500, dim=3, seed=2, spread=9.0), labels_of(1500, 3)  # 500 positives for each of 3 anchors
    r = torch.cat([r, x, -x, x, -x])
    ry = torch.cat([ry, torch.full((8,), 8), torch.arange(4).repeat(2)])
    positive, negative = masks(y, ry)
    assert (positive.sum(dim=1)[:3] > 400).all()
    for side in (positive, negative):
        assert (x @ r.T)[side].max() > 0.999 * length**2
        assert (x @ r.T)[side].min() < -0.999 * length**2
    pairs = (x.to(dtype), y, r.to(dtype), ry)
    value, gradient = value_and_gradient(loss, *pairs)
    torch.testing.assert_close(value.double(), expected(row_loss, x, y, r, ry)[0], rtol=tolerance, atol=0)
    wanted = weights_of(row_loss, x @ r.T, positive, negative)
    weights = [actual.double() for actual in loss.pair_weights(*pairs)]
    torch.testing.assert_close(weights, list(wanted), rtol=tolerance, atol=0)
    wanted_gradient = (wanted[1] - wanted[0]) @ r / 4
    assert (gradient - wanted_gradient).norm() <= 3 * tolerance * wanted_gradient.norm()


def test_the_hardest_negatives_are_those_of_the_whole_memory(monkeypatch):
    x, y = unit(16, dim=16), torch.arange(16)
    r, ry = unit(6000, dim=16, seed=2), labels_of(6000, 900, seed=3)
    positive, negative = masks(y, ry)
    top = (x @ r.T).masked_fill(~negative, -2).topk(5, dim=1).indices
    kept = torch.zeros_like(negative).scatter(1, top, True)
    loss = ml.DirectWeightLoss(negative=ml.Constant(), hardest_negatives=5)
    assert torch.equal(loss.pair_weights(x, y, r, ry)[1] > 0, kept)
    for elements in (16 * 300, 1 << 19):
        monkeypatch.setattr(streaming, "BLOCK_ELEMENTS", elements)
        _, gradient = value_and_gradient(loss, x, y, r, ry)
        torch.testing.assert_close(gradient, (kept.double() - positive.double()) @ r / 16)


@pytest.mark.parametrize("name", ["hardest_positives", "hardest_negatives"])
def test_fewer_than_one_hardest_pair_is_refused(name):
    with pytest.raises(ValueError, match=f"Expected `{name}` of at least 1 pair, or None for all, but got 0"):
        ml.DirectWeightLoss(**{name: 0})
