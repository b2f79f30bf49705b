"""Map-style data sets of images that are opened when they are asked for, or held in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate, get_worker_info
from torchvision.transforms.v2 import functional

from lightning_memdml.data.paths import shown
from lightning_memdml.data.pictures import crop, open_picture, upright
from lightning_memdml.data.pixel_batches import PixelTransform
from lightning_memdml.data.records import Record
from lightning_memdml.data.transforms import PhotographTransform, SeededTransform

if TYPE_CHECKING:
    from typing_extensions import Self  # in `typing` from Python 3.11

__all__ = ["ImageDataset", "OpenFiles", "Record", "TensorImageDataset", "crop", "upright"]


class OpenFiles:
    """Opens the image file of a record, cropped to its box.

    Args:
        records: The records; the image of row `i` is that of `records[i]`.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records

    def __call__(self, row: int) -> Image.Image:
        """Return the image of `records[row]`, upright and in RGB."""
        record = self.records[row]
        image = open_picture(record.path)
        # A box belongs to the picture as people see it, so it is turned upright before the cut.
        return image if record.box is None else crop(image, record.box)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw torch's random numbers from `seed` inside the block, and leave the global generator as it was.

    Only the CPU generator is touched: `torch.manual_seed` would also reset the generators of all GPUs, and dropout
    there would repeat. Transforms that draw from `random` or NumPy are not covered; torchvision's `v2` ones draw
    from torch alone.

    Example:
        >>> with seeded(1):
        ...     first = torch.rand(1)
        >>> with seeded(1):
        ...     again = torch.rand(1)
        >>> bool(first == again)
        True
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def draw_seeded(
    data_set: Dataset[Any],
    positions: Sequence[int],
    seeds: Sequence[int],
    collate: Callable[[list[Any]], Any] = default_collate,
) -> Any:
    """Return the batch at `positions` of any map-style data set, where each sample draws from its own seed."""
    samples = []
    for position, seed in zip(positions, seeds, strict=True):
        with seeded(seed):
            samples.append(data_set[position])
    return collate(samples)


def empty_batch(*shape: int) -> Tensor:
    """Return a float32 tensor to be filled; that of a worker process lies where the training process can read it.

    So it is not copied when it is sent, which is what torch's own collation does too.
    """
    if get_worker_info() is None:
        return torch.empty(shape)
    strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return torch.empty(0).set_(torch.UntypedStorage._new_shared(4 * prod(shape)), 0, shape, strides)


