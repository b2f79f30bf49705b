"""DeepFashion2, consumer to shop."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from tqdm import tqdm

from lightning_memdml.data.published import PublishedDataModule
from lightning_memdml.data.records import Record, Role, box_of

SOURCES = ("user", "shop")


class DeepFashion2(PublishedDataModule):
    """DeepFashion2 (Ge et al. 2019, arXiv 1901.07973), consumer to shop: garments, cut out by their boxes.

    A garment is named by its pair and its style, which counts within the pair. The garments of `train` train, both
    photographs of consumers (`user`) and of the shop. Of `validation`, those on photographs of consumers are queries,
    those of the shop are the gallery (labels of the official test set are not released). Style 0 means that a garment
    has no partner: such a garment of the shop stays in the gallery, where it matches no query; others are not used.
    Boxes come from the annotations, not from a detector, so scores are not those of the official challenge. The files:

        root/
            train/image/000001.jpg       train/annos/000001.json
            validation/image/*.jpg       validation/annos/*.json

    Source: https://github.com/switchablenorms/DeepFashion2, by a form, for non-commercial research.

    Args:
        root: The folder of the released files.
        download: Must be false: there is no official direct address, and the error names the files to ask for.

    Raises:
        FileNotFoundError: If a folder is missing.
        ValueError: If an annotation is damaged; the message names it.

    Example:
        >>> data = DeepFashion2("data/DeepFashion2")
    """

    source = (
        "Ask for DeepFashion2 on https://github.com/switchablenorms/DeepFashion2, unpack train.zip and validation.zip, "
        "and pass `root=` of the folder that holds train and validation."
    )
    recall_levels = (1, 5, 10, 15, 20)
    one_label_per_image = False

    def records(self) -> list[Record]:
        """Return a record per garment that is used, in the order of the annotation files."""
        self._unusable: list[str] = []
        records = list(self._garments())  # two garments may well have one box
        if self._unusable:
            rank_zero_warn(
                f"DeepFashion2: {len(self._unusable)} garments whose box has no area are not used, the first in "
                f"{self._unusable[0]}."
            )
        return records

    def _garments(self) -> Iterator[Record]:
        for part in ("train", "validation"):
            folder = self.folder_with(f"{part}/annos", "") / part
            self.folder_with(f"{part}/image", "")
            files = sorted(file for file in folder.glob("annos/*.json") if not file.name.startswith("."))
            if not files:
                raise FileNotFoundError(
                    f"DeepFashion2 found no annotations *.json in {folder / 'annos'}. {self.source}"
                )
            for file in tqdm(files, f"DeepFashion2: reading {part} annotations", delay=1, leave=False):
                yield from self._garments_of(file, folder, training=part == "train")

    def _garments_of(self, file: Path, folder: Path, training: bool) -> Iterator[Record]:
        """Yield a record per garment of a photograph."""
        annotation = read_annotation(file)
        shop = annotation["source"] == "shop"
        role: Role = "train" if training else "gallery" if shop else "query"
        for name in sorted(key for key in annotation if re.fullmatch(r"item\d+", key)):
            where, item = f"{file}, {name}", annotation[name]
            style = _number(item.get("style") if isinstance(item, dict) else None, where, "style")
            if not style and role != "gallery":
                continue
            # Garments without a partner get a class each: equal styles 0 are no match.
            label = f"{folder.name}/{annotation['pair_id']}/{style or f'{file.stem}/{name}'}"
            edges = item.get("bounding_box")
            if _is_degenerate(edges):
                self._unusable.append(where)
                continue
            yield Record(str(folder / "image" / f"{file.stem}.jpg"), label, role, box_of(edges, where))


def read_annotation(file: Path) -> dict[str, Any]:
    """Return the annotation of a photograph.

    Raises:
        ValueError: If it is damaged, or lacks a valid `source` or `pair_id`.
    """
    try:
        annotation = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no readable JSON file: {error}. Unpack the data set again.") from error
    if not isinstance(annotation, dict) or annotation.get("source") not in SOURCES:
        raise ValueError(
            f"{file}: expected an object with a `source` of {', '.join(SOURCES)}. Unpack the data set again."
        )
    _number(annotation.get("pair_id"), str(file), "pair_id")
    return annotation


def _number(value: Any, where: str, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(
            f"{where}: expected `{name}` to be an integer of 0 or more but got {value!r}. Unpack the data set again."
        )
    return value


def _is_degenerate(box: Any) -> bool:
    """Whether a box is four finite numbers, but without area: such a garment is lost, but the file is not damaged."""
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(edge, int | float) for edge in box):
        return False
    return all(map(math.isfinite, box)) and (box[0] >= box[2] or box[1] >= box[3])
