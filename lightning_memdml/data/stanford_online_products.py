"""Stanford Online Products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from lightning_memdml.data.downloads import Archive
from lightning_memdml.data.paths import inside
from lightning_memdml.data.published import PublishedDataModule, checked, integer, read_list
from lightning_memdml.data.records import Record, Role
from lightning_memdml.data.roles import Count

COLUMNS = ("image_id", "class_id", "super_class_id", "path")
SPLITS: tuple[tuple[str, Role, int, int], ...] = (
    ("Ebay_train.txt", "train", 1, 11318),
    ("Ebay_test.txt", "test", 11319, 22634),
)


class StanfordOnlineProducts(PublishedDataModule):
    """Stanford Online Products (Song et al. 2016, arXiv 1511.06452): 120,053 photographs of 22,634 items on eBay.

    59,551 images of 11,318 items are for training; each of the 60,502 images of the 11,316 others is a query that
    searches among the rest of them. Items have 2 to 12 images. The files:

        root/                    or root/Stanford_Online_Products/
            Ebay_train.txt       image_id class_id super_class_id path
            Ebay_test.txt
            bicycle_final/*.JPG  and 11 more folders

    Source: https://cvgl.stanford.edu/projects/lifted_struct (2.9 GB). The archive brings its licence; it names none
    for the photographs themselves.

    Args:
        root: The folder of the released files.
        download: Fetch them into `root` if they are not there.

    Raises:
        FileNotFoundError: If a list file is missing.
        ValueError: If a list file is damaged, or points out of its folder.

    Example:
        >>> data = StanfordOnlineProducts("data/Stanford_Online_Products", pixel_cache="cache")
    """

    archives = (
        Archive(
            "http://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip", md5="7f73d41a2f44250d4779881525aea32e"
        ),
    )
    source = (
        "Pass `download=True`, or download Stanford_Online_Products.zip (MD5 7f73d41a2f44250d4779881525aea32e) from "
        "https://cvgl.stanford.edu/projects/lifted_struct, unpack it, and pass `root=` of the folder that holds "
        "Ebay_train.txt."
    )
    recall_levels = (1, 10, 100, 1000)
    published_counts: ClassVar = {"train": Count(59551, 11318), "test": Count(60502, 11316)}

    def records(self) -> list[Record]:
        """Return a record per line of the list files."""
        return checked(self._lines(), type(self).__name__)

    def _lines(self) -> Iterator[Record]:
        for name, role, first, last in SPLITS:
            folder = self.folder_with(name, "", "Stanford_Online_Products")
            for where, (_, class_id, _, path) in read_list(folder / name, COLUMNS):
                yield Record(inside(folder, path, where), integer(class_id, where, "class_id", first, last), role)
