"""Batches that stay in 8 bits until they are on the device: a quarter of the bytes to copy."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import default_collate

from lightning_memdml.data.transforms import PhotographTransform

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device")  # which get a batch before it is on the device


class PixelBatch:
    """Images with 8 bits, which become the network's input when they are moved to a device.

    Lightning moves every object of a batch that has a method `to`. So steps and `on_after_batch_transfer` of any
    LightningModule get a plain tensor of normalised images.

    Args:
        pixels: The images `(B, 3, S, S)`, uint8.
        transform: Normalises them.
        dtype: Type of the network's input.

    Example:
        >>> from lightning_memdml.data.transforms import EvaluationTransform
        >>> batch = PixelBatch(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), EvaluationTransform(8))
        >>> images = batch.to("cpu")
        >>> images.shape, images.dtype
        (torch.Size([2, 3, 8, 8]), torch.float32)
    """

    def __init__(self, pixels: Tensor, transform: PhotographTransform, dtype: torch.dtype = torch.float32) -> None:
        self.pixels, self.transform, self.dtype = pixels, transform, dtype

    def pin_memory(self) -> PixelBatch:
        """Return the batch in page-locked memory; a loader with `pin_memory` calls this."""
        return PixelBatch(self.pixels.pin_memory(), self.transform, self.dtype)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Tensor:
        """Return the normalised images on a device, with the bits that normalising them on the CPU gives.

        Args:
            device: The device.
            non_blocking: Do not wait for the copy. On CUDA it is always so, since Lightning asks only for tensors.
        """
        non_blocking = non_blocking or torch.device(device).type == "cuda"
        return self.transform.normalise(self.pixels.to(device, non_blocking=non_blocking)).to(self.dtype)


class PixelTransform:
    """The steps of a `PhotographTransform` without its normalisation, which follows on the device.

    Args:
        transform: The whole transform.
        dtype: Type of the network's input.
    """

    def __init__(self, transform: PhotographTransform, dtype: torch.dtype) -> None:
        self.transform, self.dtype = transform, dtype

    def __call__(self, image: Any) -> Tensor:
        """Return the image after the steps, `(3, S, S)` uint8."""
        return self.transform.pixels(image)

    def collate(self, samples: list[Any]) -> tuple[PixelBatch, Tensor, Tensor]:
        """Return the batch of samples `(pixels, label, index)`."""
        pixels, labels, indices = default_collate(samples)
        return PixelBatch(pixels, self.transform, self.dtype), labels, indices


def pixel_transform(transform: Any, data: LightningDataModule, wanted: bool | None) -> PixelTransform | None:
    """Return the transform whose images are normalised on the device, or None if they are to be normalised before.

    Args:
        transform: The transform of the images. Only a `PhotographTransform` that normalises as this class does can be
            divided into two parts.
        data: The data module. Without a Trainer nobody moves its batches to a device.
        wanted: Whether to normalise on the device; None does it if that is a GPU, and if no hook of the LightningModule
            or data module gets the batch before it is there.
    """
    kind, trainer = type(transform), data.trainer
    whole = isinstance(transform, PhotographTransform) and all(
        getattr(kind, name) is getattr(PhotographTransform, name) for name in ("forward", "normalise")
    )
    if trainer is None or wanted is False or not whole:
        return None
    if wanted is None and (trainer.strategy.root_device.type != "cuda" or _has_hooks(trainer.lightning_module, data)):
        return None
    # A precision such as `bf16-true` converts batches before they are moved.
    return PixelTransform(transform, trainer.precision_plugin.convert_input(torch.empty(0)).dtype)


def _has_hooks(*owners: Any) -> bool:
    return any(getattr(type(owner), hook) is not getattr(LightningModule, hook) for owner in owners for hook in HOOKS)
