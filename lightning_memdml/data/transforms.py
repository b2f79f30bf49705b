"""The field's image transforms, and one for small drawings that transforms a whole batch at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP = 224 / 256
Interpolation = Literal["bilinear", "bicubic"]
MAX_RATIO = 32  # longer to shorter side: resized by the shorter side, 1 x 30,000 pixels would become 6 GB


def normalise(
    pixels: Tensor,
    out: Tensor | None = None,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Tensor:
    r"""Return normalised images, $(x / 255 - \mathrm{mean}) / \mathrm{std}$.

    Args:
        pixels: `(3, H, W)` or `(B, 3, H, W)`, uint8.
        out: Where the result goes, float32 of the same shape; by default a new tensor.
        mean: Mean of each channel, of values in [0, 1]; by default that of ImageNet.
        std: Standard deviation of each channel; by default that of ImageNet.

    Example:
        >>> normalise(torch.full((3, 1, 1), 255, dtype=torch.uint8)).flatten()
        tensor([2.2489, 2.4286, 2.6400])
    """
    # Plane by plane, and as one product and one sum: a fifth of the time of torchvision's transforms.
    scale, shift = _scale_and_shift(mean, std, pixels.device)
    return torch.mul(pixels.contiguous(), scale, out=out).add_(shift)


@lru_cache
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # Divided on the CPU, so that every device multiplies by the same numbers.
    means, deviations = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    return (1 / (255 * deviations)).to(device), (-means / deviations).to(device)


class PhotographTransform(v2.Compose):
    """Steps on the pixels of a photograph, and then `normalise`.

    Args:
        steps: Transforms of an image to `(3, S, S)` uint8.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel, above 0.

    Raises:
        ValueError: If there are not three of each, or a deviation is not above 0.
    """

    def __init__(
        self, steps: Sequence[nn.Module], mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
    ) -> None:
        super().__init__(list(steps))
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        if not len(self.mean) == len(self.std) == 3 or min(self.std) <= 0:
            raise ValueError(
                f"Expected `mean` and `std` of three channels, `std` above 0, but got {self.mean} and {self.std}. "
                "Pass three numbers for each."
            )

    def pixels(self, image: Any) -> Tensor:
        """Return the image after the steps, `(3, S, S)` uint8."""
        return super().forward(image)

    def forward(self, image: Any) -> Tensor:
        """Return the network's input, `(3, S, S)` float32."""
        return self.normalise(self.pixels(image))

    def normalise(self, pixels: Tensor, out: Tensor | None = None) -> Tensor:
        """Return normalised pixels, in `out` if it is given."""
        return normalise(pixels, out, self.mean, self.std)

    def extra_repr(self) -> str:
        """Name the statistics if they are not those of ImageNet."""
        if (self.mean, self.std) == (IMAGENET_MEAN, IMAGENET_STD):
            return super().extra_repr()
        return f"{super().extra_repr()}\nmean={self.mean}, std={self.std}"


class TrainingTransform(PhotographTransform):
    """The training transform of XBM and most of the field: a random part of the image, sometimes mirrored.

    Shorter side to `image_size / crop_pct`, a random crop of `min_scale` to 1 of the area resized to a square, mirrored
    half of the time, normalised.

    Args:
        image_size: Side of the result in pixels.
        min_scale: Smallest part of the area that a crop may keep, in (0, 1].
        mean: Mean of each channel, of values in [0, 1]; by default that of ImageNet.
        std: Standard deviation of each channel; by default that of ImageNet.
        interpolation: How images are resized: `bilinear` or `bicubic`.
        crop_pct: Share of the resized image's shorter side that the evaluation keeps, in (0, 1].

    Example:
        >>> from PIL import Image
        >>> TrainingTransform(97)(Image.new("RGB", (300, 200))).shape
        torch.Size([3, 97, 97])
    """

    def __init__(
        self,
        image_size: int = 224,
        min_scale: float = 0.2,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        interpolation: Interpolation = "bilinear",
        crop_pct: float = CROP,
    ) -> None:
        part = v2.RandomResizedCrop(
            image_size, scale=(min_scale, 1.0), interpolation=InterpolationMode(interpolation), antialias=True
        )
        super().__init__([Shrink(image_size, interpolation, crop_pct), part, v2.RandomHorizontalFlip()], mean, std)
        self.image_size, self.min_scale, self.interpolation, self.crop_pct = (
            image_size,
            min_scale,
            interpolation,
            crop_pct,
        )


class EvaluationTransform(PhotographTransform):
    """The test transform: shorter side to `image_size / crop_pct`, the centre square, normalised.

    Args:
        image_size: Side of the result in pixels.
        mean: Mean of each channel, of values in [0, 1]; by default that of ImageNet.
        std: Standard deviation of each channel; by default that of ImageNet.
        interpolation: How images are resized: `bilinear` or `bicubic`.
        crop_pct: Share of the resized image's shorter side that is kept, in (0, 1].

    Example:
        >>> from PIL import Image
        >>> EvaluationTransform(129)(Image.new("RGB", (300, 200))).shape
        torch.Size([3, 129, 129])
    """

    def __init__(
        self,
        image_size: int = 224,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        interpolation: Interpolation = "bilinear",
        crop_pct: float = CROP,
    ) -> None:
        super().__init__([Shrink(image_size, interpolation, crop_pct), v2.CenterCrop(image_size)], mean, std)
        self.image_size, self.interpolation, self.crop_pct = image_size, interpolation, crop_pct


