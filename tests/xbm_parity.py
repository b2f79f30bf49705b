"""Compares `MetricLearner` with an independent loop in the published setting of XBM: `python tests/xbm_parity.py`.

The loop is written from the description of the method (Wang et al. 2020, arXiv 1912.06798) and from what is known of
the authors' configuration: a global maximum pool, a Kaiming head (fan-out, no bias at the start), Adam with L2 decay,
the contrastive loss in the batch and against the memory, and in this order: the batch enters the memory, then it is
compared with the memory. Only the entry that an anchor has just made is left out, by its position. Older copies of its
image, and other views of it in the batch, are positives.

Both start from the same weights and see the same batches in the same order, in float32. Classes have 2 to 6 images and
a batch has 4 of each class, so small classes repeat images. Scores are those of classes that are not trained on.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Trainer, seed_everything
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_memdml import ContrastiveLoss, MemoryCallback, MetricLearner

CLASSES, NEW_CLASSES, SIDE, BATCH, PER_CLASS, DIM = 80, 60, 24, 32, 4, 32
MARGIN, DECAY = 0.5, 5e-4


# ------------------------------------------------------------------ the set, and the network
def draw_views(patterns: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
    """Views of patterns `(C, 3, S + 8, S + 8)`: a random place, a random contrast, and noise."""
    views = []
    for label in labels.tolist():
        top, left = torch.randint(9, (2,), generator=draw).tolist()
        part = patterns[label, :, top : top + SIDE, left : left + SIDE]
        contrast = 0.6 + 0.8 * torch.rand(3, 1, 1, generator=draw)
        views.append(contrast * part + 0.7 * torch.randn(3, SIDE, SIDE, generator=draw))
    return torch.stack(views)


def draw_patterns(classes: int, draw: torch.Generator) -> Tensor:
    coarse = torch.randn(classes, 3, 8, 8, generator=draw)
    return F.interpolate(coarse, size=SIDE + 8, mode="bilinear")


def draw_batches(steps: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Batches of images, labels and the number of each image. Views of one image differ in noise and contrast."""
    draw = torch.Generator().manual_seed(1)
    patterns = draw_patterns(CLASSES, draw)
    first = torch.tensor([2, 3, 4, 5, 6]).repeat(CLASSES // 5).cumsum(0)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), first])
    batches = []
    for _ in range(steps):
        classes = torch.randperm(CLASSES, generator=draw)[: BATCH // PER_CLASS]
        images = []
        for start, stop in zip(starts[classes].tolist(), starts[classes + 1].tolist(), strict=True):
            chosen = start + torch.randperm(stop - start, generator=draw)[:PER_CLASS]
            images.append(chosen.repeat(PER_CLASS)[:PER_CLASS])  # a small class repeats its images
        labels = classes.repeat_interleave(PER_CLASS)
        batches.append((draw_views(patterns, labels, draw), labels, torch.cat(images)))
    return batches


def draw_new_classes() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    labels = torch.arange(NEW_CLASSES).repeat_interleave(10)
    return draw_views(draw_patterns(NEW_CLASSES, draw), labels, draw), labels


def network() -> nn.Sequential:
    """Images to a feature map of 32 channels."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 16, 2), (16, 32, 1), (32, 64, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


# ------------------------------------------------------------------ the loop
class PlainEmbedder(nn.Module):
    """The network, a global maximum, a Kaiming head, and unit length."""

    def __init__(self, trunk: nn.Sequential) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(64, DIM)
        nn.init.normal_(self.head.weight, std=(2 / DIM) ** 0.5)  # Kaiming, fan-out: the DIM outputs
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        features = self.head(F.adaptive_max_pool2d(self.trunk(images), 1).flatten(1))
        return features / features.norm(dim=1, keepdim=True)


def contrastive(anchors: Tensor, labels: Tensor, references: Tensor, ref_labels: Tensor, own: Tensor) -> Tensor:
    """Return sum_P (1 - s) + sum_{N, s > margin} s, the mean over the anchors, without the entry `own` of each."""
    similarity = anchors @ references.T
    same = labels[:, None] == ref_labels[None, :]
    positive = same.clone()
    positive[torch.arange(len(labels)), own] = False
    negative = ~same & (similarity > MARGIN)
    return ((1 - similarity)[positive].sum() + similarity[negative].sum()) / len(labels)


def train_by_hand(model: PlainEmbedder, batches: list[Any], size: int, start_step: int, rate: float) -> Iterator[float]:
    """Yield the loss of every step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=DECAY)
    memory, memory_labels = torch.zeros(0, DIM), torch.zeros(0, dtype=torch.int64)
    model.train()
    for step, (images, labels, _) in enumerate(batches):
        embeddings, rows = model(images), torch.arange(len(labels))
        loss = contrastive(embeddings, labels, embeddings, labels, rows)
        if step >= start_step:
            memory = torch.cat([memory, embeddings.detach()])[-size:]
            memory_labels = torch.cat([memory_labels, labels])[-size:]
            own = len(memory) - len(labels) + rows
            loss = loss + contrastive(embeddings, labels, memory, memory_labels, own)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


# ------------------------------------------------------------------ the package
class Losses(Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())


def train_with_package(
    start: PlainEmbedder, batches: list[Any], size: int, start_step: int, rate: float, **others: bool
) -> tuple[list[float], MetricLearner]:
    order = {"memory_includes_batch": True, "memory_excludes_own_image": False, "batch_excludes_own_image": False}
    learner = MetricLearner(
        copy.deepcopy(start.trunk),
        ContrastiveLoss(margin=MARGIN),
        num_features=64,
        embedding_dim=DIM,
        pooling="maximum",
        head_init="kaiming",
        optimizer=partial(torch.optim.Adam, lr=rate, weight_decay=DECAY),
        **{**order, **others},
    )
    learner.model.head.load_state_dict(start.head.state_dict())
    record = Losses()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(
        **quiet,
        max_steps=len(batches),
        enable_model_summary=False,
        callbacks=[MemoryCallback(size=size, start_step=start_step), record],
    )
    trainer.fit(learner, DataLoader(batches, batch_size=None))
    return record.losses, learner


# ------------------------------------------------------------------ the comparison
@torch.no_grad()
def recall_at_1(model: nn.Module) -> float:
    images, labels = draw_new_classes()
    embeddings = model.eval()(images)
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-2)
    return float((labels[similarity.argmax(dim=1)] == labels).double().mean()) * 100


