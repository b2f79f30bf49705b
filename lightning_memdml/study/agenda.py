"""The order in which the runs of a study start, so that several processes stay busy until the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_memdml.study.plan import KnownRuns, Record, Run
from lightning_memdml.study.run_folder import RunFolder


class Agenda:
    """The runs of a study: which are finished, and which one starts next.

    References come first, then the search, then the test runs seed by seed, and in each of these data set by data set.
    Within such a group the longest run starts first: a long run that starts last would leave other processes idle.
    Finished search runs add runs: those of an extended grid, and the test runs of an arm whose search is finished.

    Args:
        known: Returns the known runs, given the records of finished ones.
        folder: Where finished runs are kept.

    Attributes:
        runs: The runs that are known so far.
        records: Key of a finished run -> its record.
    """

    def __init__(self, known: Callable[[Sequence[Record]], KnownRuns], folder: RunFolder) -> None:
        self._known = known
        self._folder = folder
        self._seen: set[str] = set()
        self._left: list[Run] = []
        self.records: dict[str, Record] = {}
        self._update()

    def _update(self) -> None:
        """Add the runs that have become known; those that are finished already may make further ones known."""
        while True:
            self.runs, self._later = self._known([*self.records.values()])
            new = [run for run in self.runs if run.key not in self._seen]
            if not new:
                return
            for run in new:
                self._seen.add(run.key)
                record = self._folder.load(run)
                if record is None:
                    self._left.append(run)
                else:
                    self.records[run.key] = record

    @property
    def planned(self) -> list[Run]:
        """All runs, including test runs whose choice is not known yet."""
        return [*self.runs, *self._later]

    @property
    def is_complete(self) -> bool:
        """Whether all planned runs are finished."""
        return all(run.key in self.records for run in self.planned)

    def next(self) -> Run | None:
        """Return the run that starts next, once; `None` if no run can start now."""
        if not self._left:
            return None
        place = {self._group(run): -number for number, run in enumerate(reversed(self.runs))}  # where a group begins
        first = min(self._left, key=lambda run: place[self._group(run)])
        group = [run for run in self._left if self._group(run) == self._group(first)]
        longest = max(group, key=self._expected_seconds)
        self._left.remove(longest)
        return longest

    def finish(self, run: Run) -> None:
        """Note that a run has ended, and find the runs that can start now. A run that failed has no record."""
        record = self._folder.load(run)
        if record is not None:
            self.records[run.key] = record
            self._update()

    def leave_out(self, data: str) -> int:
        """Start no more runs on a data set of which no reference can be scored; return how many are left out.

        Without references to score, as where images are missing, every other run would fail in the same way. As long as
        one reference is finished or not tried yet, all runs stay.
        """
        references = [run for run in self.runs if run.stage == "reference" and run.data == data]
        if any(run.key in self.records or run in self._left for run in references):
            return 0
        before = len(self._left)
        self._left = [run for run in self._left if run.data != data]
        return before - len(self._left) + sum(run.data == data for run in self._later)

    @staticmethod
    def _group(run: Run) -> tuple[str, int | None, str]:
        return run.stage, run.seed if run.stage == "test" else None, run.data

    def _expected_seconds(self, run: Run) -> float:
        """Return the mean time of finished runs of the arm; without any, that of their images in other arms."""
        trained = [record for record in self.records.values() if record["stage"] != "reference"]
        alike = [one["seconds"] for one in trained if (one["arm"], one["data"]) == (run.arm, run.data)]
        if alike:
            return float(sum(alike) / len(alike))
        images = sum(record["steps"] * record["images_per_step"] for record in trained)
        return run.images * (sum(record["seconds"] for record in trained) / images if images else 1.0)
