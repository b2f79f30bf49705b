"""Folders as people have them: which files in them are images, which folders are classes, and which are splits."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lightning_memdml.data.labels import normal_text
from lightning_memdml.data.paths import shown
from lightning_memdml.data.pictures import HEIC_SUFFIXES, SUFFIXES, looks_like_a_picture
from lightning_memdml.data.records import Record, Role

# What operating systems, storage devices and programs leave behind; folders with a dot in front are left out as well.
NOT_DATA = frozenset(
    {"__macosx", "@eadir", "__pycache__", "lost+found", "#recycle", "$recycle.bin", "system volume information"}
    | {"thumbs.db", "desktop.ini"}
)
SPLITS: dict[str, Role] = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
    "query": "query", "queries": "query", "probe": "query",
    "gallery": "gallery",
    "distractor": "gallery", "distractors": "gallery",
}  # fmt: skip
NAMES = "train, val, test, query, gallery or distractors"


def is_data(name: str) -> bool:
    """Return whether a file or folder of this name belongs to a data set.

    Example:
        >>> [is_data(name) for name in ("cat", ".git", "._1.jpg", "__MACOSX", "@eaDir")]
        [True, False, False, False, False]
    """
    return not name.startswith(".") and name.lower() not in NOT_DATA


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder that belong to a data set, in the order of their names."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and is_data(path.name))


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files at any depth that belong to a data set.

    Links to folders are followed, except back to a folder that they lie in.
    """
    above = {folder: {_identity(folder)}}
    for where, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        here = above.pop(Path(where))
        entered = []
        for name in folders:
            inner = Path(where, name)
            if is_data(name) and (identity := _identity(inner)) not in here:
                above[inner] = {*here, identity}
                entered.append(name)
        folders[:] = entered
        yield from (Path(where, name) for name in files if is_data(name))


def _raise(error: OSError) -> None:
    """Stop at a folder that cannot be read, which `os.walk` would leave out without a word."""
    raise error


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def is_image(file: Path) -> bool:
    """Return whether a file is an image by its suffix, or, without one, by its first bytes."""
    return file.suffix.lower() in SUFFIXES if file.suffix else looks_like_a_picture(str(file))


def find_splits(root: Path) -> tuple[Path, dict[Path, Role]]:
    """Return the folder that holds the class folders, or the folders of each role, and these with their roles.

    Any of the names in `SPLITS` will do, in capitals or not. A single folder of such a name may be a class too: it is
    one if images lie in it directly. A folder that holds nothing but these folders is looked into.

    Raises:
        ValueError: If there are two folders of one role, or others beside them.
    """
    folders = subfolders(root)
    named = [folder for folder in folders if _plain(folder) in SPLITS]
    _refuse_almost_splits(root, folders)
    if not named or (len(named) == 1 and _holds_images(named[0])):
        if len(folders) == 1 and not _holds_images(folders[0]):
            top, splits = find_splits(folders[0])
            return (top, splits) if splits else (root, {})
        return root, {}
    if others := [folder.name for folder in folders if folder not in named]:
        raise ValueError(
            f"Expected the folders {NAMES} in {shown(root)} but got {_listed(others)} beside "
            f"{_listed([folder.name for folder in named])}. Rename or move one or the other."
        )
    kinds: dict[tuple[Role, bool], Path] = {}
    for folder in named:
        kind = SPLITS[_plain(folder)], is_distractors(folder)
        if kind in kinds:
            raise ValueError(
                f"Expected one folder of the {kind[0]} images in {shown(root)} but got "
                f"{_listed([kinds[kind].name, folder.name])}. Put the images into one of the two."
            )
        kinds[kind] = folder
    order = list(SPLITS.values())
    return root, {folder: role for (role, _), folder in sorted(kinds.items(), key=lambda item: order.index(item[0][0]))}


def is_distractors(folder: Path) -> bool:
    """Return whether a folder holds images that are right answers to no query."""
    return _plain(folder).startswith("distractor")


