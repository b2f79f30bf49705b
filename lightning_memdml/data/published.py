"""The base of the benchmarks: released files under a root, list files, and published counts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_warn

from lightning_memdml.checks import check_types
from lightning_memdml.data.downloads import Archive, fetch, unpack
from lightning_memdml.data.module import RetrievalDataModule
from lightning_memdml.data.paths import local_path
from lightning_memdml.data.records import Record, Role
from lightning_memdml.data.roles import Count, Problem

Line = tuple[str, list[str]]  # where it stands, for messages, and its cells


class PublishedDataModule(RetrievalDataModule):
    """A data set in the files that its authors released, with the split and the roles of its protocol.

    A new one is a class with `source`, `recall_levels` and `published_counts`, which reads its list files in `records`.
    The counts are compared with the published ones: `setup` warns of differences, `verify` lists them.

    Args:
        root: The folder with the released files, unpacked.
        download: Fetch and unpack the files into `root` if they are not there: for data sets that have an official
            direct address. The archives stay in `root`; they may be deleted.

    Attributes:
        archives: What `download` fetches.
        source: Which files to fetch, from where, and where to put them. It ends every message about missing files.
        recall_levels: The K of the Recall@K that papers report.
        published_counts: Images and classes of each role.
    """

    archives: ClassVar[tuple[Archive, ...]] = ()
    source: ClassVar[str]
    recall_levels: ClassVar[tuple[int, ...]]
    published_counts: ClassVar[Mapping[Role, Count]] = {}

    def __init__(self, root: str, download: bool = False, **kwargs: Any) -> None:
        check_types(PublishedDataModule.__init__, locals())
        super().__init__(**kwargs)
        self.root = local_path(root, "root")
        if download and not self.archives:
            raise ValueError(
                f"Expected `download=False`, as {type(self).__name__} has no official direct address. {self.source}"
            )
        self.download = download

    def prepare_data(self) -> None:
        """Fetch missing files if `download` is set; once per machine."""
        if not self.download:
            return
        try:
            self.records()
        except FileNotFoundError:
            for archive in self.archives:
                unpack(fetch(archive, self.root), self.root)

    def expected_counts(self) -> Mapping[Role, Count]:
        """Return the published counts of what is read with the present options."""
        return self.published_counts

    def setup(self, stage: str | None = None) -> None:
        """Read the records and make the data sets; warn if they are not as many as published."""
        if hasattr(self, "classes"):
            return
        super().setup(stage)
        if problems := self.count_problems():
            found = "; ".join(problem.reason for problem in problems)
            rank_zero_warn(
                f"{type(self).__name__} in {self.root}: {found}. Scores are not comparable with published ones."
            )

    def verify(self) -> list[Problem]:
        """Compare the counts with the published ones, open every image, and return what is wrong."""
        self.setup()
        return [*self.count_problems(), *super().verify()]

    def count_problems(self) -> list[Problem]:
        """Return the roles that have other than the published numbers of images or classes."""
        problems = []
        for role, expected in self.expected_counts().items():
            found = self.counts.get(role, Count(0, 0))
            if any(number not in (None, there) for number, there in zip(expected, found, strict=True)):
                reason = f"expected {expected.in_words(role)} but found {found.in_words(role)}"
                problems.append(Problem(str(self.root), reason))
        return problems

    def folder_with(self, name: str, *folders: str) -> Path:
        """Return the first of `folders` below the root (`""`: the root itself) that holds the file or folder `name`.

        Raises:
            FileNotFoundError: If none does.
        """
        for folder in folders:
            if (self.root / folder / name).exists():
                return self.root / folder
        looked = " or ".join(str(self.root / folder / name) for folder in folders)
        raise FileNotFoundError(f"{type(self).__name__} looked for {looked}, which does not exist. {self.source}")


def read_list(path: Path, columns: Sequence[str]) -> list[Line]:
    """Return the rows of a list file that separates its columns by any number of spaces.

    A line with the names of the columns is passed over if it is there. So is a first line with a number only: the
    number of rows, as DeepFashion's files begin, which must be right then.

    Args:
        path: The file.
        columns: Names of its columns.

    Raises:
        ValueError: If the file is no text, a row has more or fewer columns, or the announced number of rows is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file: {error}. Download it again.") from error
    # Not `splitlines`, which also breaks at control characters that may stand in a damaged path.
    lines = [(f"{path}, line {number}", line.split()) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(where, cells) for where, cells in lines if cells]
    promised = None
    if lines and len(columns) > 1 and len(lines[0][1]) == 1:
        where, (cell,) = lines.pop(0)
        promised = integer(cell, where, "the number of rows")
    if lines and [cell.lower() for cell in lines[0][1]] == [column.lower() for column in columns]:
        lines.pop(0)
    for where, cells in lines:
        if len(cells) != len(columns):
            raise ValueError(
                f"{where}: expected {len(columns)} columns ({' '.join(columns)}) but got {len(cells)}. "
                "Download the file again."
            )
    if promised not in (None, len(lines)):
        raise ValueError(
            f"{path}: expected {promised} rows, as in its first line, but got {len(lines)}. Download it again."
        )
    if not lines:
        raise ValueError(f"{path} lists nothing. Download it again.")
    return lines


def integer(cell: str, where: str, name: str, low: int = 0, high: int = 10**18) -> int:
    """Return the number in a cell.

    Raises:
        ValueError: If it is none, or not in [`low`, `high`].

    Example:
        >>> integer("11319", "list.txt", "class", 1, 11318)
        Traceback (most recent call last):
        ValueError: list.txt: expected class to be an integer of 1 to 11318 but got '11319'. Download the file again.
    """
    if re.fullmatch(r"\d{1,19}", cell, re.ASCII) and low <= int(cell) <= high:
        return int(cell)
    bounds = f"of {low} to {high}" if high < 10**18 else f"of {low} or more"
    raise ValueError(f"{where}: expected {name} to be an integer {bounds} but got {cell!r}. Download the file again.")


def checked(records: Iterable[Record], data_set: str) -> list[Record]:
    """Return `records` without repeated lines.

    Raises:
        ValueError: If there is no record, an image is listed with two classes or roles, or a class is on both sides.
    """
    seen: dict[tuple[Any, ...], Record] = {}
    side_of: dict[int | str, Record] = {}
    kept: list[Record] = []
    repeats = 0
    for record in records:
        first = seen.setdefault((record.path, record.box), record)
        if first is not record:
            if first != record:
                raise ValueError(
                    f"{data_set} lists {record.path} as {first.role} image of class {first.label} and again as "
                    f"{record.role} image of class {record.label}. Download its list files again."
                )
            repeats += 1
            continue
        other = side_of.setdefault(record.label, record)
        if (other.role == "train") != (record.role == "train"):
            raise ValueError(
                f"{data_set} lists class {record.label} for training and for test ({other.path}, {record.path}), but "
                "its protocol tests on other classes than it trains on. Download its list files again."
            )
        kept.append(record)
    if not kept:
        raise ValueError(f"{data_set} lists no images. Download its list files again.")
    if repeats:
        rank_zero_warn(f"{data_set} lists images more than once; {repeats} repeated lines are not used.")
    return kept
