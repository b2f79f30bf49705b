"""Images in one folder per class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_memdml.checks import check_types
from lightning_memdml.data.folders import (
    FolderReader,
    files_below,
    find_splits,
    is_distractors,
    subfolders,
    suffixes_of,
)
from lightning_memdml.data.module import RetrievalDataModule
from lightning_memdml.data.paths import local_path, shown
from lightning_memdml.data.pictures import SUFFIXES
from lightning_memdml.data.records import ClassSplit, Record, Role, split_classes


class FolderDataModule(RetrievalDataModule):
    """Images in one folder per class: `root/<class>/**/<image>`.

    If `root` holds the folders `train`, `val`, `test`, or `query`, `gallery` and `distractors`, these hold the class
    folders of each role (`training`, `valid`, `validation` and `testing` are understood too, in capitals or not; a
    folder that holds nothing but these folders may be passed as well). Images of `distractors` are searched, and are
    right answers to no query. Otherwise the classes are split by `split_by`, in the order of their names.

    Links are followed. Hidden files and folders, and what systems leave behind (`__MACOSX`, `@eaDir`, `__pycache__`),
    are ignored. Other files that are no images are counted in a warning.

    Args:
        root: Folder that holds one folder per class, or the folders of the roles.
        split_by: Which classes train if `root` has no folder for each role: the first of two `halves`, or every second
            class (`alternate`).

    Raises:
        FileNotFoundError: If there is no such folder, or no class folder in it.
        ValueError: If a class folder holds no image, or a folder beside those of the roles has an unknown name.

    Example:
        >>> data = FolderDataModule("my/images", batch_size=32, image_size=128)
    """

    def __init__(self, root: str, split_by: ClassSplit = "halves", **kwargs: Any) -> None:
        check_types(FolderDataModule.__init__, locals())
        super().__init__(**kwargs)
        self.root = local_path(root, "root")
        self.split_by = split_by

    def records(self) -> list[Record]:
        """Return a record per image file, in the order of their paths."""
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"FolderDataModule looked for the folder {shown(self.root)}, which does not exist; pass `root=`."
            )
        top, splits = find_splits(self.root)
        reader = FolderReader(top)
        if splits:
            records = [record for folder, role in splits.items() for record in _class_records(folder, role, reader)]
        else:
            records = _class_records(top, "train", reader)
            records = split_classes(records, sorted({record.label for record in records}), self.split_by)
        reader.warn_of_left_out()
        return records


def _class_records(folder: Path, role: Role, reader: FolderReader) -> list[Record]:
    """Return a record per image in the class folders of `folder`; other images in it are left out.

    Raises:
        FileNotFoundError: If `folder` holds no folder.
        ValueError: If a class folder holds no image.
    """
    if is_distractors(folder):
        return reader.records(folder, role)
    classes = subfolders(folder)
    if not classes:
        raise FileNotFoundError(
            f"FolderDataModule expected one folder per class in {shown(folder)} but found none; "
            f"there are files with the suffixes: {suffixes_of(list(files_below(folder)))}. Sort them into folders."
        )
    records = []
    filled = set()
    for record in reader.records(folder, role):
        first, *more = Path(record.path).relative_to(folder).parts
        if more:
            records.append(record)
            filled.add(first)
        else:
            reader.left_out.append(Path(record.path))
    for class_folder in classes:
        if class_folder.name not in filled:
            files = list(files_below(class_folder))
            raise ValueError(
                f"Expected images ({', '.join(sorted(SUFFIXES))}) in the class folder {shown(class_folder)} but found "
                f"files with the suffixes: {suffixes_of(files)}. Add images or remove the folder."
            )
    return records