class ImageDataset(Dataset[tuple[Any, int, int]]):
    """Images that are opened when they are asked for: `dataset[i]` is `(image, label, index)`.

    Args:
        open_image: Function of a position that returns its `PIL` image or a tensor `(C, H, W)`.
        paths: Names of the images, one each.
        labels: Classes `(N,)`, int64.
        transform: Turns an opened image into the network's input; `None` returns the opened image.

    Raises:
        ValueError: If there is not one label per path.

    Example:
        >>> blank = ImageDataset(lambda position: Image.new("L", (8, 8)), ["a", "b"], torch.tensor([3, 4]))
        >>> image, label, index = blank[1]
        >>> image.mode, label, index
        ('RGB', 4, 1)
    """

    def __init__(
        self,
        open_image: Callable[[int], Image.Image | Tensor],
        paths: Sequence[str],
        labels: Tensor,
        transform: Callable[..., Any] | None = None,
    ) -> None:
        if len(paths) != len(labels):
            raise ValueError(
                f"Expected one label per path but got {len(paths)} paths and {len(labels)} labels. "
                "Pass as many of both."
            )
        self.open_image = open_image
        self.paths = list(paths)
        self.labels = labels
        self.transform = transform
        self.rows = torch.arange(len(self.paths))  # where `open_image` finds each image
        self.indices = self.rows

    def part(self, positions: Tensor, transform: Callable[..., Any] | None, indices: Tensor | None = None) -> Self:
        """Return the images at `positions` as a data set of its own.

        Args:
            positions: Which images, `(M,)`.
            transform: The transform of the part.
            indices: The `index` returned with each image, by default its position in the part. It is the image's
                identity: two parts that share images give them equal indices.
        """
        part = copy(self)
        part.paths = [self.paths[position] for position in positions.tolist()]
        part.labels, part.rows, part.transform = self.labels[positions], self.rows[positions], transform
        part.indices = torch.arange(len(positions)) if indices is None else indices
        return part

    def with_transform(self, transform: Callable[..., Any]) -> Self:
        """Return the same images with another transform."""
        other = copy(self)
        other.transform = transform
        return other

    def collate(self, samples: list[Any]) -> Any:
        """Return the batch of samples `(image, label, index)`."""
        if isinstance(self.transform, PixelTransform):
            return self.transform.collate(samples)
        return default_collate(samples)

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, position: int) -> Image.Image | Tensor:
        """Return the image at `position` before the transform: upright, RGB (a tensor is left as it is).

        Raises:
            OSError: If the image is missing or damaged; the message names it.
        """
        path = self.paths[position]
        try:
            image = self.open_image(int(self.rows[position]))
            return image if isinstance(image, Tensor) else upright(image)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"The image {shown(path)} does not exist, though the data set lists it. Check `--data.root` and the "
                "list."
            ) from error
        except Exception as error:  # on damaged files Pillow raises nearly every type there is
            raise OSError(
                f"Cannot read the image {shown(path)} ({error}). Replace it or take it off the list; "
                "`verify()` of the data module names all such images."
            ) from error

    @property
    def has_pictures(self) -> bool:
        """Whether there is something to look at."""
        return True

    def picture(self, position: int) -> Image.Image:
        """Return the image at `position` before the transform as a `PIL` image, to be looked at."""
        image = self.open(position)
        return functional.to_pil_image(image) if isinstance(image, Tensor) else image

    def get_batch(self, positions: Sequence[int], seeds: Sequence[int]) -> Any:
        """Return the batch at `positions`, where each sample draws from its own seed.

        Photographs are written into the batch as they are normalised, rather than copied into it afterwards.
        """
        if not isinstance(self.transform, PhotographTransform):
            return draw_seeded(self, positions, seeds, self.collate)
        pictures = []
        for position, seed in zip(positions, seeds, strict=True):
            with seeded(seed):
                pictures.append(self.transform.pixels(self.open(position)))
        batch = empty_batch(len(pictures), *pictures[0].shape)
        for picture, place in zip(pictures, batch, strict=True):
            self.transform.normalise(picture, out=place)
        at = torch.tensor(positions)
        return batch, self.labels[at], self.indices[at]

    def __getitem__(self, position: int) -> tuple[Any, int, int]:
        image = self.open(position)
        if self.transform is not None:
            image = self.transform(image)
        return image, int(self.labels[position]), int(self.indices[position])


class TensorImageDataset(ImageDataset):
    """Images held in memory: small ones, where opening one at a time would cost more than the training step.

    A `SeededTransform` is applied to a training batch as a whole.

    Args:
        images: The images `(N, C, H, W)`, uint8.
        paths: Names of the images, one each.
        labels: Classes `(N,)`, int64.
        transform: As for `ImageDataset`; it gets a uint8 tensor.

    Example:
        >>> blank = TensorImageDataset(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), ["a", "b"], torch.tensor([3, 4]))
        >>> images, labels, indices = blank.get_batch([1, 0], seeds=[7, 8])
        >>> tuple(images.shape), labels.tolist(), indices.tolist()
        ((2, 1, 8, 8), [4, 3], [1, 0])
    """

    def __init__(
        self, images: Tensor, paths: Sequence[str], labels: Tensor, transform: Callable[..., Any] | None = None
    ) -> None:
        super().__init__(images.__getitem__, paths, labels, transform)
        self.images = images

    @property
    def has_pictures(self) -> bool:
        """Whether these are images `(N, C, H, W)`, and not features."""
        return self.images.ndim == 4

    def get_batch(self, positions: Sequence[int], seeds: Sequence[int]) -> tuple[Any, Tensor, Tensor]:
        """Return the batch at `positions`; one call of a `SeededTransform` serves all its images."""
        if not isinstance(self.transform, SeededTransform):
            return draw_seeded(self, positions, seeds, self.collate)
        at = torch.tensor(positions)
        return self.transform(self.images[self.rows[at]], seeds), self.labels[at], self.indices[at]
