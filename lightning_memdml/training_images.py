"""Training images by their position: how many there are, and their embeddings by the current network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_memdml.compat import given_training_data
from lightning_memdml.memory.momentum_encoder import BatchNorm, MomentumEncoder, frozen_inference
from lightning_memdml.memory.rows import UNKNOWN_INDEX

BATCH_SIZE = 128


def find_train_set(trainer: Trainer) -> Any | None:
    """Return the map-style training data set, of a data module with a `train_set`, or of the loader given to `fit`.

    Return None if there is none: for a stream, or a loader of another kind.
    """
    source = given_training_data(trainer)
    places = ((_data_module(trainer), "train_set"), (source, "data_set"), (source, "dataset"))
    for holder, name in places:
        found = getattr(holder, name, None)
        if hasattr(found, "__len__") and hasattr(found, "__getitem__"):
            return found
    return None


def _data_module(trainer: Any) -> Any | None:
    return trainer.datamodule


class _Reproducible(Dataset[Any]):
    """Seeds the random numbers of each image's transform with the image's position."""

    def __init__(self, data_set: Any) -> None:
        self.data_set = data_set

    def __getitem__(self, position: int) -> Any:
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(position)
            return self.data_set[position]


def load_images(trainer: Trainer, data_set: Any, batches: Sequence[list[int]]) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Yield `(images, labels, indices)` of the images at each batch of positions, on the training's device.

    As many processes open them as the data module has `num_workers`. The random state of the training does not change.
    Indices are -1 if the data set does not return them.

    Raises:
        ValueError: If the data set does not return `(image, label)` or `(image, label, index)`.
    """
    loader: DataLoader[Any] = DataLoader(
        _Reproducible(data_set),
        batch_sampler=batches,
        num_workers=min(getattr(_data_module(trainer), "num_workers", None) or 0, len(batches) // 4),
        generator=torch.Generator(),
    )
    for batch in loader:
        if not isinstance(batch, Sequence) or len(batch) not in (2, 3):
            raise ValueError(
                "Expected a training set of (image, label) or (image, label, index), to embed its images once more, "
                f"but got a batch that is a {type(batch).__name__} from {type(data_set).__name__}. Let the data set "
                "return tuples."
            )
        images, labels, *indices = trainer.strategy.batch_to_device(list(batch))
        known = indices[0] if indices else torch.full_like(labels, UNKNOWN_INDEX)
        yield trainer.precision_plugin.convert_input(images), labels, known


def find_encoder(pl_module: LightningModule, name: str | None) -> nn.Module:
    """Return what maps images to embeddings: the part `name`, or the module itself by its `forward`.

    A module can name the part in its attribute `encoder_name`.

    Raises:
        ValueError: If there is no such part, or no `forward`.
    """
    name = getattr(pl_module, "encoder_name", None) if name is None else name
    if name is not None:
        try:
            return pl_module.get_submodule(name)
        except AttributeError as error:
            parts = ", ".join(part for part, _ in pl_module.named_children())
            raise ValueError(
                f"Expected `encoder` to be a part of {type(pl_module).__name__}, such as {parts}, but got {name!r}. "
                "Pass one of these names."
            ) from error
    if type(pl_module).forward in (LightningModule.forward, nn.Module.forward):
        parts = ", ".join(part for part, _ in pl_module.named_children())
        raise ValueError(
            f"Expected a `forward` that maps images to embeddings but {type(pl_module).__name__} has no `forward`. "
            f"Name the part that does, `MemoryCallback(encoder=...)`; its parts are {parts}."
        )
    return pl_module


def embed_batch(trainer: Trainer, encoder: nn.Module | MomentumEncoder, images: Any, batch_norm: BatchNorm) -> Tensor:
    """Return the embeddings of images, without side effects; `batch_norm` as for `MomentumEncoder`.

    Under mixed precision they are computed in it, as in a training step.
    """
    mixed = isinstance(trainer.precision_plugin, MixedPrecision)
    precision = trainer.precision_plugin.forward_context() if mixed else torch.no_grad()
    if isinstance(encoder, MomentumEncoder):
        with precision:
            return encoder(images)
    with precision, frozen_inference(encoder, batch_norm):
        return encoder(images)
