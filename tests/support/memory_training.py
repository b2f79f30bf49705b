"""A module that trains against a memory, its data and its Trainer."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset

CLASSES, ROWS, BATCH, DIM = 5, 32, 4, 8


def pair_loss(z: Tensor, y: Tensor, ref_z: Tensor | None = None, ref_y: Tensor | None = None) -> Tensor:
    """The contrastive loss at margin 0.5, self left out by position."""
    if ref_z is not None and len(ref_z) == 0:
        return z[:0].sum()
    z = z.float()
    similarity = z @ (z if ref_z is None else ref_z).T
    same = y[:, None] == (y if ref_y is None else ref_y)
    cost = torch.where(same, 1 - similarity, torch.where(similarity > 0.5, similarity, 0.0))
    if ref_z is None:
        cost = cost * ~torch.eye(len(y), dtype=torch.bool)
    return cost.sum(1).mean()


def images(rows: int = ROWS) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    return TensorDataset(torch.randn(rows, 6, generator=generator), labels, torch.arange(rows))


def loader(rows: int = ROWS) -> DataLoader:
    return DataLoader(images(rows), batch_size=BATCH)


class Plain(LightningModule):
    """What somebody trains already, with the four lines changed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, DIM))
        self.losses: list[float] = []

    def embed(self, images: Tensor) -> Tensor:
        return normalize(self.net(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        x, y, indices = batch
        z = self.embed(x)
        loss = pair_loss(z, y) + pair_loss(z, y, *self.memory.read()[:2])
        self.losses.append(float(loss.detach()))
        return {"loss": loss, "embeddings": z, "labels": y, "indices": indices}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, y, _ = batch
        z = self.embed(x)
        return {"loss": pair_loss(z, y), "embeddings": z, "labels": y}

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Manual(Plain):
    """Two optimisers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        outputs = super().training_step(batch, batch_idx)
        self.manual_backward(outputs["loss"])
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        return outputs

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.net[0], self.net[2])]


def fit(
    module: LightningModule,
    *callbacks: Callback,
    train: Any = None,
    val: Any = None,
    ckpt: Any = None,
    **flags: Any,
) -> Trainer:
    trainer = Trainer(
        **{
            "accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_progress_bar": False,
            "enable_model_summary": False, "callbacks": list(callbacks), **flags,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        }
    )  # fmt: skip
    trainer.fit(module, train or loader(), val, ckpt_path=ckpt)
    return trainer
