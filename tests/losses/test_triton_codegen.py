"""The generated text of a kernel computes what the loss computes in torch."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_memdml as ml
from lightning_memdml.losses.backends.triton.codegen import Terms, UnsupportedOpError, generate_terms
from lightning_memdml.losses.definition import NegativeTerms

LOSSES: dict[str, ml.PairLoss] = {
    "contrastive": ml.ContrastiveLoss(0.2),
    "multi-similarity": ml.MultiSimilarityLoss(epsilon=None),
    "multi-similarity, mined": ml.MultiSimilarityLoss(epsilon=0.3),
    "binomial deviance": ml.BinomialDevianceLoss(),
    "lifted structure": ml.LiftedStructureLoss(),
    "margin": ml.MarginLoss(),
    "circle": ml.CircleLoss(),
    "InfoNCE": ml.InfoNCELoss(),
    "SupCon": ml.SupConLoss(),
    "NCA": ml.NCALoss(),
    "soft triplet": ml.TripletLoss(soft=True),
    "hybrid": ml.HybridLoss(ml.ContrastiveLoss(), ml.CircleLoss()),
    "normalised": ml.DirectWeightLoss(negative=ml.Exponential(), normalize="sum"),
    "constant": ml.DirectWeightLoss(negative=ml.Constant(2.0)),
    "threshold": ml.DirectWeightLoss(negative=ml.Threshold(0.3)),
    "below": ml.DirectWeightLoss(negative=ml.Threshold(0.3, above=False)),
    "linear": ml.DirectWeightLoss(negative=ml.Linear()),
    "power": ml.DirectWeightLoss(negative=ml.Power(0.1, power=1.5)),
    "square": ml.DirectWeightLoss(negative=ml.Power(0.1, power=2)),
    "sigmoid": ml.DirectWeightLoss(negative=ml.Sigmoid()),
    "band": ml.DirectWeightLoss(negative=ml.Band(-0.2, 0.4)),
}

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "arithmetic": lambda s: 2 / (3 - s) + (1 - s) ** 2 * s - -s / 4,
    "in place": lambda s: s.clone().add_(1).mul_(s).clamp_(0.1, 1.5).sqrt_(),
    "masks": lambda s: (s > -0.5) * (s <= 0.5) + ((s > 0.6) & ~(s >= 0.9) | (s < -0.7)).float(),
    "where": lambda s: torch.where(torch.logical_or(s < -0.3, s > 0.3), s.abs(), 0.25),
    "out": lambda s: torch.lt(s, 0.1, out=torch.empty_like(s)).add(torch.full_like(s, 0.5)),
    "functions": lambda s: torch.relu(s) + torch.sigmoid(s) + s.exp() + (s + 2).log() + torch.square(s) + s.exp2(),
    "roots": lambda s: (s + 2).sqrt() + torch.rsqrt(s + 2),
    "bounds": lambda s: s.clip(max=0.5) + torch.clamp(s, min=-0.2) + torch.maximum(s, s.neg()) + s.clamp_min(0),
    "fills": lambda s: s.masked_fill(s < 0, 0.1) + torch.threshold(s, 0.2, 0.0).type_as(s) + torch.ones_like(s),
}


class Triton:
    """The functions of Triton's language that kernels use, on tensors."""

    PropagateNan = SimpleNamespace(ALL=None)
    abs, exp, exp2, log, log2 = torch.abs, torch.exp, torch.exp2, torch.log, torch.log2
    rsqrt, sigmoid, sqrt, where, zeros_like = torch.rsqrt, torch.sigmoid, torch.sqrt, torch.where, torch.zeros_like
    arange, sum = torch.arange, torch.sum

    @staticmethod
    def maximum(x: Tensor, y: Tensor | float, propagate_nan: None) -> Tensor:
        return torch.maximum(x, torch.as_tensor(y, dtype=x.dtype))

    @staticmethod
    def minimum(x: Tensor, y: Tensor | float, propagate_nan: None) -> Tensor:
        return torch.minimum(x, torch.as_tensor(y, dtype=x.dtype))


