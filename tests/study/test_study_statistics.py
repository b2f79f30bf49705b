"""The statistics of a study, against tables of Student's t and numbers computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_memdml.study.statistics import (
    Estimate,
    Interval,
    class_interval,
    detectable_difference,
    estimate,
    holm,
    judge,
)

# From printed tables of Student's t: degrees of freedom, tail, t.
TABLE = [
    (1, 0.025, 12.706),
    (2, 0.025, 4.303),
    (4, 0.025, 2.776),
    (4, 0.005, 4.604),
    (9, 0.05, 1.833),
    (30, 0.01, 2.457),
]


@pytest.mark.parametrize(("freedom", "tail", "t"), TABLE)
def test_intervals_and_p_values_are_those_of_students_tables(freedom: int, tail: float, t: float) -> None:
    found = Estimate(1.0, 2.0, freedom)
    assert found.interval(1 - 2 * tail) == pytest.approx((1 - 2 * t, 1 + 2 * t), abs=2e-3)
    assert found.tails(1 - 2 * t) == pytest.approx((tail, 1 - tail), rel=2e-3)
    assert found.tails(1 + 2 * t) == pytest.approx((1 - tail, tail), rel=2e-3)


def test_one_degree_of_freedom_is_cauchys_distribution() -> None:
    """Its tail has a closed form, also far out where tables end."""
    for t in (0.0, 0.3, 5.0, 1000.0):
        assert Estimate(0.0, 1.0, 1).tails(-t)[0] == pytest.approx(0.5 - math.atan(t) / math.pi, rel=1e-9)


def test_mean_over_seeds_by_hand() -> None:
    """1, 2, 3: mean 2, standard deviation 1, standard error 1/sqrt(3), t of 2 degrees 4.303."""
    found = estimate([[1.0, 2.0, 3.0]])
    assert (found.mean, found.freedom) == (2.0, 2.0)
    assert found.interval(0.95) == pytest.approx((2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-3)


def test_data_sets_count_alike_whatever_their_spread() -> None:
    """Means 1 and 5, variances of the means 1/3 and 4/3: mean 3, error sqrt(5/3)/2, Welch's degrees of freedom."""
    found = estimate([[0.0, 1.0, 2.0], [3.0, 5.0, 7.0]])
    assert found.mean == 3.0
    assert found.error == pytest.approx(math.sqrt(1 / 3 + 4 / 3) / 2)
    assert found.freedom == pytest.approx((5 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2))


def test_one_seed_says_nothing_about_the_spread() -> None:
    found = estimate([[3.0]])
    assert found.interval() == (-math.inf, math.inf)
    (judgement,) = judge([(found, "more", 0.0)])
    assert judgement.verdict == "undecided"
    assert estimate([[1.0, 2.0], [3.0]]).interval() == (-math.inf, math.inf), "of one of two data sets neither"


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """5 values of a normal distribution, 2,000 times: 95 % within the noise of the count."""
    draws = np.random.default_rng(0).normal(7, 3, size=(2000, 5))
    covered = [low <= 7 <= high for low, high in (estimate([values.tolist()]).interval(0.95) for values in draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 2000))


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.03, 0.2, times 4, 3, 2, 1, and never below the one before."""
    assert holm([0.03, 0.01, 0.2, 0.02]) == pytest.approx([0.06, 0.04, 0.2, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("mean", "expects", "verdict"),
    [
        (5.0, "more", "supported"),
        (-5.0, "more", "contradicted"),
        (0.0, "more", "contradicted"),  # there, a difference that counts can be excluded
        (1.1, "more", "undecided"),
        (0.0, "not more", "supported"),
        (5.0, "not more", "contradicted"),
        (-5.0, "not more", "supported"),
        (0.0, "same", "supported"),
        (5.0, "same", "contradicted"),
        (-5.0, "same", "contradicted"),
        (-0.9, "same", "undecided"),
    ],
)
def test_verdict_is_where_the_whole_interval_lies(mean: float, expects: str, verdict: str) -> None:
    """Error 0.1 with 4 degrees of freedom: a one-sided test at 5 % needs a distance of 0.213."""
    (judgement,) = judge([(Estimate(mean, 0.1, 4), expects, 1.0)])
    assert judgement.verdict == verdict
    assert judgement.level == pytest.approx(0.9)
    assert judgement.interval == pytest.approx((mean - 0.21318, mean + 0.21318), abs=1e-4)


def test_verdict_and_interval_agree_in_every_case() -> None:
    """The reported interval at the reported level lies in the region if and only if the verdict is `supported`."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        claims = [
            (Estimate(generator.normal(0, 3), generator.uniform(0.05, 1), 4), expects, 1.0)
            for expects in generator.choice(["more", "not more", "same"], size=5).tolist()
        ]
        for (_, expects, points), judgement in zip(claims, judge(claims), strict=True):
            low, high = judgement.interval
            regions = {"more": (points, math.inf), "not more": (-math.inf, points), "same": (-points, points)}
            start, stop = regions[expects]
            inside, outside = low >= start and high <= stop, high <= start or low >= stop
            assert (judgement.verdict == "supported") == inside
            if expects == "same":  # contradicted from either side, which adds the two tails
                assert outside or judgement.verdict != "contradicted"
            else:
                assert (judgement.verdict == "contradicted") == outside


