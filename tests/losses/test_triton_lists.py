"""The lists of references above a threshold in the Triton kernel, against the blocks in float64."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lightning_memdml as ml
from lightning_memdml.losses import streaming
from lightning_memdml.losses.definition import AnchorTerms, Context, NegativeTerms, NegativeTotals, Pairs
from lightning_memdml.losses.pair_loss import PairLoss

pytest.importorskip("triton", reason="comes with torch for CUDA")

from support.triton_device import DEVICE, DTYPE, TOLERANCE, skip_without_loops

from lightning_memdml.losses.backends.triton import kernel, launching
from lightning_memdml.losses.backends.triton.program import COUNTS, FEWEST_PER_LISTED, PARTS


class OwnThreshold(PairLoss):
    """Weights above a threshold of each anchor, with values and further sums."""

    def context(self, similarity: Tensor, mask: Tensor) -> Context:
        return (0.4 + 0.2 * mask.any(dim=1).to(similarity.dtype),)

    def negative_threshold(self, context: Context) -> Tensor:
        return context[0]

    def negative_terms(self, similarity: Tensor, context: Context) -> NegativeTerms:
        weights = torch.relu(similarity - context[0][:, None])
        return NegativeTerms(weights, weights.square(), torch.stack([weights.sum(dim=1)], dim=1))

    def combine(self, similarity: Tensor, mask: Tensor, context: Context, negatives: NegativeTotals) -> AnchorTerms:
        scale = 1 / (1 + negatives.sums[:, 0])
        return AnchorTerms(negatives.total * scale + negatives.weighted, mask.to(similarity.dtype), scale)


LOSSES: dict[str, ml.PairLoss] = {
    "contrastive": ml.ContrastiveLoss(0.5),
    "direct": ml.DirectWeightLoss(negative=ml.Threshold(0.5), normalize="sum"),
    "margin": ml.MarginLoss(beta=0.8),
    "multi-similarity": ml.MultiSimilarityLoss(),
    "hybrid": ml.HybridLoss(ml.MultiSimilarityLoss(), ml.ContrastiveLoss(0.5)),
    "own": OwnThreshold(),
}
ROWS, REFERENCES, DIM = 70, 1500, 96  # two groups of anchors, and two shares that are no multiple of a tile


@pytest.fixture(autouse=True)
def lists(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Use the kernel on any device. What it lists is collected, one row for each program."""
    skip_without_loops()
    made: list[Tensor] = []
    empty = kernel._empty_lists

    def recorded(programs: int, share: int, device: torch.device) -> Tensor:
        made.append(empty(programs, share, device).fill_(-1))
        return made[-1]

    monkeypatch.setattr(kernel, "_empty_lists", recorded)
    monkeypatch.setattr(launching, "DTYPES", (torch.float16, DTYPE))
    monkeypatch.setattr(streaming, "TRITON_DEVICES", {"cpu", "cuda"})
    for loss in LOSSES.values():
        monkeypatch.setattr(loss, "backend", "triton")
    return made


