"""The bfloat16 prefilter skips no reference and no pair that has a weight, and its error bound holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lightning_memdml as ml
from lightning_memdml import bfloat16
from lightning_memdml.bfloat16_copy import round_rows
from lightning_memdml.losses import accumulators, streaming
from lightning_memdml.losses.backends import bfloat16_prefilter
from lightning_memdml.losses.backends.bfloat16_prefilter import BFloat16Prefilter
from lightning_memdml.losses.definition import Pairs

LOSSES = {
    "contrastive": ml.ContrastiveLoss(margin=0.6),
    "multi-similarity": ml.MultiSimilarityLoss(),  # a threshold for each anchor
    "triplet": ml.TripletLoss(),
    "direct, hardest": ml.DirectWeightLoss(negative=ml.Threshold(0.6), hardest_negatives=3),
    "hybrid": ml.HybridLoss(ml.MultiSimilarityLoss(), ml.ContrastiveLoss(margin=0.9)),  # two thresholds
}


@pytest.fixture
def filtered(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Use the prefilter on any processor, in blocks of 512 columns. The list collects its result for each block."""
    monkeypatch.setattr(bfloat16, "has_fast_bf16_matmul", lambda device: True)
    monkeypatch.setattr(streaming, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    found: list[Tensor] = []

    def record(name: str) -> None:
        reached = getattr(BFloat16Prefilter, name)

        def recorded(self: BFloat16Prefilter, *args: Any) -> Tensor:
            found.append(reached(self, *args))
            return found[-1]

        monkeypatch.setattr(BFloat16Prefilter, name, recorded)

    record("may_be_above")
    record("pairs_that_may_be_above")
    return found


def rows(count: int, dim: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    """Embeddings around 50 directions, and which of them."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(50, dim, generator=torch.Generator().manual_seed(9)), dim=1)
    labels = torch.randint(0, 50, (count,), generator=generator)
    noise = F.normalize(torch.randn(count, dim, generator=generator), dim=1)
    return F.normalize(centres[labels] + spread * noise, dim=1), labels


def evaluated(loss: ml.PairLoss, *args: Tensor) -> tuple[Tensor, Tensor]:
    x, y, r, ry = args
    return streaming.evaluate(loss, Pairs(x, y, r, ry, None, None))


@pytest.mark.parametrize("by_pairs", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize("name", LOSSES)
def test_the_prefilter_changes_no_result(
    name: str, scale: float, by_pairs: bool, filtered: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the negatives with weight are mislabelled, so blocks have few of them but all have some."""
    monkeypatch.setattr(bfloat16_prefilter, "SPARSE_SHARE", -1.0 if by_pairs else torch.inf)
    loss = LOSSES[name]
    (x, y), (r, ry) = rows(12, 128, 0.5, seed=0), rows(3000, 128, 0.5, seed=1)
    ry = torch.where(torch.arange(3000) % 40 == 0, 50, ry)
    value, gradient = evaluated(loss, x, y, scale * r, ry)
    assert len(filtered) >= 3
    assert {reached.ndim for reached in filtered} == {2 if by_pairs else 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bfloat16, "has_fast_bf16_matmul", lambda device: False)
        plain = evaluated(loss, x, y, scale * r, ry)
    torch.testing.assert_close((value, gradient), plain, rtol=1e-5, atol=1e-5 * scale)


@settings(max_examples=60, deadline=None)
@given(
    dim=st.sampled_from([64, 65, 300]),
    logarithm=st.integers(-12, -3),
    seed=st.integers(0, 5),
    scale=st.sampled_from([0.01, 1.0, 7.0]),
    other_thresholds=st.lists(st.sampled_from([torch.inf, -0.25, 0.0, 0.3]), min_size=3, max_size=3),
    parts=st.sampled_from(["number", "tensor", "both"]),
)
def test_no_column_above_a_threshold_is_skipped(
    dim: int, logarithm: int, seed: int, scale: float, other_thresholds: list[float], parts: str
) -> None:
    """Similarities are closer to a threshold than bfloat16 can resolve."""
    (x, _), (noise, _) = rows(4, dim, 1.0, seed), rows(600, dim, 1.0, seed + 50)
    noise = F.normalize(noise - (noise @ x[:1].T) * x[:1], dim=1)
    wanted = 0.6 + 2.0**logarithm * torch.linspace(-1, 1, 600)[:, None]
    r = scale * (wanted * x[:1] + (1 - wanted**2).sqrt() * noise)
    threshold = scale * torch.tensor([0.6, *other_thresholds])
    thresholds = {"number": [0.6 * scale], "tensor": [threshold], "both": [threshold, 0.6 * scale]}[parts]
    lowest = torch.stack([threshold.expand(4) for threshold in map(torch.as_tensor, thresholds)]).amin(dim=0)[:, None]
    similarity = x.double() @ r.double().T
    reached = BFloat16Prefilter(x).may_be_above(round_rows(r), thresholds)
    assert (reached | (similarity <= lowest).all(dim=0)).all()
    assert (~reached | (similarity > lowest - 0.025 * scale).any(dim=0)).all()
    pairs = BFloat16Prefilter(x).pairs_that_may_be_above(round_rows(r), thresholds)
    assert (pairs | (similarity <= lowest)).all()
    assert (~pairs | (similarity > lowest - 0.025 * scale) | (lowest < 0.025 * scale)).all(), "near 0 all are kept"


@pytest.mark.parametrize(("rows", "anchors"), [(1, 1), (7, 3), (256, 16), (2048, 64)])
def test_a_product_is_not_rounded_before_the_threshold_is_subtracted(rows: int, anchors: int) -> None:
    """The bound relies on it: 257 in bfloat16 is 256."""
    x, r = torch.ones(anchors, 257).bfloat16(), torch.ones(rows, 257).bfloat16()
    assert (F.linear(r, x, torch.full((anchors,), -256.0).bfloat16()) == 1.0).all()


@pytest.mark.parametrize(("rows", "anchors"), [(1, 1), (7, 3), (256, 16), (2048, 64)])
def test_a_product_is_rounded_once(rows: int, anchors: int) -> None:
    """To the nearest number or toward 0: one that is above a number of bfloat16 is not below it when it is rounded."""
    generator = torch.Generator().manual_seed(0)
    x, r = (torch.rand(count, 300, generator=generator).bfloat16() for count in (anchors, rows))
    exact = x.double() @ r.double().T
    rounded_down = (exact.float() * (1 - 2.0**-14)).view(torch.int32) >> 16
    assert (torch.mm(x, r.T).view(torch.int16) >= rounded_down).all()


@pytest.mark.parametrize("length", [1.0, 2.0**-20, 2.0**20])
def test_roundings_in_one_direction_skip_no_column(length: float) -> None:
    """All numbers are rounded down by nearly 2^-8 of themselves, so every product is by twice as much."""
    for dim in range(64, 129):
        x = torch.full((1, dim), 2.0**-3 * (1 + 2.0**-8))
        similarity = (x.double() @ x.T.double()).item() * length
        thresholds = [similarity * (1 - 1e-6), torch.tensor([similarity * (1 - 1e-6)])]
        for threshold in thresholds:
            assert BFloat16Prefilter(x).may_be_above(round_rows(length * x), [threshold]).all()
            assert BFloat16Prefilter(x).pairs_that_may_be_above(round_rows(length * x), [threshold]).all()
        assert not BFloat16Prefilter(x).may_be_above(round_rows(length * x), [1.03 * similarity]).any()
        assert not BFloat16Prefilter(x).pairs_that_may_be_above(round_rows(length * x), [1.03 * similarity]).any()


@pytest.mark.parametrize("one_threshold", [True, False])
def test_pairs_above_are_those_above_a_threshold(one_threshold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`None` means more than a tenth of all pairs, or of those with the first references."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    similarity = torch.zeros(3, 2000)
    threshold = 0.5 if one_threshold else torch.tensor([0.5, 0.7, 0.9])
    rows, columns = torch.tensor([0, 0, 1, 2]), torch.tensor([3, 1999, 300, 700])
    similarity[rows, columns] = 0.95

    def found(similarity: Tensor, excluded: Tensor | None = None) -> list[list[int]] | None:
        share, pairs = accumulators.pairs_above(similarity, threshold, excluded)
        assert pairs is None or share == len(pairs.rows) / similarity.numel()
        return None if pairs is None else torch.stack([pairs.rows, pairs.columns], dim=1).tolist()

    assert found(similarity) == [[0, 3], [0, 1999], [1, 300], [2, 700]]
    assert found(similarity, torch.tensor([3, 2300])) == [[0, 1999], [2, 700]]
    assert found(similarity, torch.arange(2000) < 400) == [[0, 1999], [2, 700]]
    similarity[1, : accumulators.SAMPLE] = 0.95
    assert found(similarity) is None
    assert len(found(similarity.flip(1)) or ()) == accumulators.SAMPLE + 4
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert found(similarity.flip(1)) is None, "products use all threads, lists one"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    similarity[1] = 0.95
    similarity[1, : accumulators.SAMPLE] = 0.0
    assert found(similarity) is None


@pytest.mark.parametrize(
    ("margin", "threads", "ways"),
    [(0.95, 16, {1}), (0.62, 1, {2}), (0.62, 16, set()), (-0.5, 1, set())],
    ids=["references", "pairs", "pairs on many threads", "none"],
)
def test_the_share_of_pairs_decides_what_is_skipped(
    margin: float, threads: int, ways: set[int], filtered: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    (x, y), (r, _) = rows(64, 128, 0.7, seed=0), rows(3000, 128, 0.7, seed=1)
    nowhere = torch.full((3000,), 99)
    share = (x @ r.T > margin).double().mean()
    assert {0.95: share < 0.25 / 64, 0.62: 0.1 / 16 < share < 0.1, -0.5: share > 0.1}[margin]
    value, _ = evaluated(ml.ContrastiveLoss(margin), x, y, r, nowhere)
    assert {reached.ndim for reached in filtered} == ways
    similarity = x.double() @ r.double().T
    wanted = torch.where(similarity > margin, similarity, 0.0).sum(dim=1)
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-4)


def test_it_is_not_used_where_many_columns_are_above_a_threshold(filtered: list[Tensor]) -> None:
    (x, y), (r, ry) = rows(12, 64, 0.2, seed=0), rows(3000, 64, 0.2, seed=1)
    evaluated(ml.ContrastiveLoss(margin=-0.9), x, y, r, ry)
    evaluated(ml.SupConLoss(), x, y, r, ry)
    assert not filtered
    evaluated(ml.ContrastiveLoss(margin=0.9), x, y, r, ry)
    assert filtered


def test_a_row_that_is_not_finite_skips_no_other(filtered: list[Tensor]) -> None:
    loss = ml.ContrastiveLoss(margin=0.6)
    (x, y), (r, _) = rows(12, 128, 0.5, seed=0), rows(3000, 128, 0.5, seed=1)
    nowhere = torch.full((3000,), 99)  # all are negatives, the near ones with weight
    r[700] = torch.nan
    value, _ = evaluated(loss, x, y, r, nowhere)
    assert any(reached.all() for reached in filtered)
    finite = torch.arange(3000) != 700
    torch.testing.assert_close(value, evaluated(loss, x, y, r[finite], nowhere[finite])[0])
