"""Results of a study: scores with intervals, and a verdict on every claim."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_memdml.study.budgets import Budget
from lightning_memdml.study.overrides import Values
from lightning_memdml.study.statistics import (
    Estimate,
    Expectation,
    Interval,
    Judgement,
    Verdict,
    class_interval,
    estimate,
    is_mean_given,
    joint_verdict,
    judge,
    signs_differ,
)
from lightning_memdml.study.study_file import Claim, Study

Record = dict[str, Any]
POINTS = 100  # scores are in [0, 1], differences are reported in points


class Score(NamedTuple):
    """A score of an arm on a data set, in points.

    Attributes:
        values: One value per seed.
        estimate: The mean over seeds.
        over_seeds: Interval of the mean over seeds, within the possible scores.
        over_classes: Interval over test classes, or `None` without scores per class.
    """

    values: list[float]
    estimate: Estimate
    over_seeds: Interval
    over_classes: Interval | None


class JudgedClaim(NamedTuple):
    """A claim with its verdicts.

    Attributes:
        claim: The claim.
        verdict: The verdict over all data sets (`joint_verdict`). It is "not able to tell" if no data set is able to
            tell.
        joint: The judgement of the only data set, or of the mean over several. `None` without a data set that is able
            to tell, and where the mean would hide that the data sets differ.
        per_data: The judgement on each data set that is able to tell.
        over_classes: Interval of the joint difference over test classes at the same level, or `None`.
        other_scores: Other score -> mean difference in points.
        members: Arm of an averaged group -> its own difference, and the difference of the average without it.
        missing: Number of runs that are not finished yet.
        unable: Data set that decides nothing -> why.
    """

    claim: Claim
    verdict: Verdict
    joint: Judgement | None
    per_data: dict[str, Judgement]
    over_classes: Interval | None
    other_scores: dict[str, float]
    members: dict[str, tuple[float, float]]
    missing: int
    unable: dict[str, str]

    @property
    def signs_differ(self) -> bool:
        """Whether the differences of the data sets have different signs."""
        return signs_differ(list(self.per_data.values()))


class Results:
    """The finished runs of a study, with scores and verdicts.

    Args:
        study: The study.
        records: Finished runs on test classes.
        searched: Finished runs on validation classes.
        missing_freedoms: Arm -> searched options that other arms have and this one lacks.
        referenced: Finished runs that scored the networks before the training.
    """

    def __init__(
        self,
        study: Study,
        records: Sequence[Record],
        searched: Sequence[Record] = (),
        missing_freedoms: dict[str, list[str]] | None = None,
        referenced: Sequence[Record] = (),
    ) -> None:
        self.study = study
        self.records = list(records)
        self.searched = list(searched)
        self.missing_freedoms = missing_freedoms or {}
        self.referenced = list(referenced)

    def of(self, arm: str, data: str) -> list[Record]:
        """Return the runs of an arm on a data set, ordered by seed."""
        order = {seed: place for place, seed in enumerate(self.study.seeds)}
        found = [record for record in self.records if (record["arm"], record["data"]) == (arm, data)]
        return sorted(found, key=lambda record: order[record["seed"]])

    def score(self, arm: str, data: str, score: str) -> Score | None:
        """Return a score with its intervals, or `None` without a finished run.

        Raises:
            ValueError: If the runs do not have this score.
        """
        runs = self.of(arm, data)
        if not runs:
            return None
        values = [_score(record, score) for record in runs]
        found = estimate([values])
        classes = _per_class([runs], [1.0], score)
        over_classes = None if classes is None else class_interval([classes], self.study.confidence)
        low, high = found.interval(self.study.confidence)
        # Of two or three seeds, Student's t gives intervals that reach beyond 0 or 100.
        over_seeds = Interval(max(low, 0.0), min(high, float(POINTS))) if math.isfinite(low) else Interval(low, high)
        return Score(values, found, over_seeds, over_classes)

    def gain(self, arm: str, over: str, data: str, score: str) -> tuple[list[float], Estimate] | None:
        """Return how far an arm is above another one in points, per seed and in the mean, or `None` without all runs.

        Raises:
            ValueError: If the runs do not have this score.
        """
        claim = Claim("gain", "", (arm,), (over,), "more", 0.0, score, (data,))
        if self._missing(claim):
            return None
        values = self._differences(claim, data)
        return values, estimate([values])

    def references(self, data: str) -> dict[str, dict[str, float]]:
        """Return the scores before the training on a data set in points: name -> score -> value.

        Of several networks the best value counts.
        """
        found: dict[str, dict[str, float]] = {}
        for record in self.referenced:
            if record["data"] == data:
                for name, scores in record["references"].items():
                    row = found.setdefault(name, {})
                    row.update({score: max(POINTS * value, row.get(score, 0.0)) for score, value in scores.items()})
        return found

    def why_unable(self, data: str, score: str) -> str | None:
        """Return why a data set decides no claim, or `None` if it is able to tell, or its runs are not finished.

        A data set shows nothing where no arm is better than what the network is worth before the training: arms that
        all fail look alike. It shows nothing either where a planted difference, the control, is not detected.
        """
        control = self.study.control
        if control is not None and not self._missing(control):
            difference = estimate([self._differences(control, data)])
            if difference.tails(0.0)[0] > 1 - self.study.confidence:
                return "the control was not detected"
        known = {name: row[score] for name, row in self.references(data).items() if score in row}
        if not known or not self._is_finished(data):
            return None
        best = max(known, key=lambda name: known[name])
        means = [np.mean([_score(one, score) for one in self.of(arm, data)]) for arm in self.study.arms]
        return None if max(means) > known[best] else f"no arm beats the {best}"

    def _is_finished(self, data: str) -> bool:
        return all(len(self.of(arm, data)) == len(self.study.seeds) for arm in self.study.arms)

    def able_to_tell(self) -> dict[str, bool | None]:
        """Return, for each data set, whether it passes the control and its arms beat the references.

        `None` without either, or while runs are missing. A data set that fails decides no claim.
        """
        score, control = self.study.scores[0], self.study.control
        reasons = {data: self.why_unable(data, score) for data in self.study.data}
        detected = control is not None and not self._missing(control)
        able = {data: detected or bool(self.references(data) and self._is_finished(data)) for data in reasons}
        return {data: False if reason else (able[data] or None) for data, reason in reasons.items()}

    def claims(self) -> list[JudgedClaim]:
        """Return the verdicts on all claims, on each data set and jointly, decided with one error rate."""
        usable = {
            claim.name: [
                data for data in claim.data if not self._missing(claim) and self.why_unable(data, claim.score) is None
            ]
            for claim in self.study.claims
        }
        questions: dict[tuple[str, str | None], tuple[Estimate, Expectation, float]] = {}
        for claim in self.study.claims:
            differences = {data: self._differences(claim, data) for data in usable[claim.name]}
            for data, values in differences.items():
                questions[claim.name, data] = (estimate([values]), claim.expects, claim.by)
            if len(differences) > 1:
                questions[claim.name, None] = (estimate([*differences.values()]), claim.expects, claim.by)
        answers = dict(zip(questions, judge([*questions.values()], self.study.confidence), strict=True))
        return [self._judged(claim, usable[claim.name], answers) for claim in self.study.claims]

    def _judged(self, claim: Claim, usable: list[str], answers: dict[tuple[str, str | None], Judgement]) -> JudgedClaim:
        missing = self._missing(claim)
        reasons = {data: self.why_unable(data, claim.score) for data in claim.data}
        unable = {data: reason for data, reason in reasons.items() if reason is not None}
        if not usable:
            verdict: Verdict = "undecided" if missing else "not able to tell"
            return JudgedClaim(claim, verdict, None, {}, None, {}, {}, missing, unable)
        per_data = {data: answers[claim.name, data] for data in usable}
        mean = answers.get((claim.name, None), per_data[usable[0]])
        verdict = joint_verdict(claim.expects, [*per_data.values()], mean)
        joint = mean if is_mean_given(claim.expects, [*per_data.values()], mean, verdict) else None
        return JudgedClaim(
            claim,
            verdict,
            joint,
            per_data,
            None if joint is None else self._class_differences(claim, usable, joint.level),
            {
                score: self._mean_difference(claim._replace(score=score), usable)
                for score in self.study.scores
                if score != claim.score
            },
            self._members(claim, usable),
            missing,
            unable,
        )

    def _mean_difference(self, claim: Claim, data: Sequence[str]) -> float:
        return float(np.mean([np.mean(self._differences(claim, one)) for one in data]))

    def _members(self, claim: Claim, data: Sequence[str]) -> dict[str, tuple[float, float]]:
        """Return the difference of each member of an averaged group, and the difference without this member."""
        found = {}
        for arm in claim.compare if len(claim.compare) > 1 else ():
            others = tuple(other for other in claim.compare if other != arm)
            found[arm] = [claim._replace(compare=(arm,)), claim._replace(compare=others)]
        for arm in claim.with_ if len(claim.with_) > 1 else ():
            others = tuple(other for other in claim.with_ if other != arm)
            found[arm] = [claim._replace(with_=(arm,)), claim._replace(with_=others)]
        return {
            arm: (self._mean_difference(alone, data), self._mean_difference(without, data))
            for arm, (alone, without) in found.items()
        }

    def _missing(self, claim: Claim) -> int:
        arms = {*claim.compare, *claim.with_}
        wanted = len(arms) * len(claim.data) * len(self.study.seeds)
        return wanted - sum(len(self.of(arm, data)) for arm in arms for data in claim.data)

    def _differences(self, claim: Claim, data: str) -> list[float]:
        """Return one difference per seed. Runs of one seed share first weights and batches."""

        def means(arms: tuple[str, ...]) -> NDArray[np.float64]:
            # The mean of the group: no arm is selected by its test score.
            return np.mean([[_score(record, claim.score) for record in self.of(arm, data)] for arm in arms], axis=0)

        return (means(claim.compare) - means(claim.with_)).tolist()

    def _class_differences(self, claim: Claim, data_sets: Sequence[str], level: float) -> Interval | None:
        groups = []
        for data in data_sets:
            arms = [*claim.compare, *claim.with_]
            signs = [1 / len(claim.compare)] * len(claim.compare) + [-1 / len(claim.with_)] * len(claim.with_)
            group = _per_class([self.of(arm, data) for arm in arms], signs, claim.score)
            if group is None:
                return None
            groups.append(group)
        return class_interval(groups, level)

    def weight_mass(self, arm: str, data: str) -> dict[str, float]:
        """Return the sum of weights per anchor of each side, of the memory term or else of the batch, over seeds."""
        found: dict[str, list[float]] = {}
        for record in self.of(arm, data):
            weights = record.get("weights") or {}
            reading = weights.get("memory", weights.get("batch", {}))
            for side in ("positive", "negative"):
                if reading.get(side, {}).get("mass") is not None and reading["anchors"]:
                    found.setdefault(side, []).append(sum(reading[side]["mass"]) / reading["anchors"])
        return {side: float(np.mean(masses)) for side, masses in found.items()}

    def tries(self, arm: str, data: str) -> list[tuple[Values, list[float]]]:
        """Return every choice of an arm's search with its validation scores in points, one per seed."""
        search = self.study.search
        assert search is not None  # the search was run
        found: dict[str, tuple[Values, list[float]]] = {}
        for record in self.searched:
            if (record["arm"], record["data"]) == (arm, data):
                choice = record["choice"]
                found.setdefault(repr(choice), (choice, []))[1].append(POINTS * record["scores"][search.score])
        return list(found.values())

    def ends(self, arm: str, data: str) -> list[str]:
        """Return the searched options of an arm whose best value is the smallest or the largest number tried."""
        tries = self.tries(arm, data) if self.searched else []
        if self.study.search is None or not tries:
            return []
        best, _ = max(tries, key=lambda one: np.mean(one[1]))
        return self.study.search.ends(self.study.config(arm, data), best, [choice for choice, _ in tries])

    def budgets(self, data: str) -> dict[str, Budget]:
        """Return the budget that the runs of each arm have taken."""
        found: dict[str, Budget] = {}
        for record in self.records:
            if record["data"] == data and "steps" in record and not record["diverged"]:
                found[record["arm"]] = Budget(record["steps"], record["images_per_step"])
        return found

    def search_noise(self) -> float | None:
        """Return the standard deviation of the search score between seeds in points, or `None` with one seed."""
        if not self.searched:
            return None
        deviations = [
            np.asarray(scores) - np.mean(scores)
            for data in self.study.data
            for arm in self.study.arms
            for _, scores in self.tries(arm, data)
            if len(scores) > 1
        ]
        if not deviations:
            return None
        squares = sum(float((one**2).sum()) for one in deviations)
        return math.sqrt(squares / sum(len(one) - 1 for one in deviations))

    def commits(self) -> list[str]:
        """Return the commits of the runs; an installed package has none."""
        made = [*self.records, *self.searched]
        return sorted({record["made_by"]["commit"] or "an installed copy" for record in made})


def _score(record: Record, score: str) -> float:
    if score not in record["scores"]:
        raise ValueError(
            f"Expected one of the scores {', '.join(record['scores'])} but got {score!r}. Correct it in the study file."
        )
    return POINTS * record["scores"][score]


def _per_class(
    arms: Sequence[Sequence[Record]], signs: Sequence[float], score: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return, per class, the signed sum over arms of the mean over seeds in points, and the number of queries."""
    tables = [record.get("per_class", {}) for runs in arms for record in runs]
    if not tables or any(score not in table for table in tables):
        return None
    labels = tables[0]["label"]
    if any(table["label"] != labels for table in tables):
        return None  # the runs were scored on different classes
    means = [np.mean([record["per_class"][score] for record in runs], axis=0) for runs in arms]
    total = POINTS * sum(sign * mean for sign, mean in zip(signs, means, strict=True))
    return np.asarray(total), np.asarray(tables[0]["queries"], dtype=float)
