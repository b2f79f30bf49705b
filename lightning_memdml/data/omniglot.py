"""Omniglot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch import Tensor, nn
from torchvision.transforms import v2

from lightning_memdml.checks import check_types
from lightning_memdml.data.downloads import Archive
from lightning_memdml.data.published import PublishedDataModule, checked
from lightning_memdml.data.records import Record, Role
from lightning_memdml.data.roles import Count
from lightning_memdml.data.transforms import RandomAffine

HOME = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
PARTS: tuple[tuple[str, Role], ...] = (("images_background", "train"), ("images_evaluation", "test"))


class Omniglot(PublishedDataModule):
    """Omniglot (Lake et al. 2015, Science 350): 1,623 handwritten characters of 50 alphabets, by 20 people each.

    The 19,280 images of the 964 characters of the background set are for training; each of the 13,180 images of the 659
    characters of the evaluation set is a query that searches among the rest of them. Characters of the same number in
    two alphabets are two classes. The files:

        root/                            or root/python/, root/omniglot-py/ (where torchvision puts it)
            images_background/<alphabet>/character01/0001_01.png
            images_evaluation/...

    Images are `(1, image_size, image_size)` float in [0, 1], ink 1, as `SmallConvNet` takes them. Training turns,
    scales and shifts them a little.

    Source: https://github.com/brendenlake/omniglot (10 + 6 MB), MIT licence.

    Args:
        root: The folder of the released files.
        download: Fetch them into `root` if they are not there.
        image_size: Side of the images in pixels; drawn with 105.

    Raises:
        FileNotFoundError: If a folder is missing, or holds no images.

    Example:
        >>> data = Omniglot("data/omniglot")
    """

    archives = (
        Archive(f"{HOME}/images_background.zip", md5="68d2efa1b9178cc56df9314c21c6e718"),
        Archive(f"{HOME}/images_evaluation.zip", md5="6b91aef0f799c5bb55b94e3f2daec811"),
    )
    source = (
        "Pass `download=True`, or download python/images_background.zip (MD5 68d2efa1b9178cc56df9314c21c6e718) and "
        "python/images_evaluation.zip (MD5 6b91aef0f799c5bb55b94e3f2daec811) from "
        "https://github.com/brendenlake/omniglot, unpack both in one folder, and pass it as `root=`."
    )
    recall_levels = (1, 5, 10)
    published_counts: ClassVar = {"train": Count(19280, 964), "test": Count(13180, 659)}

    def __init__(self, root: str, image_size: int = 28, **kwargs: Any) -> None:
        check_types(Omniglot.__init__, locals())
        super().__init__(root=root, image_size=image_size, **kwargs)

    def records(self) -> list[Record]:
        """Return a record per image, in the order of their paths."""
        return checked(self._drawings(), type(self).__name__)

    def _drawings(self) -> Iterator[Record]:
        for part, role in PARTS:
            folder = self.folder_with(part, "", "python", "omniglot-py", "omniglot-py/python") / part
            images = [path for path in sorted(folder.glob("*/character*/*.png")) if not path.name.startswith(".")]
            if not images:
                raise FileNotFoundError(
                    f"Omniglot found no images <alphabet>/character01/*.png in {folder}. {self.source}"
                )
            for path in images:
                yield Record(str(path), f"{path.parent.parent.name}/{path.parent.name}", role)

    def default_train_transform(self) -> Callable[[Any], Any]:
        """Return `Drawing`, followed by the random affine map for small drawings."""
        return v2.Compose([Drawing(self.image_size), RandomAffine()])

    def default_test_transform(self) -> Callable[[Any], Any]:
        """Return `Drawing`."""
        return Drawing(self.image_size)

    def shrink(self) -> None:
        """Drawings of 105 pixels are opened faster than a cache would be read."""
        return


class Drawing(nn.Module):
    """Turns a drawing, black on white, into `(1, image_size, image_size)` float in [0, 1], ink 1.

    Args:
        image_size: Side of the result in pixels.

    Example:
        >>> from PIL import Image
        >>> Drawing(28)(Image.new("RGB", (105, 105), "white")).sum()
        tensor(0.)
    """

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size

    def forward(self, image: Any) -> Tensor:
        """Return the drawing in white on black."""
        ink = 255 - v2.functional.pil_to_tensor(image)[:1]  # of three equal channels
        return v2.functional.resize(ink, [self.image_size] * 2, antialias=True).float() / 255
