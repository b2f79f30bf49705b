"""In-Shop Clothes Retrieval of DeepFashion."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from lightning_memdml.checks import check_types
from lightning_memdml.data.paths import inside
from lightning_memdml.data.published import PublishedDataModule, checked, read_list
from lightning_memdml.data.records import Record, Role, box_of
from lightning_memdml.data.roles import Count

COLUMNS = ("image_name", "item_id", "evaluation_status")
BOX_COLUMNS = ("image_name", "clothes_type", "pose_type", "x_1", "y_1", "x_2", "y_2")
ROLES: dict[str, Role] = {"train": "train", "query": "query", "gallery": "gallery"}
LIST = "list_eval_partition.txt"
BOX_LIST = "list_bbox_inshop.txt"


class InShop(PublishedDataModule):
    """In-Shop Clothes Retrieval (Liu et al. 2016, DeepFashion, CVPR): 52,712 photographs of 7,982 garments of a shop.

    25,882 images of 3,997 garments are for training; of the 3,985 others, 14,218 images are queries that search in a
    gallery of 12,612 other images. The files:

        root/                                    or root/In-shop Clothes Retrieval Benchmark/, root/Inshop_Clothes/
            Eval/list_eval_partition.txt         or in the root itself
            Img/img/{MEN,WOMEN}/<kind>/id_<8 digits>/*.jpg      256 x 256 pixels; or img/...
            Img/img_highres/...                  originals, for `high_resolution`
            Anno/list_bbox_inshop.txt            for `crop`

    Source: https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html, for non-commercial research.

    Args:
        root: The folder of the released files.
        crop: Cut images to their boxes. The field uses whole images.
        high_resolution: Read the original photographs rather than those of 256 pixels, which the field uses.

    Raises:
        FileNotFoundError: If a list file is missing.
        ValueError: If a list file is damaged, or points out of its folder; if `crop` and `high_resolution` are both
            asked for, as boxes are given in pixels of the small images.

    Example:
        >>> data = InShop("data/Inshop_Clothes")
    """

    source = (
        "Download the In-shop Clothes Retrieval Benchmark (Img/img.zip, Eval/list_eval_partition.txt, and for `crop` "
        "Anno/list_bbox_inshop.txt) from https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion/InShopRetrieval.html, "
        "unpack img.zip where it lies, and pass `root=` of the folder that holds Eval."
    )
    recall_levels = (1, 10, 20, 30, 40, 50)
    published_counts: ClassVar = {
        "train": Count(25882, 3997),
        "query": Count(14218, 3985),
        "gallery": Count(12612, 3985),
    }

    def __init__(self, root: str, crop: bool = False, high_resolution: bool = False, **kwargs: Any) -> None:
        check_types(InShop.__init__, locals())
        super().__init__(root=root, **kwargs)
        if crop and high_resolution:
            raise ValueError(
                "Expected `crop` or `high_resolution` but got both. "
                "Pass one: boxes are given in pixels of the small images."
            )
        self.crop = crop
        self.high_resolution = high_resolution

    def records(self) -> list[Record]:
        """Return a record per line of the partition."""
        return checked(self._lines(), type(self).__name__)

    def _lines(self) -> Iterator[Record]:
        tops = ("", "In-shop Clothes Retrieval Benchmark", "Inshop_Clothes")
        lists = self.folder_with(LIST, *(str(Path(top, below)) for top in tops for below in ("Eval", "")))
        top = lists.parent if lists.name == "Eval" else lists
        name = "img_highres" if self.high_resolution else "img"
        images = next((top / below for below in ("Img", "") if (top / below / name).is_dir()), None)
        if images is None:
            looked = f"{top / 'Img' / name} or {top / name}"
            raise FileNotFoundError(
                f"{type(self).__name__} looked for the folder {looked}, which does not exist. {self.source}"
            )
        boxes = self._boxes(top) if self.crop else None
        for where, (image, item, status) in read_list(lists / LIST, COLUMNS):
            if status not in ROLES:
                raise ValueError(
                    f"{where}: expected the status {', '.join(ROLES)} but got {status!r}. "
                    "Download the list files again."
                )
            path = Path(inside(images, image, where)).relative_to(images)
            if path.parts[0] != "img" or item not in path.parts:
                raise ValueError(
                    f"{where}: expected a path img/.../{item}/... of the item {item} but got {image!r}. "
                    "Download the list files again."
                )
            if boxes is not None and image not in boxes:
                raise ValueError(f"{where}: {image} has no box in list_bbox_inshop.txt. Pass crop=false.")
            full = str(images.joinpath(name, *path.parts[1:]))
            yield Record(full, item, ROLES[status], None if boxes is None else boxes[image])

    def _boxes(self, top: Path) -> dict[str, tuple[float, float, float, float]]:
        folder = self.folder_with(BOX_LIST, *(str((top / below).relative_to(self.root)) for below in ("Anno", "")))
        return {cells[0]: box_of(cells[3:], where) for where, cells in read_list(folder / BOX_LIST, BOX_COLUMNS)}
