"""The verdicts of a study, from made-up scores: per data set, with a control, and with every average taken apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.studies import CLAIM, frozen, results

from lightning_memdml.study.pictures import break_name
from lightning_memdml.study.report import _html_cell, power_in_words, rule_in_words
from lightning_memdml.study.statistics import Estimate, Expectation, Interval, Judgement, Verdict, joint_verdict
from lightning_memdml.study.tables import claims_table, members_table, scores_table


def test_every_data_set_has_its_own_verdict(tmp_path: Path) -> None:
    """+0.2 and +3.9 points: an average of +2 hides that the first set shows nothing."""
    found = results(tmp_path, {"birds": {"a": 10.2, "b": 10}, "groceries": {"a": 23.9, "b": 20}})
    (judged,) = found.claims()
    assert judged.per_data["birds"].verdict != "supported"
    assert judged.per_data["groceries"].verdict == "supported"
    table = claims_table([judged], ["birds", "groceries"])
    assert table.head[4:6] == ["birds", "groceries"]
    assert table.rows[0][5].startswith("supported: +")


def test_data_sets_of_opposite_sign_have_no_joint_verdict(tmp_path: Path) -> None:
    (judged,) = results(tmp_path, {"birds": {"a": 7, "b": 10}, "groceries": {"a": 40, "b": 20}}).claims()
    assert judged.verdict == "data sets differ"
    assert [one.verdict for one in judged.per_data.values()] == ["contradicted", "supported"]
    assert judged.joint is None
    row = claims_table([judged], ["birds", "groceries"]).rows[0]
    assert (row[3], row[6], row[7]) == ("none: the data sets differ in sign", "", "")


def test_opposite_verdicts_of_one_sign_are_no_joint_verdict(tmp_path: Path) -> None:
    """The mean of +5.5 points supports a claim of +3 that the birds contradict."""
    means = {"birds": {"a": 11, "b": 10}, "groceries": {"a": 30, "b": 20}}
    (judged,) = results(tmp_path, means, claims={"claim": {**CLAIM, "by": 3}}).claims()
    assert [one.verdict for one in judged.per_data.values()] == ["contradicted", "supported"]
    assert not judged.signs_differ
    assert (judged.verdict, judged.joint) == ("data sets differ", None)
    assert claims_table([judged]).rows[0][3] == "none: the data sets differ"


def test_data_sets_that_are_decided_alike_have_their_common_verdict_whatever_their_signs(tmp_path: Path) -> None:
    """Below and above 0, and by less than 8 points on both. The table gives the p-value of the weaker one."""
    claim = {**CLAIM, "by": 8}
    means = {"birds": {"a": 13, "b": 10}, "groceries": {"a": 18, "b": 20}}
    (judged,) = results(tmp_path, means, claims={"claim": claim}).claims()
    assert (judged.verdict, judged.joint, judged.over_classes) == ("contradicted", None, None)
    row = claims_table([judged], ["birds", "groceries"]).rows[0]
    assert row[3] == "none: the data sets differ in sign"
    assert float(row[7]) == pytest.approx(max(one.p_value for one in judged.per_data.values()), rel=0.1)
    same = {**CLAIM, "expects": "same"}
    means = {"birds": {"a": 13, "b": 10}, "groceries": {"a": 17, "b": 20}}
    (judged,) = results(tmp_path, means, claims={"claim": same}).claims()
    assert (judged.verdict, judged.joint) == ("contradicted", None), "the mean is near 0, each data set is not"


@pytest.mark.parametrize(
    ("expects", "per_data", "mean", "expected"),
    [
        ("more", [("undecided", 1), ("undecided", 2)], "supported", "supported"),
        ("more", [("supported", 2), ("undecided", 1)], "undecided", "undecided"),
        ("more", [("supported", 2), ("supported", 1)], "undecided", "supported"),
        ("more", [("contradicted", 0.1), ("undecided", 9)], "supported", "data sets differ"),
        ("more", [("undecided", -1), ("undecided", 2)], "undecided", "data sets differ"),
        ("same", [("undecided", -1), ("undecided", 2)], "supported", "supported"),
    ],
)
def test_a_joint_verdict_follows_from_the_verdicts_the_signs_and_the_mean(
    expects: Expectation, per_data: list[tuple[Verdict, float]], mean: Verdict, expected: Verdict
) -> None:
    judged = [judgement(*one) for one in per_data]
    assert joint_verdict(expects, judged, judgement(mean, 1)) == expected


def judgement(verdict: Verdict, mean: float) -> Judgement:
    return Judgement(verdict, Estimate(mean, 1.0, 4.0), 0.95, Interval(mean - 3, mean + 3), 0.5)


def test_a_data_set_that_misses_the_control_decides_nothing(tmp_path: Path) -> None:
    means = {
        "birds": {"a": 15, "b": 10, "easy_only": 15},
        "groceries": {"a": 25, "b": 20, "easy_only": 5},
    }
    control = {"compare": "a", "with": "easy_only"}
    found = results(tmp_path, means, control=control)
    assert found.able_to_tell() == {"birds": False, "groceries": True}
    (judged,) = found.claims()
    assert [*judged.per_data] == ["groceries"]
    assert claims_table([judged], ["birds", "groceries"]).rows[0][4] == "not able to tell: the control was not detected"
    assert "Not able to tell: on birds the control was not detected, so no claim is decided" in rule_in_words(found)
    only_birds = results(tmp_path, {"birds": means["birds"]}, control=control)
    (judged,) = only_birds.claims()
    assert judged.verdict == "not able to tell"
    assert claims_table([judged]).rows[0][3] == "the control was not detected"


def test_a_data_set_on_which_no_arm_beats_the_frozen_features_decides_nothing(tmp_path: Path) -> None:
    """The heads on frozen features: on Recall@1 both arms are below the features that they start from."""
    means = {"birds": {"a": 15, "b": 10}, "groceries": {"a": 25, "b": 20}}
    references = (frozen("birds", 16, 30), frozen("groceries", 18, 50))
    on_recall = {**CLAIM, "score": "recall_at_1"}
    found = results(tmp_path, means, references, claims={"claim": CLAIM, "on_recall": on_recall})
    assert found.able_to_tell() == {"birds": False, "groceries": True}
    claim, on_recall_judged = found.claims()
    assert [*claim.per_data] == ["groceries"]
    assert (
        claims_table([claim], ["birds", "groceries"]).rows[0][4] == "not able to tell: no arm beats the frozen features"
    )
    assert [*on_recall_judged.per_data] == ["birds"], "a score of its own decides"
    assert "on birds no arm beats the frozen features" in rule_in_words(found)
    rows = {row[0]: row for row in scores_table(found, "birds").rows}
    assert rows["frozen features (no training)"][2] == "16.0"


def test_references_decide_nothing_before_all_arms_are_finished(tmp_path: Path) -> None:
    found = results(tmp_path, {"birds": {"a": 15, "b": 10}}, (frozen("birds", 16, 40),))
    del found.records[0]
    assert found.able_to_tell() == {"birds": None}


def test_an_average_over_losses_is_taken_apart(tmp_path: Path) -> None:
    """One bad arm makes the average: without it the plain loss is not better."""
    claim = {"compare": "plain", "with": ["ms", "supcon", "lifted"], "expects": "more", "by": 0.5}
    means = {"birds": {"plain": 10, "ms": 11, "supcon": 10, "lifted": 1}}
    found = results(tmp_path, means, claims={"beats": claim})
    (judged,) = found.claims()
    assert judged.verdict == "supported"
    alone, without = judged.members["lifted"]
    assert alone == pytest.approx(9, abs=1)
    assert without == pytest.approx(-0.5, abs=0.7)
    assert [row[1] for row in members_table([judged]).rows] == ["ms", "supcon", "lifted"]


def test_the_difference_in_the_other_scores_stands_beside(tmp_path: Path) -> None:
    found = results(tmp_path, {"birds": {"a": 15, "b": 10}})
    (judged,) = found.claims()
    assert judged.other_scores["recall_at_1"] == pytest.approx(5)
    assert "Recall@1 +5.0" in claims_table([judged]).rows[0][-1]


def test_missing_runs_leave_a_claim_undecided(tmp_path: Path) -> None:
    found = results(tmp_path, {"birds": {"a": 15, "b": 10}})
    del found.records[0]
    (judged,) = found.claims()
    assert (judged.verdict, judged.missing) == ("undecided", 1)
    assert claims_table([judged]).rows[0][3] == "1 runs missing"


def test_the_report_names_the_difference_that_the_seeds_can_show(tmp_path: Path) -> None:
    found = results(tmp_path, {"birds": {"a": 15, "b": 10}})
    assert "With 5 seeds, a claim is decided with a probability of 80 %" in power_in_words(found.study)
    assert "by 1.4 standard deviations" in power_in_words(found.study)
    assert (
        power_in_words(results(tmp_path, {"birds": {"a": 1, "b": 1}}, seeds=[0]).study) == "One seed decides no claim."
    )


def test_after_a_search_the_detectable_difference_is_given_in_points(tmp_path: Path) -> None:
    """1.36 standard deviations of a difference of two runs, each with the noise of the search."""
    options = {"rate": {"model.rate": [0.1, 0.2]}}
    study = results(tmp_path, {"birds": {"a": 15, "b": 10}}, search={"options": options}).study
    assert power_in_words(study, noise=0.8).endswith(
        f"If test scores vary between seeds as in the search, that is up to {1.36 * 2**0.5 * 0.8:.1f} points."
    )
    on_recall = results(
        tmp_path, {"birds": {"a": 1, "b": 1}}, search={"options": options, "score": "recall_at_1"}
    ).study
    assert power_in_words(on_recall, noise=0.8) == power_in_words(study), "the noise of another score"


def test_an_interval_of_few_seeds_stays_within_the_possible_scores(tmp_path: Path) -> None:
    """Student's t over two seeds reaches from -140 to 180 %."""
    found = results(tmp_path, {"birds": {"a": 20, "b": 10}}, seeds=[0, 1])
    found.records = [record for record in found.records if record["seed"] < 2]
    for record in found.records:
        record["scores"]["map_at_r"] = 0.1 + 0.2 * record["seed"]
    score = found.score("a", "birds", "map_at_r")
    assert score is not None
    assert score.over_seeds == (0, 100)


def test_long_names_are_broken_at_their_separators_and_numbers_are_not() -> None:
    name = "contrastive_loss_with_margin_0.65_and_a_memory_of_the_whole_training_set_and_more"
    assert break_name(name, 26).split("\n") == [
        "contrastive_loss_with_", "margin_0.65_and_a_memory_", "of_the_whole_training_set_…",
    ]  # fmt: skip
    assert break_name("b64", 26) == "b64"
    assert _html_cell("lr=0.003: -4.8 (-42.3 to +32.8)").count("<wbr>") == 0
    assert _html_cell(name).count("<wbr>") == 14
