"""The top of a report: one sentence for each claim, on each data set, and what could not be decided."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.studies import CLAIM, frozen, results

from lightning_memdml.study.glance import find, to_html, to_markdown, untold
from lightning_memdml.study.report import ends_in_words, write_report
from lightning_memdml.study.results import Results

SAYS = {**CLAIM, "says": "A is better."}


def sentences(found: Results) -> list[str]:
    (finding,) = find(found.claims())
    return [*(part.words for part in finding.differences), *finding.reasons]


def test_a_claim_on_one_data_set_is_one_sentence(tmp_path: Path) -> None:
    found = results(tmp_path, {"birds": {"a": 15, "b": 10}}, claims={"claim": SAYS})
    (judged,) = found.claims()
    assert judged.joint is not None
    low, high = judged.joint.interval
    expected = f"a is {judged.joint.estimate.mean:.1f} points of MAP@R above b ({low:+.1f} to {high:+.1f})."
    assert sentences(found) == [expected]
    assert to_markdown(find([judged]), ["x < y"]) == f"- **supported**: A is better. {expected}\n- x &lt; y"


def test_every_data_set_has_its_difference_and_verdict(tmp_path: Path) -> None:
    claim = {**SAYS, "compare": ["a", "c"]}
    means = {"birds": {"a": 10, "b": 12, "c": 9.8}, "groceries": {"a": 20, "b": 29, "c": 20}}
    birds, groceries, joint = sentences(results(tmp_path, means, claims={"claim": claim}))
    assert re.fullmatch(
        r"On birds, the mean of a, c is 2\.\d points of MAP@R below b \(-\S+ to -\S+\): contradicted\.", birds
    )
    assert re.fullmatch(r"On groceries, \d\.\d points below \(-\S+ to -\S+\): contradicted\.", groceries)
    assert joint.startswith("Over all data sets, 5")
    apart = results(tmp_path, {"birds": {"a": 7, "b": 10}, "groceries": {"a": 40, "b": 20}}, claims={"claim": SAYS})
    assert sentences(apart)[2:] == ["The data sets differ in sign, so there is no joint verdict."]
    both = results(
        tmp_path,
        {"birds": {"a": 13, "b": 10}, "groceries": {"a": 18, "b": 20}},
        claims={"claim": {**SAYS, "by": 8}},
    )
    (finding,) = find(both.claims())
    assert finding.verdict == "contradicted"
    assert sentences(both)[2:] == ["The data sets differ in sign, so there is no joint difference."]


def test_what_could_not_be_told_is_named(tmp_path: Path) -> None:
    """A data set that shows nothing, a claim without all its runs, an undecided claim, and a missing control."""
    means = {"birds": {"a": 15, "b": 10}, "groceries": {"a": 25, "b": 20}}
    found = results(tmp_path, means, (frozen("birds", 16, 30), frozen("groceries", 18, 50)), claims={"claim": SAYS})
    assert sentences(found)[1:] == ["On birds nothing is decided: no arm beats the frozen features."]
    lines = untold(found, find(found.claims()))
    assert lines[0] == "Not able to tell: birds."
    assert lines[1].startswith("There is no control")
    unfinished = results(tmp_path, {"birds": {"a": 15, "b": 10}}, claims={"claim": SAYS})
    del unfinished.records[0]
    assert sentences(unfinished) == ["Runs that are not finished: 1."]
    noisy = results(
        tmp_path, {"birds": {"a": 11, "b": 10}}, claims={"claim": SAYS}, control={"compare": "a", "with": "b"}
    )
    assert untold(noisy, find(noisy.claims())) == [
        "1 of 1 claims are undecided: 5 seeds show neither the claim nor its opposite."
    ]


def test_every_difference_is_drawn_within_the_page(tmp_path: Path) -> None:
    """The interval, the region of the claim and the mean, all as shares of the width."""
    means = {"birds": {"a": 15, "b": 10}, "groceries": {"a": 10, "b": 20}}
    claims = {
        "more": SAYS,
        "same": {**SAYS, "expects": "same", "by": 2},
        "not_more": {**SAYS, "expects": "not more", "by": 100, "says": "<b>"},
    }
    page = to_html(find(results(tmp_path, means, claims=claims).claims()), [])
    assert page.count('class="bar"') == 2 + 3 + 2, "a joint difference only where both have one sign, or for `same`"
    spans = re.findall(r'<span class="(\w+)[^"]*" style="left:(-?[\d.]+)%;width:(-?[\d.]+)%">', page)
    assert {kind for kind, *_ in spans} == {"region", "zero", "range", "dot"}
    for _, left, width in spans:
        assert 0 <= float(left) <= float(left) + float(width) <= 100.01
    assert "<strong>&lt;b&gt;</strong>" in page
    assert 'class="bar"' not in to_html([], [])


def test_a_difference_that_would_squeeze_the_others_is_an_arrow_at_the_edge(tmp_path: Path) -> None:
    means = {name: {"a": 10 + difference, "b": 10} for name, difference in {"w": 1, "x": 2, "y": 3, "z": 60}.items()}
    findings = find(results(tmp_path, means, claims={"claim": SAYS}).claims())
    page = to_html(findings, [])
    bars = re.findall(r'<div class="bar".*?</div>', page)
    assert [bar.count('class="dot') for bar in bars[:4]] == [1, 1, 1, 0]
    assert ['class="beyond right' in bar for bar in bars[:4]] == [False, False, False, True]
    assert float(re.findall(r"<span>\+(\S+)</span>", page)[0]) < 5
    assert "arrow: beyond the axis" in page
    few = results(tmp_path, {"birds": {"a": 15, "b": 10}}, claims={"claim": SAYS})
    assert "beyond" not in to_html(find(few.claims()), [])


def test_the_report_begins_with_it(tmp_path: Path) -> None:
    found = results(tmp_path, {"birds": {"a": 15, "b": 10}}, claims={"claim": SAYS})
    markdown, page = write_report(found, tmp_path / "out")
    text = markdown.read_text()
    assert text.index("## At a glance") < text.index("**supported**: A is better.") < text.index("## Claims")
    html = page.read_text()
    assert html.index("At a glance") < html.index('class="bar"') < html.index("<h2>Claims</h2>")
    assert html.count("The deciding interval of every claim") == 0, "the page draws the intervals itself"


@pytest.mark.parametrize(("extend", "best", "named"), [(0, 0.3, True), (2, 0.1, True), (0, 0.2, False)])
def test_arms_whose_best_try_is_at_an_end_are_named_with_the_way_on(
    extend: int, best: float, named: bool, tmp_path: Path
) -> None:
    search = {"options": {"rate": {"model.rate": [0.1, 0.2, 0.3]}}, "extend": extend}
    arms: dict[str, Any] = {arm: {"model": {"rate": 0.1}} for arm in "ab"}
    found = results(tmp_path, {"glyphs": {"a": 20, "b": 13}}, arms=arms, search=search)
    assert ends_in_words(found) == [], "before the search"
    found.searched = [
        {"arm": "b", "data": "glyphs", "choice": {"model.rate": rate}, "scores": {"map_at_r": float(rate == best)}}
        for rate in (0.1, 0.2, 0.3)
    ]
    expected = (
        "The best try lies at an end of the grid: b (rate). A better value may lie beyond it: with "
        f"`extend: {extend + 1}` in `search`, the same command tries up to {extend + 1} more, and keeps the finished "
        "runs."
    )
    assert ends_in_words(found) == ([expected] if named else [])
    found.searched += [{**record, "arm": "a"} for record in found.searched]
    assert ends_in_words(found) == ([expected.replace("b (rate)", "a, b (rate)")] if named else [])
