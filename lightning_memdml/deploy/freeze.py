"""`memdml freeze`: the features of all images by a network that is not trained any more, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from tqdm import tqdm

from lightning_memdml.atomic_write import atomic_write
from lightning_memdml.backbones import build_backbone, preprocessing_of
from lightning_memdml.cli_messages import ArgumentParser
from lightning_memdml.data import FolderDataModule, RetrievalDataModule, TableDataModule
from lightning_memdml.data.images import ImageDataset
from lightning_memdml.data.transforms import TrainingTransform

DESCRIPTION = """\
Write the features that a network computes of every image, for `FeatureDataModule`: a head on top of them then trains in
seconds.

  memdml freeze my/images features.npz --weights DEFAULT
  memdml freeze my/table.csv features.npz --backbone resnet50 --weights DEFAULT --image_size 224"""
BATCH = 32
SIDE = 97  # of images in pixels, small enough for a CPU


def freeze(arguments: list[str]) -> None:
    """Run `memdml freeze` with what follows it on the command line."""
    auto_cli(freeze_images, args=arguments, parser_class=ArgumentParser, prog="memdml freeze", description=DESCRIPTION)


def freeze_images(
    images: str,
    output: str,
    backbone: str = "mobilenet_v2",
    weights: str | None = None,
    image_size: int | None = None,
    views: int = 4,
) -> None:
    """Write the features of every image of training and test.

    Args:
        images: A folder with one folder per class, as `FolderDataModule` reads it, or a table or archive, as
            `TableDataModule` reads it.
        output: The `.npz` file to write.
        backbone: A classifier of torchvision, `timm:NAME`, or `hf:NAME`.
        weights: A file, or the name of published weights, such as `DEFAULT`. Without it they are random.
        image_size: Side of the network's input in pixels; by default that of a `timm:` or `hf:` network, otherwise 97.
        views: Number of views of each image, at least 1. The first is as for a test, the others are augmented.

    Raises:
        ValueError: If `views` or `output` cannot be used, or queries and gallery are different images, which
            `FeatureDataModule` cannot hold.
        OSError: If the images are missing.
    """
    if views < 1:
        raise ValueError(f"Expected --views of at least 1 but got {views}. Pass 1 or more.")
    if Path(output).suffix != ".npz":
        raise ValueError(f"Expected a file that ends in .npz as output but got {output}. Pass features.npz.")
    preparation = {"image_size": SIDE, **preprocessing_of(backbone)}
    if image_size is not None:
        preparation["image_size"] = image_size
    augmented = TrainingTransform(min_scale=0.6, **preparation)
    data = _data_of(images, {**preparation, "train_transform": augmented, "val_fraction": 0})
    data.prepare_data()
    data.setup()
    if data.gallery_set is not data.query_set:
        raise ValueError(
            f"Expected test images that are both queries and gallery but got separate ones in {images}. Put them "
            "together: `FeatureDataModule` cannot hold them."
        )
    if len(data.val_set):
        print(f"{len(data.val_set)} validation images are left out: `FeatureDataModule` holds out classes itself.")
    network, width = build_backbone(backbone, weights)
    if weights is None:
        print(
            f"The weights of {backbone} are random. Pass --weights DEFAULT, or a file, for features that were learnt."
        )
    parts = (data.train_set, data.query_set)
    labels = torch.cat([part.labels for part in parts])
    transforms = [data.default_test_transform()] + [augmented] * (views - 1)
    with tqdm(total=views * len(labels), unit=" images", unit_scale=True) as bar:
        features = [
            torch.cat([_features(network, part.part(torch.arange(len(part)), transform), view, bar) for part in parts])
            for view, transform in enumerate(transforms)
        ]
    is_train = np.arange(len(labels)) < len(data.train_set)
    with atomic_write(Path(output)) as unfinished:
        np.savez(unfinished, feature=torch.stack(features, dim=1).half().numpy(), label=labels.numpy(), train=is_train)
    print(
        f"{len(labels)} images x {views} views x {width} features: {output}\n"
        f"Next: memdml fit --data FeatureDataModule --data.path {output} --model.backbone torch.nn.Identity "
        f"--model.num_features {width} --model.loss ContrastiveLoss --trainer.max_steps 600"
    )


def _data_of(images: str, options: dict[str, Any]) -> RetrievalDataModule:
    if Path(images).is_dir() and Path(images).suffix != ".parquet":  # which may be a folder of such files
        return FolderDataModule(images, **options)
    return TableDataModule(images, **options)


@torch.inference_mode()
def _features(network: nn.Module, images: ImageDataset, view: int, bar: tqdm) -> Tensor:
    """Return the features `(N, F)` of one view of all images."""
    network.eval()
    rows = []
    for positions in torch.arange(len(images)).split(BATCH):
        seeds = (positions + view * len(images)).tolist()
        rows.append(network(images.get_batch(positions.tolist(), seeds)[0]))
        bar.update(len(positions))
    return torch.cat(rows)
