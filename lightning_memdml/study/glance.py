"""The top of a report: one sentence for each claim with its differences, and what could not be decided."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from lightning_memdml.study.notes import control_in_words
from lightning_memdml.study.results import JudgedClaim, Results
from lightning_memdml.study.statistics import Interval, Judgement, Verdict
from lightning_memdml.study.study_file import Claim
from lightning_memdml.study.tables import group_in_words, interval_in_words, largest_shown, score_name


class Difference(NamedTuple):
    """A difference of a claim on one data set, or over all.

    Attributes:
        words: The difference as a sentence.
        judgement: The judgement.
        verdict: The verdict.
    """

    words: str
    judgement: Judgement
    verdict: Verdict


class Finding(NamedTuple):
    """What was found about a claim.

    Attributes:
        claim: The claim.
        verdict: The verdict over all data sets.
        differences: The difference on each data set, and over all if there are several.
        reasons: Why the claim, or a data set, could not be decided.
    """

    claim: Claim
    verdict: Verdict
    differences: list[Difference]
    reasons: list[str]


def find(judged: Sequence[JudgedClaim]) -> list[Finding]:
    """Return what was found about each claim."""
    return [_find(one) for one in judged]


def _find(judged: JudgedClaim) -> Finding:
    claim, several = judged.claim, len(judged.claim.data) > 1
    differences: list[Difference] = []
    for data, judgement in judged.per_data.items():
        where = f"On {data}, " if several else ""
        full = not differences
        words = f"{where}{_in_words(claim, judgement, full)}{f': {judgement.verdict}' if several else ''}."
        words = re.sub(r"^the mean", "The mean", words)
        differences.append(Difference(words, judgement, judgement.verdict))
    if len(judged.per_data) > 1 and judged.joint is not None:
        words = f"Over all data sets, {_in_words(claim, judged.joint, full=False)}: {judged.verdict}."
        differences.append(Difference(words, judged.joint, judged.verdict))
    reasons = [
        f"{'Nothing' if not several else f'On {data} nothing'} is decided: {reason}."
        for data, reason in judged.unable.items()
    ]
    if judged.missing:
        reasons.append(f"Runs that are not finished: {judged.missing}.")
    if judged.per_data and judged.joint is None:
        how = "differ in sign" if judged.signs_differ else "differ"
        missing = "verdict" if judged.verdict == "data sets differ" else "difference"
        reasons.append(f"The data sets {how}, so there is no joint {missing}.")
    return Finding(claim, judged.verdict, differences, reasons)


def _in_words(claim: Claim, judgement: Judgement, full: bool) -> str:
    """Describe a difference: `mine is 1.3 points of MAP@R above threshold (-0.2 to +2.8)`."""
    mean = judgement.estimate.mean
    side, interval = "above" if mean >= 0 else "below", interval_in_words(judgement.interval, signed=True)
    if not full:
        return f"{abs(mean):.1f} points {side} {interval}"
    compared, with_ = (
        group_in_words(arms) if len(arms) == 1 else f"the {group_in_words(arms)}"
        for arms in (claim.compare, claim.with_)
    )
    return f"{compared} is {abs(mean):.1f} points of {score_name(claim.score)} {side} {with_} {interval}"


def untold(results: Results, findings: Sequence[Finding]) -> list[str]:
    """Describe in sentences what the study could not decide."""
    undecided = sum(one.verdict == "undecided" and bool(one.differences) for one in findings)
    lines = []
    if undecided:
        lines.append(
            f"{undecided} of {len(findings)} claims are undecided: {len(results.study.seeds)} seeds show neither the "
            "claim nor its opposite."
        )
    unable = [data for data, able in results.able_to_tell().items() if able is False]
    if unable:
        lines.append(f"Not able to tell: {', '.join(unable)}.")
    return lines if results.study.control is not None else [*lines, control_in_words(results.study)]


# ------------------------------------------------------------------------------------------------------------ formats
def to_markdown(findings: Sequence[Finding], lines: Sequence[str]) -> str:
    """Format findings as a list."""
    items = [
        f"- **{one.verdict}**: {one.claim.says} {' '.join([*(part.words for part in one.differences), *one.reasons])}"
        for one in findings
    ]
    return "\n".join(item.replace("<", "&lt;").rstrip() for item in [*items, *(f"- {line}" for line in lines)])


def to_html(findings: Sequence[Finding], lines: Sequence[str]) -> str:
    """Format findings as a list in which every difference is drawn, at any width, with its interval."""
    reach = _reach(findings)
    items = "".join(_item(one, reach) for one in findings)
    is_beyond = any(abs(part.judgement.estimate.mean) > reach for one in findings for part in one.differences)
    arrow = "; arrow: beyond the axis" if is_beyond else ""
    axis = (
        f'<div class="axis"><span>-{reach:g}</span><span>0</span><span>+{reach:g}</span></div>'
        f"<p>Difference in points. Bar: the interval that decides{arrow}. Blue: where the claim holds.</p>"
        if any(one.differences for one in findings)
        else ""
    )
    told = "".join(f"<li>{code_in_html(escape(line))}</li>" for line in lines)
    return f'<ol class="glance">{items}</ol>{axis}' + (
        f"<h3>What could not be decided</h3><ul>{told}</ul>" if told else ""
    )


def code_in_html(text: str) -> str:
    """Return escaped text with its backticks as `code` elements.

    Example:
        >>> code_in_html("set `a`")
        'set <code>a</code>'
    """
    pieces = text.split("`")
    return "".join(f"<code>{piece}</code>" if place % 2 else piece for place, piece in enumerate(pieces))


def _reach(findings: Sequence[Finding]) -> float:
    """Return a round number of points for the end of the axis."""
    judgements = [part.judgement for one in findings for part in one.differences]
    most = largest_shown(judgements, [one.claim.by for one in findings])
    size = 10.0 ** math.floor(math.log10(most)) / 2
    return math.ceil(1.05 * most / size) * size


def _item(one: Finding, reach: float) -> str:
    parts = "".join(f"<p>{escape(part.words)}</p>{_bar(one.claim, part, reach)}" for part in one.differences)
    reasons = "".join(f"<p>{escape(reason)}</p>" for reason in one.reasons)
    name = one.verdict.replace(" ", "-")
    return f'<li><b class="{name}">{one.verdict}</b> <strong>{escape(one.claim.says)}</strong>{parts}{reasons}</li>'


def _bar(claim: Claim, part: Difference, reach: float) -> str:
    regions = {"more": (claim.by, reach), "not more": (-reach, claim.by), "same": (-claim.by, claim.by)}
    low, high = part.judgement.interval
    name, mean = part.verdict.replace(" ", "-"), part.judgement.estimate.mean
    if abs(mean) > reach:
        drawn = f'<span class="beyond {"right" if mean > 0 else "left"} {name}"></span>'
    else:
        within = Interval(max(low, -reach), min(high, reach))
        drawn = _span(f"range {name}", within, reach) + _span(f"dot {name}", (mean, mean), reach)
    return (
        '<div class="bar" aria-hidden="true">'
        f"{_span('region', regions[claim.expects], reach)}{_span('zero', (0.0, 0.0), reach)}{drawn}</div>"
    )


def _span(kind: str, ends: tuple[float, float], reach: float) -> str:
    left, right = (50 + 50 * end / reach for end in ends)
    return f'<span class="{kind}" style="left:{left:.2f}%;width:{right - left:.2f}%"></span>'


STYLE = """
.glance { margin: 0; padding: 0; list-style: none; }
.glance li { padding: .6rem 0; border-top: 1px solid var(--line); }
.glance li:first-child { border-top: 0; }
.glance p { margin: .25rem 0 0; }
.glance b { padding: .1rem .5rem; border-radius: 99px; color: #fff; font-size: 13px; font-weight: 600; }
.bar { position: relative; height: 18px; margin: .2rem 0; background: var(--paper); border-radius: 4px; }
.bar span { position: absolute; }
.bar .region { top: 0; bottom: 0; background: #0072b2; opacity: .14; }
.bar .zero { top: 0; bottom: 0; border-left: 1px solid var(--faint); }
.bar .range { top: 6px; height: 6px; border-radius: 3px; opacity: .55; }
.bar .dot { top: 3px; height: 12px; min-width: 12px; margin-left: -6px; border-radius: 50%; }
.bar .beyond { top: 3px; width: 14px; height: 12px; }
.bar .beyond.right { right: 0; clip-path: polygon(0 0, 100% 50%, 0 100%); }
.bar .beyond.left { left: 0; clip-path: polygon(100% 0, 0 50%, 100% 100%); }
.axis { display: flex; justify-content: space-between; font-size: 12.5px; font-variant-numeric: tabular-nums; }
h3 { margin: .75rem 0 .25rem; font-size: 1rem; }
section ul { margin: 0; padding-left: 1.2rem; }
"""
