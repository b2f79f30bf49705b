"""Cars196, also called Stanford Cars."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from lightning_memdml.checks import check_types
from lightning_memdml.data.matlab import read_structs
from lightning_memdml.data.paths import inside
from lightning_memdml.data.published import PublishedDataModule, checked, integer
from lightning_memdml.data.records import Record, box_of
from lightning_memdml.data.roles import Count

TRAIN_CLASSES = 98
CLASSES = 196
BOX = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


class Cars196(PublishedDataModule):
    """Cars196 (Krause et al. 2013, Stanford Cars, 3dRR-13): 16,185 photographs of 196 models of cars.

    The 8,054 images of the first 98 classes are for training; each of the 8,131 images of the others is a query that
    searches among the rest of them. The released split into train and test is one for classification, with all classes
    on both sides, so both parts are read and split by class. Both layouts of the release are read:

        root/                                    or root/stanford_cars/
            cars_annos.mat                       the old one
            car_ims/*.jpg

            devkit/cars_train_annos.mat          the new one
            cars_test_annos_withlabels.mat       here or in devkit/
            cars_train/*.jpg
            cars_test/*.jpg

    Source: the page of its authors is gone; mirrors are found as "Stanford Cars". For non-commercial research.

    Args:
        root: The folder of the released files.
        crop: Cut images to the car. The field uses whole images.

    Raises:
        FileNotFoundError: If an annotation file is missing.
        ValueError: If an annotation file is damaged, or points out of its folder.

    Example:
        >>> data = Cars196("data/stanford_cars")
    """

    source = (
        "Get Stanford Cars from a mirror, in the old layout (car_ims.tgz, cars_annos.mat) or the new one "
        "(cars_train.tgz, cars_test.tgz, devkit, cars_test_annos_withlabels.mat of MD5 "
        "b0a2b23655a3edd16d84508592a98d10), unpack it, and pass `root=` of the folder that holds car_ims or cars_train."
    )
    recall_levels = (1, 2, 4, 8)
    published_counts: ClassVar = {"train": Count(8054, 98), "test": Count(8131, 98)}

    def __init__(self, root: str, crop: bool = False, **kwargs: Any) -> None:
        check_types(Cars196.__init__, locals())
        super().__init__(root=root, **kwargs)
        self.crop = crop

    def records(self) -> list[Record]:
        """Return a record per annotated image, in the order of the annotation files."""
        return checked(self._annotated(), type(self).__name__)

    def _annotated(self) -> Iterator[Record]:
        tops = ("", "stanford_cars")
        if any((self.root / top / "cars_annos.mat").is_file() for top in tops):
            top = self.folder_with("cars_annos.mat", *tops)
            yield from self._images(top / "cars_annos.mat", "relative_im_path", top)
            return
        name = "cars_test_annos_withlabels.mat"
        top = self.folder_with("devkit/cars_train_annos.mat", *tops)
        labelled = self.folder_with(name, *(str((top / below).relative_to(self.root)) for below in ("", "devkit")))
        yield from self._images(top / "devkit/cars_train_annos.mat", "fname", top / "cars_train")
        yield from self._images(labelled / name, "fname", top / "cars_test")

    def _images(self, path: Path, name: str, images: Path) -> Iterator[Record]:
        """Yield a record per row of an annotation file, whose field `name` is the image's path below `images`."""
        for row, annotation in enumerate(read_annotations(path, (name, "class", *BOX))):
            where = f"{path}, row {row + 1}"
            label = integer(annotation["class"], where, "class", 1, CLASSES)
            box = None
            if self.crop:
                left, upper, right, lower = box_of([annotation[edge] for edge in BOX], where)
                box = (
                    left - 1,
                    upper - 1,
                    right,
                    lower,
                )  # MATLAB counts from 1, and its boxes include their last pixel
            role: Any = "train" if label <= TRAIN_CLASSES else "test"
            yield Record(inside(images, annotation[name], where), label, role, box)


def read_annotations(path: Path, fields: tuple[str, ...]) -> list[dict[str, str]]:
    """Return the rows of the array `annotations` of a MATLAB file, every field as text.

    Raises:
        ValueError: If the file is damaged, has no such array, or lacks a field.
    """
    rows = read_structs(path, "annotations")
    if lacking := set(fields) - set(rows[0] if rows else ()):
        found = ", ".join(rows[0]) if rows else "none"
        raise ValueError(
            f"{path}: `annotations` have no field {', '.join(sorted(lacking))}. Found: {found}. Download it again."
        )
    return rows
