"""A small MetricLearner, its data and its Trainer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_memdml import ContrastiveLoss, MetricLearner

IMAGES, BATCH, SIZE, DIM = 14, 4, 20, 6
SGD = partial(torch.optim.SGD, lr=0.1)


class Flat(nn.Module):
    """Images of 2 x 2 pixels to 5 features."""

    num_features = 5

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, self.num_features)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1)).tanh()


class Record(Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.outputs: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())
        self.outputs.append(outputs)


def data(with_indices: bool = True, repeat: bool = False) -> TensorDataset:
    """14 images of 3 classes; with `repeat` the fourth is the first, seen otherwise."""
    generator = torch.Generator().manual_seed(3)
    images, indices = torch.randn(IMAGES, 1, 2, 2, generator=generator), torch.arange(IMAGES)
    if repeat:
        indices[3] = 0
    return TensorDataset(images, torch.arange(IMAGES) % 3, *([indices] if with_indices else []))


def loader(with_indices: bool = True, repeat: bool = False) -> DataLoader:
    return DataLoader(data(with_indices, repeat), batch_size=BATCH)


def learner(**options: Any) -> MetricLearner:
    torch.manual_seed(0)
    settings = {"backbone": Flat(), "loss": ContrastiveLoss(margin=0.4), "embedding_dim": DIM, "optimizer": SGD}
    return MetricLearner(**{**settings, "k": (1, 2), **options})


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    settings = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "callbacks": list(callbacks)}
    return Trainer(**{**settings, **quiet, **options})
