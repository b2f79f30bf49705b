"""Images of a data set of Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image
from torch import Tensor

from lightning_memdml.checks import check_types
from lightning_memdml.data.module import RetrievalDataModule
from lightning_memdml.data.paths import local_path
from lightning_memdml.data.pictures import open_picture
from lightning_memdml.data.records import ClassSplit, Record, Role, split_classes

ROLES: dict[str, Role] = {"train": "train", "validation": "val", "test": "test"}


class HuggingFaceImages:
    """Opens the image of a row, from its file or its bytes.

    Args:
        parts: Data sets of Hugging Face, whose rows follow each other.
        column: The column of the images, not decoded.
    """

    def __init__(self, parts: Sequence[Any], column: str) -> None:
        self.parts, self.column = parts, column

    def __call__(self, row: int) -> Image.Image:
        """Return the image of a row, upright and in RGB."""
        for part in self.parts:
            if row < len(part):
                break
            row -= len(part)
        cell = part[row][self.column]
        return open_picture(cell["path"] if cell.get("bytes") is None else BytesIO(cell["bytes"]))


class HuggingFaceDataModule(RetrievalDataModule):
    """Images of a data set of Hugging Face (extra `hf`), with a column of images and one of labels.

    Its classes are split by `split_by`, whatever its own splits are: those have the same classes in `train` and `test`,
    where retrieval is tested on unseen classes. With `own_splits`, `train`, `validation` and `test` keep their roles.

    Args:
        path: A folder of `save_to_disk`, or with `download` a name on the hub (`cifar100`).
        image_column: The column of images.
        label_column: The column of labels.
        split_by: Which classes train: the first of two `halves`, or every second class (`alternate`). They are ordered
            by their names.
        own_splits: Keep the roles of `train`, `validation` and `test`.
        download: Take `path` for a name on the hub, and download it once.

    Raises:
        ImportError: If datasets is not installed.
        FileNotFoundError: If there is no such folder.
        ValueError: If a column is missing, or `own_splits` is set and there is no `train`.

    Example:
        >>> data = HuggingFaceDataModule("my/dataset", label_column="category")
    """

    def __init__(
        self,
        path: str,
        image_column: str = "image",
        label_column: str = "label",
        split_by: ClassSplit = "halves",
        own_splits: bool = False,
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        check_types(HuggingFaceDataModule.__init__, locals())
        super().__init__(**kwargs)
        self.path = path if download else str(local_path(path, "path"))
        self.image_column, self.label_column = image_column, label_column
        self.split_by, self.own_splits, self.download = split_by, own_splits, download

    def prepare_data(self) -> None:
        """Download the data set, once on each machine."""
        self._parts()

    def records(self) -> list[Record]:
        """Return a record per row of every split, named `split/row`."""
        records = []
        for split, part in self._parts().items():
            feature = part.features[self.label_column]
            names = getattr(feature, "names", None)
            for row, label in enumerate(part[self.label_column]):
                name = label if names is None else names[label]
                records.append(Record(f"{split}/{row}", name, ROLES.get(split, "test") if self.own_splits else "test"))
        if self.own_splits:
            return records
        return split_classes(records, sorted({record.label for record in records}), self.split_by)

    def images(self, records: Sequence[Record]) -> Tensor | Callable[[int], Image.Image | Tensor]:
        """Return the function that opens the image of a row."""
        datasets = _datasets()
        undecoded = datasets.Image(decode=False)
        parts = [part.cast_column(self.image_column, undecoded) for part in self._parts().values()]
        return HuggingFaceImages(parts, self.image_column)

    def _parts(self) -> dict[str, Any]:
        """Return the splits that are used, by their names."""
        datasets = _datasets()
        if self.download:
            loaded = datasets.load_dataset(self.path)
        elif Path(self.path).is_dir():
            loaded = datasets.load_from_disk(self.path)
        else:
            raise FileNotFoundError(
                f"Expected a folder of `save_to_disk` but there is no {self.path}. Pass `download=True` "
                "(`--data.download true`) for a name on the hub."
            )
        parts = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
        if self.own_splits:
            parts = {name: part for name, part in parts.items() if name in ROLES}
            if "train" not in parts:
                raise ValueError(
                    f"Expected a split `train` in {self.path} but got {', '.join(loaded) or 'none'}. "
                    "Rename one, or pass `own_splits=False` to split the classes."
                )
        for name, part in parts.items():
            missing = [column for column in (self.image_column, self.label_column) if column not in part.features]
            if missing:
                raise ValueError(
                    f"Expected the columns {self.image_column} and {self.label_column} in {self.path} ({name}) but got "
                    f"{', '.join(part.features)}. Pass `image_column` and `label_column`."
                )
        return parts


def _datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'Expected datasets for HuggingFaceDataModule but it is not installed. `pip install "lightning-memdml[hf]"`.'
        ) from error
    return datasets
