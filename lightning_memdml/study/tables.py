"""The tables of a study: claims, scores, search, origin, and one line per run as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from lightning_memdml.csv_table import as_text_cell
from lightning_memdml.study.results import JudgedClaim, Results
from lightning_memdml.study.statistics import OPPOSITES, Judgement
from lightning_memdml.study.study_file import Claim, Study

MASS_FACTOR = 3  # between sums of weights, from which on arms differ in scale
NAMED_ARMS = 6  # of a group, at most; the table of averages lists all
SCORE_NAMES = {"map_at_r": "MAP@R", "r_precision": "R-precision", "recall_at_1": "Recall@1"}


def score_name(score: str) -> str:
    """Return the usual name of a score.

    Example:
        >>> score_name("map_at_r"), score_name("recall_at_10")
        ('MAP@R', 'Recall@10')
    """
    return SCORE_NAMES.get(score, score.replace("recall_at_", "Recall@"))


class Table(NamedTuple):
    """A header and rows of text cells."""

    head: list[str]
    rows: list[list[str]]


def claims_table(judged: Sequence[JudgedClaim], data_sets: Sequence[str] = ()) -> Table:
    """Return the table of claims, one row each.

    Args:
        judged: The claims.
        data_sets: With several data sets, the table has a column with the difference on each.
    """
    several = list(data_sets) if len(data_sets) > 1 else []
    head = ["claim", "verdict", "question", "difference, over seeds", *several]
    rows = []
    for one in judged:
        claim = one.claim
        question = f"{group_in_words(claim.compare)} against {group_in_words(claim.with_)}: {_question(claim)}"
        if one.missing or not one.per_data:
            reason = f"{one.missing} runs missing" if one.missing else "; ".join(dict.fromkeys(one.unable.values()))
            rows.append([claim.says, one.verdict, question, reason, *[""] * (len(several) + 3)])
            continue
        classes = "" if one.over_classes is None else interval_in_words(one.over_classes, signed=True)
        others = ", ".join(f"{score_name(score)} {value:+.1f}" for score, value in one.other_scores.items())
        per_data = [_on_data_set(one, data) for data in several]
        rows.append([claim.says, one.verdict, question, _joint(one), *per_data, classes, _p_value(one), others])
    return Table([*head, "over test classes", "p, adjusted", "other scores"], rows)


def _joint(judged: JudgedClaim) -> str:
    judgement = judged.joint
    if judgement is None:
        return f"none: the data sets differ{' in sign' if judged.signs_differ else ''}"
    interval = interval_in_words(judgement.interval, signed=True)
    return f"{judgement.estimate.mean:+.1f} {interval} at {100 * judgement.level:.3g} %"


def _p_value(judged: JudgedClaim) -> str:
    """Return the p-value of the mean over data sets, or else the largest of data sets that are all decided alike."""
    if judged.joint is not None:
        return f"{judged.joint.p_value:.2g}"
    alike = judged.verdict in OPPOSITES
    return f"{max(one.p_value for one in judged.per_data.values()):.2g}" if alike else ""


def _on_data_set(judged: JudgedClaim, data: str) -> str:
    if data not in judged.claim.data:
        return ""
    if data not in judged.per_data:
        return f"not able to tell: {judged.unable[data]}" if data in judged.unable else ""
    found = judged.per_data[data]
    return f"{found.verdict}: {found.estimate.mean:+.1f} {interval_in_words(found.interval, signed=True)}"


def members_table(judged: Sequence[JudgedClaim]) -> Table:
    """Return the table of averaged groups: the difference of each member, and of the average without it."""
    rows = [
        [one.claim.says, arm, f"{alone:+.1f}", f"{without:+.1f}"]
        for one in judged
        for arm, (alone, without) in one.members.items()
    ]
    return Table(["claim", "arm", "difference of this arm alone", "difference of the average without it"], rows)


def masses_table(results: Results) -> Table:
    """Return the claims whose arms differ in the sum of weights per anchor by a factor of more than `MASS_FACTOR`."""
    rows = []
    for claim in results.study.claims:
        for data in claim.data:
            masses = {arm: results.weight_mass(arm, data) for arm in (*claim.compare, *claim.with_)}
            for side in ("positive", "negative"):
                known = {arm: mass[side] for arm, mass in masses.items() if mass.get(side, 0.0) > 0}
                if known and max(known.values()) > MASS_FACTOR * min(known.values()):
                    listed = ", ".join(f"{arm} {mass:.3g}" for arm, mass in known.items())
                    rows.append([claim.says, data, f"{side}s", listed])
    return Table(["claim", "data", "weights of", "sum per anchor"], rows)


def group_in_words(arms: Sequence[str]) -> str:
    """Name a group of arms; of a large one, the first two.

    Example:
        >>> group_in_words(["ms"]), group_in_words(["ms", "supcon"])
        ('ms', 'mean of ms, supcon')
        >>> group_in_words([*"abcdefgh"])
        'mean of a, b and 6 more arms'
    """
    if len(arms) > NAMED_ARMS:
        return f"mean of {', '.join(arms[:2])} and {len(arms) - 2} more arms"
    return arms[0] if len(arms) == 1 else f"mean of {', '.join(arms)}"


def _question(claim: Claim) -> str:
    words = {"more": f"more than {claim.by:+g}", "not more": f"less than {claim.by:+g}", "same": f"within {claim.by:g}"}
    return f"{words[claim.expects]} points of {score_name(claim.score)}"


def largest_shown(judgements: Sequence[Judgement], edges: Sequence[float]) -> float:
    """Return the largest difference that an axis for all of these has to show, at least 0.5.

    The largest few are left out where they would squeeze the others: an arrow at the edge stands for them.

    Args:
        judgements: What is drawn, each a difference with its interval.
        edges: The edges of the regions of the claims, which are always shown.

    Example:
        >>> from lightning_memdml.study.statistics import Estimate
        >>> def judged(mean):
        ...     return Judgement("supported", Estimate(mean, 0.1, 4), 0.95, (mean, mean), 0.01)
        >>> largest_shown([*map(judged, [1.0, 2.0, 3.0, 41.0])], [0.0])
        3.0
        >>> largest_shown([*map(judged, [1.0, 9.0])], [0.0])
        9.0
    """
    extents = sorted(
        max(abs(end) for end in (*one.interval, one.estimate.mean) if math.isfinite(end)) for one in judgements
    )
    upper_half = pairwise(extents[len(extents) // 2 :])
    most = next((low for low, high in upper_half if high > 4 * max(low, *edges, 0.5)), max(extents, default=0.0))
    return max(most, *edges, 0.5)


def interval_in_words(interval: Sequence[float], signed: bool = False) -> str:
    """Format an interval.

    Example:
        >>> interval_in_words((31.24, 33.9)), interval_in_words((-0.5, 2.0), signed=True)
        ('(31.2 to 33.9)', '(-0.5 to +2.0)')
    """
    low, high = interval
    if not math.isfinite(low):
        return "(one seed)"
    return f"({low:+.1f} to {high:+.1f})" if signed else f"({low:.1f} to {high:.1f})"


def scores_table(results: Results, data: str) -> Table:
    """Return the table of scores: a row per arm with scores in percent, intervals, and the time of a step."""
    first = results.study.scores[0]
    names = [f"{score_name(score)} %" for score in results.study.scores]
    searched = results.study.search is not None
    chosen = ["chosen"] if searched else []
    head = ["arm", *chosen, "seeds", names[0], "over test classes", *names[1:], "ms per step"]
    rows = []
    for arm in results.study.arms:
        runs = results.of(arm, data)
        if not runs:
            rows.append([arm, *([""] if searched else []), "0", *[""] * (len(names) + 2)])
            continue
        cells = []
        for score in results.study.scores:
            found = results.score(arm, data, score)
            assert found is not None  # the arm has runs
            cells.append(f"{found.estimate.mean:.1f} {interval_in_words(found.over_seeds)}")
            if score == first:
                cells.append("" if found.over_classes is None else interval_in_words(found.over_classes))
        times = sorted(record["ms_per_step"] for record in runs if record["ms_per_step"] is not None)
        time = f"{times[len(times) // 2]:.1f}" if times else ""
        choice = [_choice(runs[0]["choice"])] if searched else []
        diverged = sum(record["diverged"] for record in runs)
        seeds = f"{len(runs)}, {diverged} diverged" if diverged else str(len(runs))
        rows.append([arm, *choice, seeds, *cells, time])
    for name, scores in results.references(data).items():
        cells = [f"{scores[score]:.1f}" if score in scores else "" for score in results.study.scores]
        rows.append([f"{name} (no training)", *([""] if searched else []), "", cells[0], "", *cells[1:], ""])
    return Table(head, rows)


def trend_table(results: Results, data: str) -> Table:
    """Return the table of a trend: per number, how far its arm is above the first one in every score."""
    study = results.study
    assert study.trend is not None  # it was drawn
    first, *_ = study.trend.arms.values()
    rows = []
    for number, arm in study.trend.arms.items():
        cells = []
        for score in study.scores:
            gain = results.gain(arm, first, data, score)
            assert gain is not None  # it was drawn
            interval = interval_in_words(gain[1].interval(study.confidence), signed=True)
            cells.append("0" if arm == first else f"{gain[1].mean:+.1f} {interval}")
        rows.append([f"{number:g}", arm, *cells])
    return Table(
        [study.trend.over, "arm", *(f"{score_name(score)}, points above {first}" for score in study.scores)], rows
    )


def _choice(choice: dict[str, Any]) -> str:
    return ", ".join(
        f"{key.removesuffix('.init_args').replace('.init_args', '')}={value}" for key, value in choice.items()
    )


def search_table(results: Results) -> Table:
    """Return the table of the search: a row per arm and data set with every try and its validation score."""
    search = results.study.search
    assert search is not None  # the search was run
    rows = []
    for data in results.study.data:
        for arm in results.study.arms:
            tries = [(choice, float(np.mean(scores))) for choice, scores in results.tries(arm, data)]
            if not tries:
                continue
            best, best_score = max(tries, key=lambda one: one[1])
            cells = [f"{_choice(choice) or 'nothing to choose'}: {score:.1f}" for choice, score in tries]
            cells = [f"**{cell}**" if choice == best else cell for cell, (choice, _) in zip(cells, tries, strict=True)]
            others = [score for choice, score in tries if choice != best]
            lead = f"{best_score - max(others):.1f}" if others else ""
            rows.append([data, arm, "; ".join(cells), lead, ", ".join(results.ends(arm, data))])
    head = [
        "data",
        "arm",
        f"{score_name(search.score)} % of each try",
        "lead of the best",
        "best at an end of the grid",
    ]
    return Table(head, rows)


def origin_table(results: Results) -> Table:
    """Return the origin of the runs: commit, versions, hardware, budget, time."""
    records = [*results.records, *results.searched]
    made = [record["made_by"] for record in records]
    study = results.study

    def distinct(values: Any) -> str:
        return "; ".join(sorted({str(value) for value in values}))

    rows = [
        ["study file", study.path.name],
        [
            "runs",
            f"{len(results.records)} on test classes of {planned_runs(study)}, {len(results.searched)} in the search",
        ],
        ["seeds", ", ".join(map(str, study.seeds))],
        [
            "budget of a run",
            distinct(f"{record['steps']:,} steps of {record['images_per_step']:,} images" for record in records),
        ],
        ["commit", "; ".join(results.commits())],
        ["versions", distinct(", ".join(f"{name} {one}" for name, one in found["versions"].items()) for found in made)],
        ["hardware", distinct(f"{found['hardware']}, {found['threads']} threads" for found in made)],
        ["time of all runs", f"{sum(record['seconds'] for record in records) / 60:.1f} minutes"],
    ]
    changed = sum(record.get("rule") != study.rule_key for record in results.records)
    if changed:
        rows.append(
            [
                "claims",
                f"CHANGED after {changed} of the runs were finished: the verdicts were not fixed before the runs",
            ]
        )
    return Table(["", ""], rows)


def runs_csv(results: Results) -> str:
    """Return CSV text with a line per finished run: configuration, scores, origin."""
    lines = []
    for record in [*results.searched, *results.records]:
        made = record["made_by"]
        line = {name: record[name] for name in ("stage", "data", "arm", "seed")} | {"choice": _choice(record["choice"])}
        line |= {
            name: record[name] for name in ("steps", "images_per_step", "ms_per_step", "seconds", "diverged")
        } | record["scores"]
        line |= {"commit": made["commit"], "hardware": made["hardware"], "torch": made["versions"]["torch"]}
        lines.append({**line, "finished": record["finished"], "key": record["key"]})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: as_text_cell(value) if isinstance(value, str) else value for name, value in line.items()}
        for line in lines
    )
    return text.getvalue()


def planned_runs(study: Study) -> int:
    """Return the number of planned test runs."""
    return len(study.arms) * len(study.data) * len(study.seeds)
