"""Each fault that an audit found in earlier studies: the tool refuses it, or the report names it."""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from support.studies import CLAIM, MEMORY, Write, frozen, results

from lightning_memdml.lightning_cli import MemdmlCLI
from lightning_memdml.study.glance import untold
from lightning_memdml.study.notes import budgets_in_words, control_in_words, gaps_in_words
from lightning_memdml.study.plan import Plan
from lightning_memdml.study.report import (
    Section,
    _search_text,
    compose,
    freedoms_in_words,
    rule_in_words,
)
from lightning_memdml.study.results import Results
from lightning_memdml.study.study_file import read_study
from lightning_memdml.study.tables import claims_table, members_table, scores_table, search_table

MARGINS = {
    "batch_margin": {"model.loss.ContrastiveLoss.margin": [0.5, 0.8]},
    "memory_margin": {"model.memory_loss.ContrastiveLoss.margin": [0.5, 0.8]},
}
CONTRASTIVE = {**MEMORY, "model": {"memory_loss": {"class_path": "ContrastiveLoss", "init_args": {"margin": 0.5}}}}
ARMS = {"batch": {}, "memory": CONTRASTIVE}


def test_a_margin_that_only_some_arms_search_is_refused_or_named(write: Write) -> None:
    """One option for two margins sets both. An arm without one of them is named, unequal tries are refused."""
    one_option = {"margin": {key: values for option in MARGINS.values() for key, values in option.items()}}
    plan = Plan(read_study(write(arms=ARMS, claims={}, search={"options": one_option})), MemdmlCLI)
    (first, *_) = [run for run in plan.search_runs() if run.arm == "memory"]
    assert len(first.choice) == 2, "the margin in the batch and the one against the memory"
    with pytest.raises(ValueError, match="Expected the same number of search runs in every arm"):
        Plan(read_study(write(arms=ARMS, claims={}, search={"options": MARGINS})), MemdmlCLI)
    study = read_study(write(arms=ARMS, claims={}, search={"options": MARGINS, "tries": 2}))
    lines = freedoms_in_words(study, Plan(study, MemdmlCLI).missing_freedoms())
    assert lines[1] == "The arm batch has no memory_margin to search."


def test_fewer_steps_for_larger_batches_are_refused(write: Write) -> None:
    """Equal images alone gave batches of 256 too few steps to learn anything."""
    large = {"data": {"init_args": {"batch_size": 16}}, "trainer": {"max_steps": 3}}
    for equal in ("budget", "steps"):
        with pytest.raises(ValueError, match=re.escape(f"(`equal: {equal}`)")):
            Plan(read_study(write(arms={"small": {}, "large": large}, claims={}, equal=equal)), MemdmlCLI)


def test_unequal_numbers_of_steps_or_images_are_named(write: Write, tmp_path: Path) -> None:
    """Where only images or only steps are equal, the plan and the report name the range of the other."""
    large = {"data": {"init_args": {"batch_size": 16}}}
    fewer = {"arms": {"small": {}, "large": {**large, "trainer": {"max_steps": 3}}}, "equal": "images", "claims": {}}
    plan = Plan(read_study(write(**fewer)), MemdmlCLI)
    assert budgets_in_words(plan.study, plan.budgets) == [
        "The arms take 3 (large) to 6 (small) steps. One with few steps may end before it has learned anything: "
        "`equal: steps` compares at equal steps."
    ]
    plan = Plan(read_study(write(arms={"small": {}, "large": large}, equal="steps", claims={})), MemdmlCLI)
    assert budgets_in_words(plan.study, plan.budgets) == ["The arms see 48 (small) to 96 (large) images."]
    found = results(tmp_path, {"birds": {"a": 15, "b": 10}})
    for record in found.records:
        record |= {
            "steps": 64 if record["arm"] == "a" else 1000,
            "images_per_step": 256 if record["arm"] == "a" else 16,
        }
    assert "The arms take 64 (a) to 1,000 (b) steps." in rule_in_words(found)
    assert "The arms see 16,000 (b) to 16,384 (a) images." in rule_in_words(found)


def test_a_memory_weight_that_is_not_searched_is_named(write: Write) -> None:
    """The sum of the positives' weights decides how much the memory outweighs the batch."""
    weighted = {**MARGINS, "weight": {"model.memory_weight": [0.3, 1.0]}}
    arms = {"batch": {}, "memory": {**CONTRASTIVE, "model": {**CONTRASTIVE["model"], "memory_weight": 1.0}}}
    without = read_study(write(arms=arms, claims={}, search={"options": MARGINS, "tries": 2}))
    assert gaps_in_words(without) == ["The weight of the memory term is not searched (`model.memory_weight`): memory."]
    assert gaps_in_words(read_study(write(arms=arms, claims={}, search={"options": weighted, "tries": 2}))) == []
    assert gaps_in_words(read_study(write(arms=arms, claims={}))) == []