def pairs(near: Tensor, rows: int = ROWS, dim: int = DIM, dtype: torch.dtype = DTYPE) -> Pairs:
    """Anchors and references far from each other, but for a positive of each, and the references `near`."""
    generator = torch.Generator().manual_seed(0)
    x, r = (F.normalize(torch.randn(n, dim, generator=generator), dim=1) for n in (rows, len(near)))
    noise = 0.6 * torch.randn(len(near), dim, generator=generator) / dim**0.5
    labels, ref_labels = torch.arange(rows), torch.full((len(near),), -1)
    nearest = torch.randint(rows, (len(near),), generator=generator)
    r = torch.where(near[:, None], F.normalize(x[nearest] + noise, dim=1), r)
    for k in range(0, min(2 * rows, len(near)), 2):
        r[k], ref_labels[k] = F.normalize(x[k // 2] + noise[k], dim=0), k // 2
    parts = x.to(dtype).float(), labels, r.to(dtype), ref_labels
    return Pairs(*(part.to(DEVICE) for part in parts))


def some(share: float, references: int = REFERENCES) -> Tensor:
    return torch.rand(references, generator=torch.Generator().manual_seed(1)) < share


def check(loss: ml.PairLoss, of: Pairs, tolerance: float = TOLERANCE) -> None:
    value, gradient = streaming.evaluate(loss, of)
    in_float64 = copy.copy(loss)
    in_float64.backend = "blocks"
    wanted = streaming.evaluate(in_float64, of._replace(anchors=of.anchors.double(), references=of.references.double()))
    for found, exact in zip((value, gradient), wanted, strict=True):
        assert (found - exact).abs().max().item() <= tolerance * exact.abs().max().clamp_min(1e-3).item()


def numbers(lists: list[Tensor]) -> list[int]:
    """How many references each program took in its second phase."""
    return [int(row[PARTS.value]) for made in lists for row in made]


@pytest.mark.parametrize("name", LOSSES)
def test_of_a_trained_network_few_references_take_part_in_the_second_product(name: str, lists: list) -> None:
    check(LOSSES[name], pairs(some(0.02)))
    groups = kernel.triton.cdiv(ROWS, 64)
    assert len(lists) == len(LOSSES[name].parts or [0])
    for made in lists:
        assert 0 < sum(numbers([made])) / (groups * REFERENCES) < 0.04


@pytest.mark.parametrize("name", LOSSES)
def test_before_training_all_references_are_listed_after_a_first_part(name: str, lists: list) -> None:
    of = pairs(some(0.9))
    check(LOSSES[name], of)
    of_first_group = lists[0][: len(lists[0]) // 2]
    counts, width = of_first_group[:, : COUNTS.value], of_first_group.shape[1] - COUNTS.value
    assert (counts[:, 1 : PARTS.value] == counts[:, :1]).all(), "no part was looked at after the first one"
    first_part = 2 * 64  # two tiles
    for share, (first, *_, number) in enumerate(counts[:, : PARTS.value + 1].tolist()):
        plain = (of.ref_labels == -1)[share * width :][:width]
        assert first_part / FEWEST_PER_LISTED.value < first <= first_part
        assert number - first == int(plain[first_part:].sum())


@pytest.mark.parametrize("ends", [(0.0, 0.9), (0.9, 0.0), (0.0, 0.4)])
def test_where_the_memory_changes_the_list_is_still_right(ends: tuple[float, float], lists: list) -> None:
    """Near references are frequent at one end only."""
    share = torch.linspace(*ends, REFERENCES)
    near = torch.rand(REFERENCES, generator=torch.Generator().manual_seed(2)) < share
    check(LOSSES["contrastive"], pairs(near))


def test_a_list_has_what_is_above_the_threshold_of_any_anchor_in_order(lists: list) -> None:
    of = pairs(some(0.1))
    check(LOSSES["contrastive"], of)
    above = (of.anchors @ of.references.float().T > 0.5) & (of.ref_labels == -1)
    shares, width = len(lists[0]) // 2, lists[0].shape[1] - COUNTS.value
    assert shares > 1
    for group, rows in enumerate(above.split(64)):
        wanted = rows.any(dim=0).nonzero().flatten()
        found = lists[0].unflatten(0, (2, shares))[group]
        for share, row in enumerate(found):
            own = wanted[(wanted >= share * width) & (wanted < (share + 1) * width)]
            assert row[COUNTS.value :][: row[PARTS.value]].tolist() == own.tolist()
            assert all(a <= b for a, b in pairwise(row[: PARTS.value + 1].tolist()))
            assert 0 < len(own) < width / FEWEST_PER_LISTED.value


def test_nothing_above_the_threshold(lists: list) -> None:
    loss = ml.ContrastiveLoss(1.0, backend="triton")
    check(loss, pairs(some(0.5)))
    assert set(numbers(lists)) == {0}


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 140), references=st.integers(1, 700), dim=st.sampled_from([1, 17, 128, 130]),
    share=st.sampled_from([0.0, 0.03, 0.3, 1.0]), name=st.sampled_from(sorted(LOSSES)),
)  # fmt: skip
def test_any_shape(rows: int, references: int, dim: int, share: float, name: str) -> None:
    check(LOSSES[name], pairs(some(share, references), rows, dim), 10 * TOLERANCE)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # of the interpreter
@pytest.mark.parametrize("name", ["contrastive", "multi-similarity", "own"])
def test_numbers_that_are_not_finite_stay_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without lists: a reference of NaN is in the gradient of each anchor, an anchor of NaN at most in its own."""
    for where in ("anchors", "references"):
        of = pairs(some(0.02))
        getattr(of, where)[-5] = torch.nan
        found = streaming.evaluate(LOSSES[name], of)[1].isnan()
        with monkeypatch.context() as patch:
            patch.setattr(kernel, "LISTS", False)
            assert torch.equal(found, streaming.evaluate(LOSSES[name], of)[1].isnan())
        assert found.all() if where == "references" else not found[:-5].any()


def test_in_half_precision_with_lists() -> None:
    for name in ("contrastive", "multi-similarity", "margin"):
        check(LOSSES[name], pairs(some(0.02), dtype=torch.float16), 2e-3)


@pytest.mark.parametrize("loss", [ml.SupConLoss(), ml.BinomialDevianceLoss(), ml.ContrastiveLoss(-1.0)])
def test_a_loss_without_a_threshold_has_no_lists(loss: ml.PairLoss, lists: list) -> None:
    loss.backend = "triton"
    check(loss, pairs(some(0.02, 300)))
    assert lists == []


def test_lists_can_be_turned_off_to_compare(lists: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "LISTS", False)
    for name in ("contrastive", "own"):
        check(LOSSES[name], pairs(some(0.02)))
    assert lists == []