@pytest.mark.parametrize(("expects", "points"), [("more", 0.0), ("more", 1.0), ("not more", 1.0), ("same", 1.0)])
def test_any_verdict_is_wrong_at_most_as_often_as_stated(expects: str, points: float) -> None:
    """Six claims whose true difference is exactly at the edge, the worst case: any wrong verdict in 2,000 studies."""
    draws = np.random.default_rng(1).normal(points, 1.0, size=(2000, 6, 5))
    studies = [judge([(estimate([seeds.tolist()]), expects, points) for seeds in study]) for study in draws]
    share = np.mean([any(one.verdict == "supported" for one in study) for study in studies])
    assert share <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_wrong_verdicts_beside_right_ones_are_as_rare() -> None:
    """Holm's later steps are less strict: clear claims must not make borderline ones wrong too often."""
    centers = np.array([9.0, -9.0, 9.0, 0.0, 0.0, 0.0])
    draws = np.random.default_rng(2).normal(centers[:, None], 1.0, size=(2000, 6, 5))
    studies = [judge([(estimate([seeds.tolist()]), "more", 0.0) for seeds in study]) for study in draws]
    share = np.mean([any(one.verdict == "supported" for one in study[3:]) for study in studies])
    assert share <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


@pytest.mark.parametrize(("seeds", "claims"), [(3, 1), (5, 4), (10, 12)])
def test_the_detectable_difference_is_decided_in_four_of_five_studies(seeds: int, claims: int) -> None:
    difference = detectable_difference(seeds, claims)
    draws = np.random.default_rng(3).normal(1.0 + difference, 1.0, size=(2000, seeds))
    alpha = 0.05 / claims
    decided = np.mean([estimate([values.tolist()]).tails(1.0)[0] <= alpha for values in draws])
    assert decided == pytest.approx(0.8, abs=3 * math.sqrt(0.8 * 0.2 / 2000))


def test_the_more_claims_the_wider_the_interval() -> None:
    clear, unclear = Estimate(9.0, 0.1, 4), Estimate(0.5, 0.1, 4)
    first, second, third = judge([(unclear, "more", 0.5), (clear, "more", 0.5), (clear, "more", 0.5)])
    assert sorted([first.level, second.level, third.level]) == pytest.approx([0.9, 0.95, 1 - 0.1 / 3])
    assert first.level == pytest.approx(0.9), "the hardest comes last"


def test_no_spread_at_all_decides() -> None:
    assert judge([(Estimate(2.0, 0.0, 4), "more", 1.0)])[0].verdict == "supported"
    assert judge([(Estimate(1.0, 0.0, 4), "more", 1.0)])[0].verdict == "undecided", "just on the edge"


def test_class_interval_weighs_classes_by_their_queries() -> None:
    """Two classes, 0 with 30 queries and 1 with 10: drawn are (0, 0), (0, 1) twice, (1, 1), so 0, 1/4 and 1."""
    low, high = class_interval([([0.0, 1.0], [30, 10])], confidence=0.95, resamples=4000)
    assert (low, high) == (0.0, 1.0)
    low, high = class_interval([([0.0, 1.0], [30, 10])], confidence=0.4, resamples=4000)
    assert (low, high) == (0.25, 0.25)


def test_class_interval_is_that_of_the_normal_limit_for_many_classes() -> None:
    values = np.random.default_rng(2).normal(10, 2, size=400)
    reach = 1.96 * values.std() / 20
    found = class_interval([(values, np.ones(400))], resamples=4000)
    assert found == pytest.approx((values.mean() - reach, values.mean() + reach), abs=0.03)
    twice = class_interval([(values, np.ones(400)), (values, np.ones(400))], resamples=4000)
    assert twice.high - twice.low == pytest.approx((found.high - found.low) / math.sqrt(2), rel=0.1)
    assert isinstance(found, Interval)
