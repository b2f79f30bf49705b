"""Keeps what a network makes of every image, for `FeatureDataModule`: heads on top of it then train in seconds.

    python experiments/freeze.py data/birds.npz data/birds_features.npz --weights data/mobilenet_v2.pth

The first view of an image is as for a test, the others are augmented as for training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lightning_memdml.atomic_write import atomic_write
from lightning_memdml.backbones import build_backbone
from lightning_memdml.data import TableDataModule
from lightning_memdml.data.images import ImageDataset
from lightning_memdml.data.transforms import TrainingTransform

BATCH = 32


def main() -> None:
    """Read the command line, and write the archive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="a table or archive, as `TableDataModule` reads it")
    parser.add_argument("output", type=Path, help="the .npz file to write")
    parser.add_argument("--backbone", default="mobilenet_v2", help="a classifier of torchvision")
    parser.add_argument("--weights", help="a file, or one of torchvision's names of published weights")
    parser.add_argument("--image_size", type=int, default=97)
    parser.add_argument("--views", type=int, default=4, help="of each image, the first of them not augmented")
    given = parser.parse_args()
    backbone, _ = build_backbone(given.backbone, given.weights)
    augmented = TrainingTransform(given.image_size, min_scale=0.6)
    data = TableDataModule(given.images, image_size=given.image_size, train_transform=augmented, val_fraction=0)
    data.setup()
    if data.gallery_set is not data.query_set:
        raise SystemExit("Expected test images that are both query and gallery, as `FeatureDataModule` has them.")
    plain, parts = data.default_test_transform(), (data.train_set, data.query_set)
    labels = torch.cat([part.labels for part in parts])
    with tqdm(total=given.views * len(labels), unit=" images", unit_scale=True) as bar:
        views = [
            torch.cat([frozen(backbone, part.part(torch.arange(len(part)), transform), view, bar) for part in parts])
            for view, transform in enumerate([plain] + [augmented] * (given.views - 1))
        ]
    is_train = np.arange(len(labels)) < len(data.train_set)
    feature = torch.stack(views, dim=1).half().numpy()
    with atomic_write(given.output) as unfinished:
        np.savez(unfinished, feature=feature, label=labels.numpy(), train=is_train)


@torch.inference_mode()
def frozen(backbone: torch.nn.Module, images: ImageDataset, seed: int, bar: tqdm) -> torch.Tensor:
    """Return the features `(N, F)` of one view of all images."""
    backbone.eval()
    rows = []
    for positions in torch.arange(len(images)).split(BATCH):
        seeds = (positions + seed * len(images)).tolist()
        rows.append(backbone(images.get_batch(positions.tolist(), seeds)[0]))
        bar.update(len(positions))
    return torch.cat(rows)


if __name__ == "__main__":
    main()
