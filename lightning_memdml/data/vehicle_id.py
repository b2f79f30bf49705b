"""PKU VehicleID."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np

from lightning_memdml.checks import check_types
from lightning_memdml.data.published import PublishedDataModule, checked, integer, read_list
from lightning_memdml.data.records import Record, Role
from lightning_memdml.data.roles import Count

TestSize = Literal["small", "medium", "large"]
Protocol = Literal["retrieval", "re_identification"]
VEHICLES: dict[str, int] = {"small": 800, "medium": 1600, "large": 2400}
COLUMNS = ("image_id", "vehicle_id")


class VehicleID(PublishedDataModule):
    """PKU VehicleID (Liu et al. 2016, CVPR): 221,763 photographs of 26,267 vehicles by surveillance cameras.

    About 110,000 images of 13,000 vehicles are for training (published counts differ), and 800, 1,600 or 2,400 other
    vehicles for testing, by one of two protocols, whose scores must not be compared with each other:

    - `retrieval`, of metric learning (XBM, Smooth-AP): each test image is a query that searches among the others;
    - `re_identification` (FastReID): one image of each vehicle, drawn at random, is the gallery, all the others are
      queries. Papers average 10 draws: `draw` 0 to 9. `one_image_each` draws from embeddings without running the
      network again.

    Every draw is the same on every machine. The files:

        root/                        or root/VehicleID_V1.0/
            train_test_split/train_list.txt      image_id vehicle_id
            train_test_split/test_list_800.txt   and 1600, 2400
            image/0000001.jpg        7 digits

    Source: https://www.pkuml.org/resources/pku-vehicleid.html, by e-mail, for academic research.

    Args:
        root: The folder of the released files.
        test_size: Which of the three test sets: `small` (800 vehicles), `medium` (1,600) or `large` (2,400).
        protocol: `retrieval` or `re_identification`.
        draw: Which random gallery `re_identification` takes, 0 or more.

    Raises:
        FileNotFoundError: If a list file is missing.
        ValueError: If an option is none of those above, or a list file is damaged.

    Example:
        >>> data = VehicleID("data/VehicleID_V1.0", test_size="small")
    """

    source = (
        "Ask for PKU VehicleID on https://www.pkuml.org/resources/pku-vehicleid.html, unpack it, and pass `root=` of "
        "the folder that holds train_test_split and image."
    )
    recall_levels = (1, 5)

    def __init__(
        self,
        root: str,
        test_size: TestSize = "large",
        protocol: Protocol = "retrieval",
        draw: int = 0,
        **kwargs: Any,
    ) -> None:
        check_types(VehicleID.__init__, locals())
        super().__init__(root=root, **kwargs)
        if test_size not in VEHICLES:
            raise ValueError(
                f"Expected `test_size` to be one of {', '.join(VEHICLES)} but got {test_size!r}. Pass one of these."
            )
        if protocol not in get_args(Protocol):
            raise ValueError(
                f"Expected `protocol` to be one of {', '.join(get_args(Protocol))} but got {protocol!r}. "
                "Pass one of these."
            )
        if draw < 0:
            raise ValueError(f"Expected `draw` to be 0 or more but got {draw}. Pass 0, for example.")
        self.test_size = test_size
        self.protocol = protocol
        self.draw = draw

    def expected_counts(self) -> Mapping[Role, Count]:
        """Return the number of test vehicles: of images, and of training vehicles, sources give different numbers."""
        role: Role = "test" if self.protocol == "retrieval" else "gallery"
        return {role: Count(None, VEHICLES[self.test_size])}

    def records(self) -> list[Record]:
        """Return a record per line of the training list, then of the test list."""
        tests = checked(self._lines(f"test_list_{VEHICLES[self.test_size]}.txt", "test"), type(self).__name__)
        if self.protocol == "re_identification":
            gallery = one_image_each([int(record.label) for record in tests], self.draw)
            tests = [
                record._replace(role="gallery" if chosen else "query")
                for record, chosen in zip(tests, gallery, strict=True)
            ]
        return checked([*self._lines("train_list.txt", "train"), *tests], type(self).__name__)

    def _lines(self, name: str, role: Role) -> Iterator[Record]:
        folder = self.folder_with(f"train_test_split/{name}", "", "VehicleID_V1.0")
        for where, (image_id, vehicle_id) in read_list(folder / "train_test_split" / name, COLUMNS):
            number = integer(image_id, where, "image_id", 0, 9_999_999)
            yield Record(str(folder / f"image/{number:07}.jpg"), integer(vehicle_id, where, "vehicle_id"), role)


def one_image_each(labels: list[int], draw: int = 0) -> np.ndarray:
    """Draw one image of every class: the gallery of the re-identification protocol.

    Args:
        labels: Class of each image, 0 or more: as the data set writes it, to draw as `VehicleID` does.
        draw: Number of the draw, 0 or more; every number is another draw.

    Returns:
        Whether each image was drawn, `(N,)` bool. It depends on `draw` and the class's own images alone.

    Example:
        The protocol's score, the mean of 10 draws, from embeddings `z` and `labels` of all test images:

            scores = []
            for draw in range(10):
                gallery = torch.from_numpy(one_image_each(labels.tolist(), draw))
                scores.append(retrieval_scores(z[~gallery], labels[~gallery], z[gallery], labels[gallery], k=(1, 5)))

        >>> int(one_image_each([7, 8, 7, 8, 8]).sum())
        2
    """
    rows: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    drawn = np.zeros(len(labels), dtype=bool)
    for label, images in rows.items():
        drawn[images[np.random.default_rng((draw, label)).integers(len(images))]] = True
    return drawn
