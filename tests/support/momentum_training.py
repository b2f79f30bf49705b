"""A network with batch statistics that trains against a memory, its data and its Trainer."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset

from lightning_memdml.losses.contrastive import ContrastiveLoss

IMAGES, BATCH, DIM = 24, 4, 8


def images() -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(IMAGES) % 5
    return TensorDataset(torch.randn(IMAGES, 6, generator=generator), labels, torch.arange(IMAGES))


def loader() -> DataLoader:
    return DataLoader(images(), batch_size=BATCH)


class Learner(LightningModule):
    """A network with batch statistics and, if asked for, dropout; its losses written down."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, DIM)
        )
        self.loss = ContrastiveLoss(margin=0.3)
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return normalize(self.net(x).float())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        x, y, indices = batch
        z = self(x)
        references = self.memory.read()
        loss = self.loss(z, y) + self.loss(z, y, *references[:2], indices=indices, ref_indices=references[2])
        self.losses.append(float(loss.detach()))
        return {"loss": loss, "embeddings": z, "labels": y, "indices": indices}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: LightningModule, *callbacks: Callback, ckpt: Any = None, val: Any = None, **flags: Any) -> Trainer:
    trainer = Trainer(
        **{
            "accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_progress_bar": False,
            "enable_model_summary": False, "callbacks": list(callbacks), **flags,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        }
    )  # fmt: skip
    trainer.fit(module, loader(), val, ckpt_path=ckpt)
    return trainer


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b
