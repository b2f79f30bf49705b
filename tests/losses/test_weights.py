"""The contract of every weight function: its formula, where it is 0, and the arguments it refuses."""

import inspect
import re

import pytest
import torch
from support.losses import missing_in_docstring, public_classes, weight_cases, without_case

import lightning_memdml as ml

GRID = torch.linspace(-1, 1, 401, dtype=torch.float64)
CURVES = weight_cases()
WEIGHTS = public_classes(ml.WeightFunction)


@pytest.fixture(params=CURVES, name="case")
def _case(request):
    return CURVES[request.param]


def test_the_curve_is_the_formula(case):
    weight, formula = case
    wanted = torch.tensor([formula(float(s)) for s in GRID], dtype=torch.float64)
    before = GRID.clone()
    torch.testing.assert_close(weight(GRID), wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(before, GRID), "the argument was changed"


def test_weights_are_0_at_and_below_the_similarity_a_function_states(case):
    """A function without such a similarity has a weight at the lowest one, so no pair can be skipped."""
    weight, _ = case
    if weight.zero_below == -torch.inf:
        assert weight(GRID[:1]) > 0
        return
    low = torch.cat([GRID[weight.zero_below >= GRID], torch.tensor([weight.zero_below], dtype=torch.float64)])
    assert not weight(low).any()
    assert weight(GRID[weight.zero_below < GRID][:40]).any(), "more pairs could be skipped"


def test_every_weight_function_has_a_formula_beside_it():
    assert without_case(WEIGHTS, CURVES) == [], "add it to tests/losses/oracles/weights.py"


@pytest.mark.parametrize("cls", WEIGHTS, ids=lambda cls: cls.__name__)
def test_every_weight_function_is_exported_and_documented(cls):
    assert getattr(ml, cls.__name__, None) is cls
    assert getattr(ml.losses, cls.__name__, None) is cls
    assert missing_in_docstring(cls) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ml.Constant(-1.0), "`value` of at least 0 but got -1"),
        (lambda: ml.Threshold(1.5), r"`threshold` to be a cosine similarity in \[-1, 1\] but got 1.5"),
        (lambda: ml.Power(1.0), r"`threshold` to be a cosine similarity in \[-1, 1\)"),
        (lambda: ml.Power(power=0.0), "`power` above 0 but got 0"),
        (lambda: ml.Sigmoid(threshold=-2.0), "`threshold` to be a cosine similarity"),
        (lambda: ml.Band(0.5, 0.5), "`low` below `high`"),
        (lambda: ml.Piecewise([0.0], [1.0]), "at least two"),
        (lambda: ml.Piecewise([0.0, 0.0], [1.0, 1.0]), "ascending"),
        (lambda: ml.Piecewise([0.0, 1.0], [1.0, -1.0]), "at least 0"),
        (lambda: ml.Piecewise([0.0, 1.0], [1.0, float("nan")]), "at least 0"),
        (lambda: ml.Piecewise([0.0, float("nan")], [1.0, 1.0]), "ascending"),
        (lambda: ml.ContrastiveLoss(2.0), "`margin` to be a cosine similarity"),
        (lambda: ml.MultiSimilarityLoss(beta=0.0), "`beta` above 0 but got 0"),
        (lambda: ml.MarginLoss(beta=3.0), r"`beta` to be a distance in \(0, 2\)"),
        (lambda: ml.InfoNCELoss(-0.1), "`temperature` above 0"),
        (lambda: ml.DirectWeightLoss(normalize="max"), '`normalize` to be None, "sum" or "mean" but got \'max\''),
        (lambda: ml.DirectWeightLoss(positive_scale=-1.0), "`positive_scale` of at least 0 but got -1"),
        (lambda: ml.DirectWeightLoss(dropped_positives=-1), "`dropped_positives` of at least 0 pairs but got -1"),
        (lambda: ml.InverseDistance(power=0.0), "`power` above 0 but got 0"),
        (lambda: ml.InverseDistance(radius=2.0), r"`radius` to be a distance in \(0, 2\) but got 2"),
    ],
)
def test_arguments_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


