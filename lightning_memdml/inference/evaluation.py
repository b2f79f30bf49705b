"""How images become embeddings at evaluation: what `embed`, `index`, `search`, `score` and `predict` share."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def embed_images(model: Callable[[Tensor], Tensor], images: Tensor, flip: bool = False) -> Tensor:
    r"""Return the embeddings of prepared images, or with `flip` their averages with those of the mirrored images.

    With the embeddings $f(x)$ of an image and $f(\bar x)$ of its mirrored copy, both of unit length, the average is

    $$
    \frac{f(x) + f(\bar x)}{\|f(x) + f(\bar x)\|}
    $$

    Args:
        model: Maps images to unit embeddings `(B, D)`.
        images: `(B, C, H, W)`; without `flip` any input of the model.
        flip: Average. The network runs twice.

    Returns:
        `(B, D)`, of unit length.

    Raises:
        ValueError: If `flip` is asked of something other than images.

    Example:
        >>> import torch
        >>> left = lambda images: F.normalize(images[:, 0, :, :2].flatten(1), dim=1)
        >>> embed_images(left, torch.tensor([[[[3.0, 4.0, 1.0, 0.0]]]]), flip=True)
        tensor([[0.3162, 0.9487]])
    """
    if not flip:
        return model(images)
    return flip_average(*embed_views(model, images))


def embed_views(model: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the embeddings of images `(B, C, H, W)`, and those of their mirrored copies.

    Raises:
        ValueError: If these are not images.
    """
    if images.ndim != 4:
        raise ValueError(
            f"Expected images (B, C, H, W) to mirror but got {tuple(images.shape)}. Leave `flip` out: features have no "
            "left and right."
        )
    return model(images), model(images.flip(-1))


def flip_average(embeddings: Tensor, mirrored: Tensor) -> Tensor:
    """Return the average of unit embeddings `(N, D)` of images and of their mirrored copies, of unit length."""
    return F.normalize(embeddings + mirrored, dim=1)