def test_a_searched_option_that_no_arm_has_is_refused_and_a_key_named(write: Write) -> None:
    """A misspelt key would search nothing in silence."""
    misspelt = {"margin": {"model.loss.ContrastivLoss.margin": [0.5, 0.8]}}
    expected = "search: margin: expected a key of at least one arm but no arm has model.loss.ContrastivLoss.margin."
    with pytest.raises(ValueError, match=re.escape(f"{expected} Correct it, or leave the option out.")):
        Plan(read_study(write(arms=ARMS, claims={}, search={"options": misspelt})), MemdmlCLI)
    both = {"margin": {**misspelt["margin"], **MARGINS["batch_margin"]}}
    study = read_study(write(arms={"batch": {}}, claims={}, search={"options": both}))
    assert Plan(study, MemdmlCLI)
    assert gaps_in_words(study) == ["No arm has model.loss.ContrastivLoss.margin of the option margin."]


def test_heads_that_do_not_reach_the_features_decide_nothing(tmp_path: Path) -> None:
    found = results(tmp_path, {"birds": {"a": 7.4, "b": 7.4}}, (frozen("birds", 7.7, 33.8),))
    assert [one.verdict for one in found.claims()] == ["not able to tell"]
    assert "on birds no arm beats the frozen features" in rule_in_words(found)


def test_an_average_does_not_hide_data_sets_or_arms(tmp_path: Path) -> None:
    means = {"birds": {"a": 10.2, "b": 10, "lifted": 2}, "groceries": {"a": 23.9, "b": 20, "lifted": 12}}
    claim = {**CLAIM, "with": ["b", "lifted"]}
    (judged,) = results(tmp_path, means, claims={"claim": claim}).claims()
    assert claims_table([judged], ["birds", "groceries"]).head[4:6] == ["birds", "groceries"]
    assert [row[1] for row in members_table([judged]).rows] == ["b", "lifted"]


def test_a_study_without_a_control_is_named(tmp_path: Path) -> None:
    """Nothing shows that such a study could have detected a difference."""
    found = results(tmp_path, {"birds": {"a": 15, "b": 10}})
    assert control_in_words(found.study).startswith(
        "There is no control: nothing shows that these data sets can detect"
    )
    assert control_in_words(found.study) in untold(found, [])


def test_an_arm_that_learns_nothing_from_labels_must_be_detected(tmp_path: Path) -> None:
    """The control is the arm itself with shuffled labels. Where it is as good, no claim is decided."""
    shuffled = "a with shuffled labels"
    means = {"birds": {"a": 15, "b": 10, shuffled: 15}, "groceries": {"a": 25, "b": 20, shuffled: 5}}
    arms: dict[str, Any] = {"a": {}, "b": {}}
    found = results(tmp_path, means, arms=arms, control={"compare": "a"})
    assert [*found.study.arms] == ["a", "b", shuffled]
    assert found.able_to_tell() == {"birds": False, "groceries": True}
    (judged,) = found.claims()
    assert [*judged.per_data] == ["groceries"]
    assert f"Control: a must be better than {shuffled} on every data set. Not able to tell: on birds" in rule_in_words(
        found
    )
    only_birds = results(tmp_path, {"birds": means["birds"]}, arms=arms, control={"compare": "a"})
    assert [one.verdict for one in only_birds.claims()] == ["not able to tell"]
    assert shuffled in [row[0] for row in scores_table(found, "birds").rows]
    with pytest.raises(ValueError, match=r"control: expected one of the arms a, b but got 'c'\."):
        results(tmp_path, means, arms=arms, control={"compare": "c"})


def weights(positive: float, negative: float) -> dict[str, Any]:
    """What a run records of its last batches: 4 anchors, and the sum of weights in two bins."""
    sides = {side: {"mass": [mass, 3 * mass]} for side, mass in (("positive", positive), ("negative", negative))}
    return {"memory": {"anchors": 4, **sides}}


def sections_of_claims(found: Results) -> list[Section]:
    return [*takewhile(lambda section: section.title != "Scores", compose(found, found.claims(), {}))]


def test_halves_of_different_scale_are_named(tmp_path: Path) -> None:
    """The positives of one loss weigh 11.0 per anchor, those of the other 0.9."""
    found = results(tmp_path, {"glyphs": {"a": 20, "b": 13}})
    for record in found.records:
        record["weights"] = weights(11.0 if record["arm"] == "a" else 0.9, 2.0)
    section = {one.title: one for one in sections_of_claims(found)}["Sums of weights"]
    assert section.table is not None
    assert section.table.rows == [["claim", "glyphs", "positives", "a 11, b 0.9"]]
    for record in found.records:
        record["weights"] = weights(1.0, 2.0)
    assert "Sums of weights" not in [one.title for one in sections_of_claims(found)]


def test_a_search_of_one_seed_and_choices_at_the_end_of_a_grid_are_named(tmp_path: Path) -> None:
    options = {"rate": {"model.rate": [0.1, 0.2, 0.3]}}
    arms = {arm: {"model": {"rate": 0.1}} for arm in "ab"}
    found = results(tmp_path, {"glyphs": {"a": 20, "b": 13}}, arms=arms, search={"options": options})
    found.searched = [
        {"arm": arm, "data": "glyphs", "choice": {"model.rate": rate}, "scores": {"map_at_r": rate}}
        for arm in "ab"
        for rate in (0.1, 0.2, 0.3)
    ]
    assert "With one search seed, the noise of the choice is not known." in _search_text(found)
    assert [row[-1] for row in search_table(found).rows] == ["rate", "rate"]