class Shrink(v2.Compose):
    """The part that both transforms begin with, and nothing random: shorter side to `image_size / crop_pct`.

    An image that has this size already is left as it is, so shrinking twice is shrinking once. Of an image that is
    more than 32 times as long as wide, the middle is used.

    Args:
        image_size: Side of the network's input in pixels.
        interpolation: How images are resized: `bilinear` or `bicubic`.
        crop_pct: Share of the resized image's shorter side that the evaluation keeps, in (0, 1].

    Raises:
        ValueError: If `interpolation` or `crop_pct` is out of range.

    Example:
        >>> from PIL import Image
        >>> Shrink(224)(Image.new("RGB", (300, 512))).shape
        torch.Size([3, 436, 256])
    """

    def __init__(
        self, image_size: int = 224, interpolation: Interpolation = "bilinear", crop_pct: float = CROP
    ) -> None:
        if interpolation not in get_args(Interpolation):
            raise ValueError(
                f"Expected `interpolation` to be one of {', '.join(get_args(Interpolation))} but got "
                f"{interpolation!r}. Pass one of these."
            )
        if not 0 < crop_pct <= 1:
            raise ValueError(
                f"Expected `crop_pct`, a share of the image's side, in (0, 1] but got {crop_pct}. "
                "Pass 0.9, for example."
            )
        self.side = round(image_size / crop_pct)
        self.image_size, self.interpolation, self.crop_pct = image_size, interpolation, crop_pct
        # As a tensor, three bytes of a pixel side by side, an image is resized twice as fast as by Pillow.
        super().__init__([v2.PILToTensor(), v2.Resize(self.side, InterpolationMode(interpolation), antialias=True)])

    def forward(self, image: Any) -> Tensor:
        """Return the image `(3, H, W)` uint8, its shorter side `side` pixels long."""
        return super().forward(cut_length(image))


def cut_length(image: Any) -> Any:
    """Return the middle of an image that is more than `MAX_RATIO` times as long as wide, any other as it is.

    Example:
        >>> cut_length(torch.zeros(3, 1, 30_000)).shape
        torch.Size([3, 1, 32])
    """
    height, width = image.shape[-2:] if isinstance(image, Tensor) else image.size[::-1]
    longest = MAX_RATIO * min(height, width)
    if max(height, width) <= longest:
        return image
    top, left = (max(0, side - longest) // 2 for side in (height, width))
    return v2.functional.crop(image, top, left, min(height, longest), min(width, longest))


class SeededTransform(nn.Module, ABC):
    """A random transform of a whole batch, whose image `i` depends on `seeds[i]` and on nothing else.

    So a batch comes out the same however it is shared among ranks and workers, and one call serves all its images.
    """

    @abstractmethod
    def forward(self, images: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Transform `images` `(B, C, H, W)`, or `(C, H, W)`; without `seeds` they are drawn from torch's generator."""


class RandomAffine(SeededTransform):
    r"""Turns, scales and shifts small images at random, and scales their values to [0, 1].

    .. math:: \mathrm{out}(p) = \mathrm{in}(s R_\varphi p + t)

    with bilinear interpolation and zeros outside; `p` in [-1, 1] on both axes. One `grid_sample` serves the batch.

    Args:
        rotation: Largest angle in radians; angles are uniform in [-rotation, rotation].
        scale: Largest relative change of size; factors are uniform in [1 - scale, 1 + scale].
        shift: Largest shift on each axis, as a part of half the image's side (0.12 of 28 pixels: 1.7 pixels).

    Example:
        >>> images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
        >>> RandomAffine()(images, seeds=[1, 2]).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(self, rotation: float = 0.2, scale: float = 0.15, shift: float = 0.12) -> None:
        super().__init__()
        self.rotation, self.scale, self.shift = rotation, scale, shift

    def forward(self, images: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Transform `images` `(B, C, H, W)`, or `(C, H, W)`; without `seeds` they are drawn from torch's generator."""
        batch = v2.functional.to_dtype(images.reshape(-1, *images.shape[-3:]), torch.float32, scale=True)
        if seeds is None:
            seeds = torch.randint(2**62, (len(batch),)).tolist()
        grid = F.affine_grid(self.matrices(seeds), list(batch.shape), align_corners=False)
        return F.grid_sample(batch, grid, align_corners=False).reshape(images.shape)

    def matrices(self, seeds: Sequence[int]) -> Tensor:
        """Return the maps from output to input coordinates `(B, 2, 3)` that the seeds draw."""
        draws = torch.from_numpy(2 * uniform(seeds, 4) - 1).float()  # (B, 4) in [-1, 1)
        angle, size, shift = self.rotation * draws[:, 0], 1 + self.scale * draws[:, 1], self.shift * draws[:, 2:]
        cos, sin = size * angle.cos(), size * angle.sin()
        return torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(-1, 2, 3)


def uniform(seeds: Sequence[int], count: int) -> np.ndarray:
    """Return `count` numbers in [0, 1) for each seed, `(B, count)` float64: a pure function of the seed.

    SplitMix64 (Steele et al. 2014) with the seed as its state: a generator object per image would cost more than the
    whole transform.

    Example:
        >>> bool((uniform([1, 2], 3)[1] == uniform([2], 3)[0]).all())
        True
    """
    with np.errstate(over="ignore"):  # the arithmetic is modulo 2**64
        state = np.asarray(seeds, dtype=np.uint64)[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)) * 2.0**-53


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
