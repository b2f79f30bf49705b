"""iNaturalist 2018, split for retrieval."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from lightning_memdml.data.paths import inside
from lightning_memdml.data.published import PublishedDataModule, checked, integer, read_list
from lightning_memdml.data.records import Record, Role
from lightning_memdml.data.roles import Count

SPLITS: tuple[tuple[str, Role], ...] = (
    ("Inaturalist_train_set1.txt", "train"),
    ("Inaturalist_test_set1.txt", "test"),
)
SPECIES = 8142


class INaturalist2018(PublishedDataModule):
    """iNaturalist 2018 (Van Horn et al. 2018, arXiv 1707.06642) in the retrieval split of Smooth-AP.

    325,846 photographs of 5,690 species are for training; each of the 136,093 images of the 2,452 others is a query
    that searches among the rest of them (Brown et al. 2020, arXiv 2007.12163). The released split into train, val and
    test is one for classification. The files:

        root/                                    or root/Inaturalist/
            Inat_dataset_splits/Inaturalist_train_set1.txt     a path per line; or in the root itself
            Inat_dataset_splits/Inaturalist_test_set1.txt
            train_val2018/<group>/<species>/<32 digits>.jpg

    Source: https://github.com/visipedia/inat_comp/tree/master/2018 (120 GB), for non-commercial research and education;
    the lists: https://github.com/Andrew-Brown1/Smooth_AP.

    Args:
        root: The folder of the released files.
        download: Must be false: there is no official direct address, and the error names the files to fetch.

    Raises:
        FileNotFoundError: If a list file is missing.
        ValueError: If a list file is damaged, or points out of its folder.

    Example:
        >>> data = INaturalist2018("data/Inaturalist")
    """

    source = (
        "Download train_val2018.tar.gz (MD5 b1c6952ce38f31868cc50ea72d066cc3) from "
        "https://github.com/visipedia/inat_comp/tree/master/2018 and the folder Inat_dataset_splits from "
        "https://github.com/Andrew-Brown1/Smooth_AP, unpack both in one folder, and pass it as `root=`."
    )
    recall_levels = (1, 4, 16, 32)
    published_counts: ClassVar = {"train": Count(325846, 5690), "test": Count(136093, 2452)}

    def records(self) -> list[Record]:
        """Return a record per line of the two lists; a class is the number of a species."""
        return checked(self._lines(), type(self).__name__)

    def _lines(self) -> Iterator[Record]:
        for name, role in SPLITS:
            lists = self.folder_with(name, "Inat_dataset_splits", "", "Inaturalist/Inat_dataset_splits", "Inaturalist")
            top = lists.parent if lists.name == "Inat_dataset_splits" else lists
            for where, (path,) in read_list(lists / name, ("path",)):
                full = inside(top, path, where)
                parts = Path(full).relative_to(top).parts
                if len(parts) != 4 or parts[0] != "train_val2018":
                    raise ValueError(
                        f"{where}: expected train_val2018/<group>/<species>/<image> but got {path!r}. "
                        "Download the list files again."
                    )
                yield Record(full, integer(parts[2], where, "the number of a species", 0, SPECIES - 1), role)
