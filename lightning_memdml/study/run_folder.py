"""The files of a study's finished runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lightning_memdml.atomic_write import atomic_write
from lightning_memdml.study.plan import Record, Run


class RunFolder:
    """The finished runs of a study, one JSON file each.

    Args:
        path: The study's folder.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.runs = self.path / "runs"

    def load(self, run: Run) -> Record | None:
        """Return the record of a finished run, or `None`.

        Raises:
            ValueError: If its file is damaged.
        """
        file = self._file(run)
        if not file.is_file():
            return None
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            return record if record["key"] == run.key else None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Expected a finished run in {file} but the file is damaged. Delete it to repeat the run."
            ) from error

    def finished(self, runs: Sequence[Run]) -> list[Record]:
        """Return the records of all finished runs."""
        return [record for run in runs if (record := self.load(run)) is not None]

    def save(self, run: Run, record: Record) -> None:
        """Write the file of a finished run atomically."""
        with atomic_write(self._file(run)) as unfinished:
            unfinished.write_text(json.dumps(record, default=str), encoding="utf-8")

    def _file(self, run: Run) -> Path:
        return (self.path / "references" if run.stage == "reference" else self.runs) / run.file_name

    def fail(self, run: Run, reason: str) -> Path:
        """Keep the reason why a run failed, and return the file."""
        file = self.path / "failed" / run.file_name.replace(".json", ".txt")
        with atomic_write(file) as unfinished:
            unfinished.write_text(reason, encoding="utf-8")
        return file