def evaluate(terms: Terms, similarity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    names = {"tl": Triton} | {f"column{k}": column for k, column in enumerate(terms.columns)}
    text = "\n ".join(["def run(similarity, constants):", *terms.text.splitlines()])
    exec(text, names)
    return names["run"](similarity, terms.constants)


def check(loss: ml.PairLoss) -> None:
    # The degree of the polynomials of the soft triplet loss depends on the dtype, and that of a kernel is float32.
    dtype = torch.float32 if isinstance(loss, ml.TripletLoss) else torch.float64
    similarity = torch.linspace(-1, 1, 4 * 50, dtype=dtype)[torch.randperm(200)].view(4, 50)
    part = loss.parts[0] if loss.parts else loss
    context = part.context(similarity[:, :5], torch.ones(4, 5, dtype=torch.bool))
    terms = generate_terms(part, context, rows=4)
    weights, values, sums = evaluate(terms, similarity)
    wanted = part.negative_terms(similarity.clone(), context)
    assert terms.num_sums == (0 if wanted.sums is None else wanted.sums.shape[1])
    if wanted.sums is not None:
        torch.testing.assert_close(sums[:, : terms.num_sums], wanted.sums, check_dtype=False)
    torch.testing.assert_close(weights, wanted.weights, check_dtype=False)
    assert terms.has_values == (wanted.values is not None)
    if wanted.values is not None:
        torch.testing.assert_close(values, wanted.values)


@pytest.mark.parametrize("name", LOSSES)
def test_the_text_computes_the_terms_of_the_loss(name: str) -> None:
    check(LOSSES[name])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_a_user_is_translated_too(name: str) -> None:
    check(ml.DirectWeightLoss(negative=FUNCTIONS[name]))


@given(st.lists(st.tuples(st.sampled_from(sorted(FUNCTIONS)), st.floats(0.1, 2)), min_size=1, max_size=4))
def test_compositions_of_functions_are_translated(steps: list[tuple[str, float]]) -> None:
    def function(similarity: Tensor) -> Tensor:
        for name, factor in steps:
            similarity = torch.sigmoid(FUNCTIONS[name](similarity * factor)) - 0.5
        return similarity

    check(ml.DirectWeightLoss(negative=function))


def test_numbers_are_arguments_of_the_kernel() -> None:
    """A margin that moves while training compiles nothing again."""
    loss = ml.ContrastiveLoss(margin=0.5)
    before = generate_terms(loss, (), rows=4)
    loss.margin = 0.7
    after = generate_terms(loss, (), rows=4)
    assert before.text == after.text
    assert (before.constants, after.constants) == ((0.5,), (0.7,))


def test_a_learned_number_is_read_again_in_every_step() -> None:
    threshold = nn.Parameter(torch.tensor(0.5))
    terms = generate_terms(ml.DirectWeightLoss(negative=lambda s: torch.relu(s - threshold.detach())), (), rows=4)
    assert [float(column) for column in terms.columns] == [0.5]
    with torch.no_grad():
        threshold.fill_(0.2)
    torch.testing.assert_close(evaluate(terms, torch.ones(4, 1))[0], torch.full((4, 1), 0.8))


@pytest.mark.parametrize(
    "function",
    [
        lambda s: s / s.sum(dim=1, keepdim=True),
        lambda s: torch.softmax(s, dim=1),
        lambda s: s if s.max() > 0.5 else 1 - s,
        lambda s: s if s[0, 0] > 0.5 else 1 - s,
        lambda s: 1 - s if s > 0.5 else s,
        lambda s: s if s.is_cuda else 1 - s,
        lambda s: s * torch.rand_like(s),
        lambda s: s * torch.arange(s.shape[1]),
        lambda s: s * torch.ones(3, 7),
        lambda s: s.long(),
        lambda s: s.to(torch.float16),
        lambda s: s**3,
        lambda s: s.div(2, rounding_mode="floor"),
        lambda s: s.add(s, alpha=2),
        lambda s: torch.where(torch.ones(1, dtype=torch.bool), s, 0.0),
        lambda s: torch.ones(4, 50),
        ml.Piecewise([0.0, 1.0], [0.0, 1.0]),
    ],
)
def test_an_operation_that_is_not_element_wise_raises(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedOpError):
        generate_terms(ml.DirectWeightLoss(negative=function), (), rows=4)


class Sums(ml.ContrastiveLoss):
    def __init__(self, sums: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.sums = sums

    def negative_terms(self, similarity: Tensor, context: Any) -> NegativeTerms:
        return NegativeTerms(similarity.square(), sums=self.sums(similarity))


@pytest.mark.parametrize(
    "sums",
    [
        lambda s: s.sum(dim=0),
        lambda s: s.sum(),
        lambda s: s.sum(dim=1, keepdim=True),
        lambda s: s.square(),
        lambda s: torch.ones(4, 1),
        lambda s: torch.stack([s.sum(dim=1), s.sum(dim=1)]),
        lambda s: torch.cat([s.sum(dim=1), s.sum(dim=1)]),
        lambda s: s.sum(dim=1) + 1,
    ],
)
def test_further_sums_that_are_not_over_the_rows_raise(sums: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedOpError):
        generate_terms(Sums(sums), (), rows=4)


def test_a_sum_is_of_the_block_as_it_was() -> None:
    """Later operations in place do not change it."""
    terms = generate_terms(Sums(lambda s: torch.stack([s.sum(dim=1), s.mul_(2).sum(dim=1)], dim=1)), (), rows=4)
    similarity = torch.rand(4, 7)
    wanted = torch.stack([similarity.sum(dim=1), 2 * similarity.sum(dim=1)], dim=1)
    torch.testing.assert_close(evaluate(terms, similarity)[2], wanted)


def test_a_loss_that_counts_violations_one_by_one_raises() -> None:
    loss = ml.TripletLoss()
    context = loss.context(torch.rand(4, 5), torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises(UnsupportedOpError):
        generate_terms(loss, context, rows=4)
