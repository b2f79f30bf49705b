"""Results of a study: scores with intervals, and a verdict on every claim."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_memdml.study.statistics import Estimate, Interval, Judgement, class_interval, estimate, judge
from lightning_memdml.study.study_file import Claim, Study

Record = dict[str, Any]
POINTS = 100  # scores are in [0, 1], differences are reported in points


class Score(NamedTuple):
    """A score of an arm on a data set, in points.

    Attributes:
        values: One value per seed.
        estimate: The mean over seeds.
        over_seeds: Interval of the mean over seeds.
        over_classes: Interval over test classes, or `None` without scores per class.
    """

    values: list[float]
    estimate: Estimate
    over_seeds: Interval
    over_classes: Interval | None


class JudgedClaim(NamedTuple):
    """A claim with its verdict.

    Attributes:
        claim: The claim.
        judgement: The verdict, from the interval over seeds.
        over_classes: Interval of the same difference over test classes at the same level, or `None`.
        missing: Number of runs that are not finished yet.
    """

    claim: Claim
    judgement: Judgement
    over_classes: Interval | None
    missing: int


class Results:
    """The finished runs of a study, with scores and verdicts.

    Args:
        study: The study.
        records: Finished runs on test classes.
        searched: Finished runs on validation classes.
    """

    def __init__(self, study: Study, records: Sequence[Record], searched: Sequence[Record] = ()) -> None:
        self.study = study
        self.records = list(records)
        self.searched = list(searched)

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
        return Score(values, found, found.interval(self.study.confidence), over_classes)

    def claims(self) -> list[JudgedClaim]:
        """Return the verdicts on all claims, decided jointly."""
        claims = self.study.claims
        missing = [self._missing(claim) for claim in claims]
        unknown = Estimate(math.nan, math.inf, 1)
        estimates = [
            unknown if lacking else estimate(self._differences(claim))
            for claim, lacking in zip(claims, missing, strict=True)
        ]
        asked = [(found, claim.expects, claim.by) for found, claim in zip(estimates, claims, strict=True)]
        judged = []
        for claim, lacking, judgement in zip(claims, missing, judge(asked, self.study.confidence), strict=True):
            classes = None if lacking else self._class_differences(claim, judgement.level)
            judged.append(JudgedClaim(claim, judgement, classes, lacking))
        return judged

    def _missing(self, claim: Claim) -> int:
        arms = {*claim.compare, *claim.with_}
        wanted = len(arms) * len(claim.data) * len(self.study.seeds)
        return wanted - sum(len(self.of(arm, data)) for arm in arms for data in claim.data)

    def _differences(self, claim: Claim) -> list[list[float]]:
        """Return one difference per seed for each data set. Runs of one seed share first weights and batches."""

        def means(arms: tuple[str, ...], data: str) -> NDArray[np.float64]:
            # The mean of the group: no arm is selected by its test score.
            return np.mean([[_score(record, claim.score) for record in self.of(arm, data)] for arm in arms], axis=0)

        return [(means(claim.compare, data) - means(claim.with_, data)).tolist() for data in claim.data]

    def _class_differences(self, claim: Claim, level: float) -> Interval | None:
        groups = []
        for data in claim.data:
            arms = [*claim.compare, *claim.with_]
            signs = [1 / len(claim.compare)] * len(claim.compare) + [-1 / len(claim.with_)] * len(claim.with_)
            group = _per_class([self.of(arm, data) for arm in arms], signs, claim.score)
            if group is None:
                return None
            groups.append(group)
        return class_interval(groups, level)

    def commits(self) -> list[str]:
        """Return the commits of the runs; an installed package has none."""
        made = [*self.records, *self.searched]
        return sorted({record["made_by"]["commit"] or "an installed copy" for record in made})


def _score(record: Record, score: str) -> float:
    if score not in record["scores"]:
        raise ValueError(f"Expected one of the scores {', '.join(record['scores'])} but got {score!r}.")
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