def _plain(folder: Path) -> str:
    return folder.name.strip().lower()


def _refuse_almost_splits(root: Path, folders: Sequence[Path]) -> None:
    """Refuse folders such as train_set and test_set, or train2017 and val2017, which would become classes."""
    words = [[word.removesuffix("set") for word in re.split("[^a-z]+", _plain(folder))] for folder in folders]
    roles = [next((SPLITS[word] for word in named if word in SPLITS), None) for named in words]
    exact = any(_plain(folder) in SPLITS for folder in folders)
    if not exact and None not in roles and len(set(roles)) > 1:
        raise ValueError(
            f"Expected the folders {NAMES} in {shown(root)} but got {_listed([folder.name for folder in folders])}. "
            "Rename them."
        )


def _holds_images(folder: Path) -> bool:
    return any(path.is_file() and is_data(path.name) and is_image(path) for path in folder.iterdir())


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{shown(name)}'" for name in names[:5]) + (", ..." if len(names) > 5 else "")


class FolderReader:
    """Makes records of the images in folders, and counts what it leaves out.

    Args:
        root: The folder of the data set, for messages.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.left_out: list[Path] = []

    def records(self, folder: Path, role: Role) -> list[Record]:
        """Return a record per image below `folder`, in the order of their paths.

        The class of an image is the first folder on the way to it, whatever other folders follow; of an image that lies
        in `folder` itself it is the name of `folder`. A distractor is of no class that a query has.

        Raises:
            ValueError: If folders named like splits lie inside the class folders.
        """
        self._refuse_splits_in_classes(files := sorted(files_below(folder)), folder)
        records = []
        for file in files:
            if not file.is_file() or not is_image(file):  # a broken link is no file
                self.left_out.append(file)
                continue
            parts = file.relative_to(folder).parts
            label = parts[0] if len(parts) > 1 else folder.name
            if is_distractors(folder):
                label = f"{folder.name}/{parts[0]}"
            records.append(Record(str(file), normal_text(label), role))
        return records

    def _refuse_splits_in_classes(self, files: Sequence[Path], folder: Path) -> None:
        inner: dict[Path, None] = {}
        for file in files:
            parts = file.relative_to(folder).parts[:-1]
            for depth, name in enumerate(parts[1:], start=2):
                if name.lower() in SPLITS:
                    inner.setdefault(folder.joinpath(*parts[:depth]))
        if len(inner) > 1:
            raise ValueError(
                f"Expected the folders {NAMES} above the class folders, but got them below: "
                f"{_listed([str(path) for path in inner])}. Rename them, or turn the order of the folders round."
            )

    def warn_of_left_out(self) -> None:
        """Name in one warning how many files were left out."""
        if self.left_out:
            heic = any(file.suffix.lower() in HEIC_SUFFIXES - SUFFIXES for file in self.left_out)
            rank_zero_warn(
                f"{len(self.left_out)} files in {shown(self.root)} are no images of a class and are not used: "
                f"{suffixes_of(self.left_out)}.{' Install the extra `heic` to read HEIC pictures.' if heic else ''}"
            )


def suffixes_of(files: Sequence[Path]) -> str:
    """Return the suffixes of files in words, the most frequent first."""
    counts = Counter("(broken link)" if not file.exists() else file.suffix or "(no suffix)" for file in files)
    return ", ".join(f"{shown(suffix)} ({count})" for suffix, count in counts.most_common(8)) or "none"


def image_records(root: Path) -> list[Record]:
    """Return a record per image below `root`, all with the role `test`; their classes as `FolderReader` gives them.

    Raises:
        ValueError: If a folder beside those of the roles has an unknown name.
    """
    top, splits = find_splits(root)
    reader = FolderReader(top)
    records = [record for folder in splits or [top] for record in reader.records(folder, "test")]
    reader.warn_of_left_out()
    return records