def compare(steps: int, size: int, start_step: int, rate: float, **others: bool) -> dict[str, Any]:
    """Train both ways, and return the losses and the Recall@1 in percent of each, and that before the training.

    The loop runs twice: `nearly` starts with the weights of the head changed in their last digit. What this changes is
    what rounding alone can do.

    Args:
        steps: Optimiser steps.
        size: Rows of the memory.
        start_step: The first step that stores its batch.
        rate: Learning rate of Adam.
        **others: Options of `MetricLearner` that differ from the published setting.
    """
    seed_everything(0, verbose=False)
    batches, start = draw_batches(steps), PlainEmbedder(network())
    before = recall_at_1(start)
    losses, learner = train_with_package(start, batches, size, start_step, rate, **others)
    nearly = copy.deepcopy(start)
    with torch.no_grad():
        nearly.head.weight.mul_(1 + 2**-23)
    return {
        "package": losses,
        "loop": list(train_by_hand(start, batches, size, start_step, rate)),
        "nearly": list(train_by_hand(nearly, batches, size, start_step, rate)),
        "recall": {
            "before": before,
            "package": recall_at_1(learner.model),
            "loop": recall_at_1(start),
            "nearly": recall_at_1(nearly),
        },
    }


def relative_difference(found: dict[str, Any], steps: int, way: str = "package") -> float:
    """The largest relative difference of the losses of the first steps from those of the loop."""
    pairs = list(zip(found[way], found["loop"], strict=True))[:steps]
    return max(abs(one - other) / abs(other) for one, other in pairs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--size", type=int, default=1000, help="rows of the memory")
    parser.add_argument("--start_step", type=int, default=20)
    parser.add_argument("--rate", type=float, default=1e-4)
    given = vars(parser.parse_args())
    found = compare(**given)
    print(", ".join(f"{name} {value}" for name, value in given.items()))
    for steps in sorted({min(100, given["steps"]), given["steps"]}):
        differences = (f"{way} {relative_difference(found, steps, way):.1e}" for way in ("package", "nearly"))
        print(f"largest relative difference of the loss from the loop, {steps} steps: {', '.join(differences)}")
    print("first and last loss: " + ", ".join(f"{found['package'][place]:.4f}" for place in (0, -1)))
    print("Recall@1: " + ", ".join(f"{name} {value:.2f}" for name, value in found["recall"].items()))