NUMBERS = [
    (cls, name)
    for cls in (getattr(ml, name) for name in ml.__all__)
    if isinstance(cls, type) and issubclass(cls, ml.PairLoss | ml.WeightFunction)
    for name, parameter in inspect.signature(cls).parameters.items()
    if type(parameter.default) is float
]


@pytest.mark.parametrize(("cls", "name"), NUMBERS, ids=[f"{cls.__name__}-{name}" for cls, name in NUMBERS])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_named(cls, name, wrong):
    first = (ml.ContrastiveLoss(), ml.ContrastiveLoss()) if cls is ml.HybridLoss else ()
    with pytest.raises(ValueError, match=rf"Expected `{name}` .*{wrong}"):
        cls(*first, **{name: wrong})


@pytest.mark.parametrize("side", ["positive", "negative"])
@pytest.mark.parametrize(
    ("function", "same"),
    [
        (lambda s: s > 0.3, ml.Threshold(0.3)),
        (lambda s: (s > 0.3).long(), ml.Threshold(0.3)),
        (lambda s: 2.0, ml.Constant(2)),
        (lambda s: (s > 0.3).double(), ml.Threshold(0.3)),
    ],
    ids=["truth values", "integers", "one number", "another precision"],
)
def test_a_function_may_return_truth_values_or_one_number(function, same, side):
    generator = torch.Generator().manual_seed(0)
    x, r = (torch.nn.functional.normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (16, 300))
    y, ry = torch.arange(16) // 4, torch.arange(300) % 4
    for arguments in ((x, y), (x, y, r, ry)):
        given, expected = (ml.DirectWeightLoss(**{side: weight})(*arguments) for weight in (function, same))
        assert torch.equal(given, expected)


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_an_argument_that_is_not_a_weight_function_is_named(side):
    x = torch.eye(4)
    for wrong in (1.0, "Threshold"):
        message = f"Expected `{side}` to be a function of similarities but got {wrong!r}. Pass one such as Constant(1)."
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            ml.DirectWeightLoss(**{side: wrong})
    with pytest.raises(ValueError, match=r"weights of shape \(4, \d\), one for each similarity, but got \(\)"):
        ml.DirectWeightLoss(**{side: torch.sum})(x, torch.tensor([0, 0, 1, 1]))
    with pytest.raises(TypeError, match=r"to return a tensor of weights but got ndarray\. Compute them with torch\.$"):
        ml.DirectWeightLoss(**{side: lambda s: s.numpy()})(x, torch.tensor([0, 0, 1, 1]))


def test_a_hybrid_names_wrong_options():
    with pytest.raises(ValueError, match='`normalize` to be None, "sum" or "mean"'):
        ml.HybridLoss(ml.ContrastiveLoss(), ml.ContrastiveLoss(), normalize="max")
    with pytest.raises(ValueError, match="`negative_scale` of at least 0"):
        ml.HybridLoss(ml.ContrastiveLoss(), ml.ContrastiveLoss(), negative_scale=-1)


def test_a_hybrid_of_hybrids_is_refused():
    hybrid = ml.HybridLoss(ml.ContrastiveLoss(), ml.ContrastiveLoss())
    with pytest.raises(TypeError, match="PairLoss other than HybridLoss"):
        ml.HybridLoss(hybrid, ml.ContrastiveLoss())


@pytest.mark.parametrize("center", [2.07, 2.2])
def test_normalised_weights_below_the_smallest_float_stay_finite(center):
    """Weights of about 1e-38 to 1e-44: the reciprocal of their sum is beyond the range of float32."""
    loss = ml.DirectWeightLoss(negative=ml.Exponential(80, center), normalize="sum")
    x = torch.nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    x.requires_grad_()
    value = loss(x, torch.arange(8) // 2, x.detach().clone(), torch.arange(8) // 2)
    value.backward()
    assert value.isfinite()
    assert x.grad.isfinite().all()
