"""Sizes and statistics of the field's transforms; the batched map equals one image at a time, and its formula."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lightning_memdml.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    EvaluationTransform,
    RandomAffine,
    TrainingTransform,
    uniform,
)


@pytest.mark.parametrize("size", [97, 129, 224])
@pytest.mark.parametrize("make", [TrainingTransform, EvaluationTransform])
def test_the_result_is_a_normalised_square(make, size):
    grey = Image.new("RGB", (311, 157), (128, 128, 128))
    image = make(size)(grey)
    assert image.shape == (3, size, size)
    assert image.dtype == torch.float32
    expected = (128 / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(image.mean(dim=(1, 2)), expected, atol=1e-5, rtol=0)


def test_evaluation_looks_at_the_centre_224_of_256():
    image = Image.new("RGB", (512, 512))
    image.paste((255, 255, 255), (34, 34, 478, 478))  # 17 to 239 of 256: the crop takes 16 to 240
    seen = EvaluationTransform(224)(image)[0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]
    assert seen[112, 112] > 0.99
    assert seen[0, 112] < 0.6
    assert seen[2, 2] > 0.99


@pytest.mark.parametrize("size", [(500, 375), (256, 256), (90, 301)])
def test_they_are_the_transforms_of_the_field(size):
    """Resize 256, then a random part of 0.2 to 1 at 224 and a flip, or the centre; on Pillow images, as papers do it.

    Both round to 8 bits when they resize, twice in training: 2 of 255 levels at most, most of them equal.
    """
    noise = torch.randint(256, (3, size[1] // 5, size[0] // 5), dtype=torch.uint8)
    image = v2.functional.to_pil_image(v2.functional.resize(noise, [size[1], size[0]], antialias=True))
    last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    part = [v2.RandomResizedCrop(224, scale=(0.2, 1.0)), v2.RandomHorizontalFlip()]
    for ours, field in (
        (TrainingTransform(224), v2.Compose([v2.Resize(256), *part, *last])),
        (EvaluationTransform(224), v2.Compose([v2.Resize(256), v2.CenterCrop(224), *last])),
    ):
        for seed in range(8):
            torch.manual_seed(seed)
            found = ours(image)
            torch.manual_seed(seed)
            levels = (found - field(image)).abs() * torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255
            assert levels.max() < 2.01
            assert levels.mean() < 0.35


def test_training_crops_and_mirrors():
    image = Image.new("L", (256, 256))
    image.putdata([x for _ in range(256) for x in range(256)])
    crops = [TrainingTransform(64)(image.convert("RGB"))[0] for _ in range(40)]
    rising = sum(bool(crop[32, 63] > crop[32, 0]) for crop in crops)
    assert 8 <= rising <= 32
    widths = [float((crop[32, 63] - crop[32, 0]).abs()) for crop in crops]
    assert max(widths) > 1.2 * min(widths)


def looped(image: Tensor, angle: float, size: float, shift: tuple[float, float]) -> Tensor:
    """Bilinear sampling of `image` (S, S), written out pixel by pixel."""
    side = len(image)
    out = torch.zeros(side, side, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            x, y = (2 * column + 1) / side - 1, (2 * row + 1) / side - 1
            u = size * (math.cos(angle) * x - math.sin(angle) * y) + shift[0]
            v = size * (math.sin(angle) * x + math.cos(angle) * y) + shift[1]
            c, r = ((u + 1) * side - 1) / 2, ((v + 1) * side - 1) / 2
            for i in (math.floor(r), math.floor(r) + 1):
                for j in (math.floor(c), math.floor(c) + 1):
                    if 0 <= i < side and 0 <= j < side:
                        out[row, column] += (1 - abs(r - i)) * (1 - abs(c - j)) * image[i, j].double() / 255
    return out


def test_the_affine_map_is_its_formula():
    image = torch.randint(256, (9, 9), dtype=torch.uint8)
    seed, transform = 5, RandomAffine(rotation=0.3, scale=0.2, shift=0.25)
    a, s, x, y = (2 * uniform([seed], 4)[0] - 1).tolist()
    expected = looped(image, 0.3 * a, 1 + 0.2 * s, (0.25 * x, 0.25 * y))
    torch.testing.assert_close(transform(image[None], [seed])[0].double(), expected, atol=1e-5, rtol=0)


def test_an_image_depends_on_its_own_seed_alone():
    images = torch.randint(256, (5, 1, 28, 28), dtype=torch.uint8)
    together = RandomAffine()(images, [3, 1, 4, 1, 5])
    alone = torch.cat([RandomAffine()(images[i : i + 1], [seed]) for i, seed in enumerate([3, 1, 4, 1, 5])])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    assert not RandomAffine()(images[:1], [3]).equal(RandomAffine()(images[:1], [4]))


def test_without_seeds_it_draws_from_torch_like_any_transform():
    image = torch.randint(256, (1, 28, 28), dtype=torch.uint8)
    torch.manual_seed(0)
    first, second = RandomAffine()(image), RandomAffine()(image)
    torch.manual_seed(0)
    assert first.equal(RandomAffine()(image))
    assert first.shape == (1, 28, 28)
    assert not first.equal(second)


def test_seeded_numbers_are_uniform_and_uncorrelated():
    draws = torch.from_numpy(uniform(range(20_000), 5))  # (20000, 5), from neighbouring seeds
    assert draws.min() >= 0
    assert draws.max() < 1
    torch.testing.assert_close(draws.mean(dim=0), torch.full((5,), 0.5).double(), atol=0.015, rtol=0)
    torch.testing.assert_close(draws.var(dim=0), torch.full((5,), 1 / 12).double(), atol=0.004, rtol=0)
    correlation = torch.corrcoef(torch.cat([draws[:-1].T, draws[1:].T]))
    assert (correlation - torch.eye(10)).abs().max() < 0.04
