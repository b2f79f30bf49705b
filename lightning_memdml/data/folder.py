"""Images in one folder per class."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_memdml.data.images import ClassSplit, Record, Role, split_classes
from lightning_memdml.data.module import RetrievalDataModule

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class FolderDataModule(RetrievalDataModule):
    """Images in one folder per class: `root/<class>/**/<image>`.

    If `root` holds the folders `train` and `test`, these hold the class folders of either side, and `val`, if there is
    one, those of the validation classes. Otherwise the classes are split by `split_by`, in the order of their names.
    Hidden files and folders (also the `._` files of macOS) are passed over; other files that are no images are
    counted in a warning.

    Args:
        root: The folder.
        split_by: Which classes train if there are no `train` and `test` folders: the first of two `halves`, or every
            second class (`alternate`).

    Raises:
        FileNotFoundError: If there is no such folder, or no class folder in it.
        ValueError: If a class folder holds no image.
    """

    def __init__(self, root: str, split_by: ClassSplit = "halves", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root).expanduser()
        self.split_by = split_by

    def records(self) -> list[Record]:
        """Return a record per image file, in the order of their paths."""
        sides: list[Role] = [role for role in ("train", "val", "test") if (self.root / role).is_dir()]
        if "train" in sides and "test" in sides:
            return [record for role in sides for record in records_of(self.root / role, role)]
        found = records_of(self.root, "train")
        return split_classes(found, sorted({record.label for record in found}), self.split_by)


def records_of(folder: Path, role: Role) -> list[Record]:
    """Return a record per image in the class folders of `folder`.

    Raises:
        FileNotFoundError: If `folder` is missing or holds no folder.
        ValueError: If a class folder holds no image.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"FolderDataModule looked for the folder {folder}, which does not exist; pass `root=`.")
    class_folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not class_folders:
        raise FileNotFoundError(
            f"FolderDataModule expected one folder per class in {folder} but found none; "
            f"there are files with the suffixes: {_suffixes(_visible_files(folder))}."
        )
    records, others = [], []
    for class_folder in class_folders:
        files = _visible_files(class_folder)
        images = [file for file in files if file.suffix.lower() in SUFFIXES]
        if not images:
            raise ValueError(
                f"Expected images ({', '.join(sorted(SUFFIXES))}) in the class folder {class_folder} but found files "
                f"with the suffixes: {_suffixes(files)}. Add images or remove the folder."
            )
        records += [Record(str(image), class_folder.name, role) for image in images]
        others += [file for file in files if file.suffix.lower() not in SUFFIXES]
    if others:
        rank_zero_warn(f"{len(others)} files in {folder} are no images and are not used: {_suffixes(others)}.")
    return records


def _visible_files(folder: Path) -> list[Path]:
    """Return the files at any depth below `folder`, without hidden ones and those in hidden folders."""
    found = (file for file in folder.rglob("*") if file.is_file())
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _suffixes(files: list[Path]) -> str:
    """Return the suffixes of `files` in words, the most frequent first."""
    counts = Counter(file.suffix or "(no suffix)" for file in files)
    return ", ".join(f"{suffix} ({count})" for suffix, count in counts.most_common(8)) or "none"
