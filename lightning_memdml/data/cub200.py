"""Caltech-UCSD Birds-200-2011."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from lightning_memdml.checks import check_types
from lightning_memdml.data.downloads import Archive
from lightning_memdml.data.paths import inside
from lightning_memdml.data.published import PublishedDataModule, checked, integer, read_list
from lightning_memdml.data.records import Record, box_of
from lightning_memdml.data.roles import Count

TRAIN_CLASSES = 100
CLASSES = 200


class CUB200(PublishedDataModule):
    """Caltech-UCSD Birds-200-2011 (Wah et al. 2011, CNS-TR-2011-001): 11,788 photographs of 200 kinds of birds.

    The 5,864 images of the first 100 classes are for training; each of the 5,924 images of the others is a query that
    searches among the rest of them. `train_test_split.txt` of the archive is a split for classification, with all
    classes on both sides, and is not read. The files:

        root/                        or root/CUB_200_2011/
            images.txt               image_id path
            image_class_labels.txt   image_id class_id
            bounding_boxes.txt       image_id x y width height, for `crop`
            images/001.Black_footed_Albatross/*.jpg

    Source: https://data.caltech.edu/records/65de6-vp158 (1.2 GB), for non-commercial research. The CUB-200 of 2010 is
    another data set.

    Args:
        root: The folder of the released files.
        download: Fetch them into `root` if they are not there.
        crop: Cut images to the bird. The field uses whole images.

    Raises:
        FileNotFoundError: If a list file is missing.
        ValueError: If a list file is damaged, or points out of its folder.

    Example:
        >>> data = CUB200("data/CUB_200_2011", batch_size=32)
    """

    archives = (
        Archive(
            "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
            md5="97eceeb196236b17998738112f37df78",
        ),
    )
    source = (
        "Pass `download=True`, or download CUB_200_2011.tgz (MD5 97eceeb196236b17998738112f37df78) from "
        "https://data.caltech.edu/records/65de6-vp158, unpack it, and pass `root=` of the folder that holds images.txt."
    )
    recall_levels = (1, 2, 4, 8)
    published_counts: ClassVar = {"train": Count(5864, 100), "test": Count(5924, 100)}

    def __init__(self, root: str, crop: bool = False, **kwargs: Any) -> None:
        check_types(CUB200.__init__, locals())
        super().__init__(root=root, **kwargs)
        self.crop = crop

    def records(self) -> list[Record]:
        """Return a record per line of `images.txt`."""
        return checked(self._lines(), type(self).__name__)

    def _lines(self) -> Iterator[Record]:
        folder = self.folder_with("images.txt", "", "CUB_200_2011")
        classes = self._columns(folder, "image_class_labels.txt", "class_id")
        boxes = self._columns(folder, "bounding_boxes.txt", "x", "y", "width", "height") if self.crop else None
        for where, (image_id, path) in read_list(folder / "images.txt", ("image_id", "path")):
            if image_id not in classes:
                raise ValueError(
                    f"{where}: image {image_id} has no class in image_class_labels.txt. Download the list files again."
                )
            label_where, (class_id,) = classes[image_id]
            label = integer(class_id, label_where, "class_id", 1, CLASSES)
            full = inside(folder / "images", path, where)
            if Path(full).parent.name.partition(".")[0] != f"{label:03}":
                raise ValueError(
                    f"{where}: expected a folder {label:03}.<name> of class {label} but got {path!r}. "
                    "Download the list files again."
                )
            box = None if boxes is None else self._box(boxes, image_id, where)
            yield Record(full, label, "train" if label <= TRAIN_CLASSES else "test", box)

    def _columns(self, folder: Path, name: str, *columns: str) -> dict[str, tuple[str, list[str]]]:
        """Return the place and the cells of each row of a list file, by the id of the image."""
        self.folder_with(name, str(folder.relative_to(self.root)))
        rows: dict[str, tuple[str, list[str]]] = {}
        for where, (image_id, *cells) in read_list(folder / name, ("image_id", *columns)):
            if rows.setdefault(image_id, (where, cells))[1] != cells:
                raise ValueError(
                    f"{where}: image {image_id} is listed again, and otherwise than in {rows[image_id][0]}. "
                    "Download the list files again."
                )
        return rows

    def _box(self, boxes: dict[str, tuple[str, list[str]]], image_id: str, where: str) -> Any:
        if image_id not in boxes:
            raise ValueError(f"{where}: image {image_id} has no box in bounding_boxes.txt. Pass crop=false.")
        where, cells = boxes[image_id]
        try:
            x, y, width, height = map(float, cells)
        except ValueError:
            raise ValueError(
                f"{where}: expected four numbers x y width height but got {cells}. Download the list files again."
            ) from None
        return box_of((x, y, x + width, y + height), where)
