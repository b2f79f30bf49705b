"""Fits a linear head to the features of the training images, before the first step of a training."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from tqdm import tqdm

from lightning_memdml.backbones import Embedder
from lightning_memdml.heads import FeatureStatistics, HeadInit, fit_head
from lightning_memdml.training_images import BATCH_SIZE, find_train_set, load_images


def fit_head_to_training_images(
    trainer: Trainer, model: Embedder, init: HeadInit, statistics: FeatureStatistics | None = None
) -> FeatureStatistics:
    """Fit a head in closed form to the features of all training images, which are computed once.

    Every rank computes the features of its share of the images. The sums over them are added up, so that all ranks get
    the same head. Images are transformed as for the evaluation if the data module has a `plain_train_set`.

    Args:
        trainer: The Trainer, whose data and process group are set up.
        model: The embedder, whose linear head is fitted in place.
        init: `pca` or `whitening`.
        statistics: The sums over the features, if the first rank has them already: no image is opened then.

    Returns:
        The sums over the features.

    Raises:
        ValueError: If there is no training set with an integer `labels` per image.
    """
    head = model.head
    assert isinstance(head, nn.Linear)
    known = trainer.strategy.broadcast(None if statistics is None else statistics.sums())
    found = _sum_features(trainer, model, init) if known is None else FeatureStatistics.from_sums(*known)
    fit_head(head, found, init)
    return found


def _sum_features(trainer: Trainer, model: Embedder, init: HeadInit) -> FeatureStatistics:
    """Return the sums over the features of all training images, of which every rank computes a share."""
    images = getattr(trainer.datamodule, "plain_train_set", None)  # type: ignore[attr-defined]
    images = find_train_set(trainer) if images is None else images
    labels = getattr(images, "labels", None)
    if not isinstance(labels, Tensor) or labels.ndim != 1:
        raise ValueError(
            f"Expected a training set with `labels`, one integer per image, to fit a head with `head_init='{init}'`, "
            f"but got {'none' if images is None else type(images).__name__}. Add `labels`, or pass "
            "`head_init='default'`."
        )
    device = trainer.strategy.root_device
    classes = labels.unique()
    statistics = FeatureStatistics(model.num_features, len(classes))
    own = torch.arange(trainer.global_rank, len(labels), trainer.world_size).split(BATCH_SIZE)
    loaded = load_images(trainer, images, [part.tolist() for part in own])
    shown = tqdm(loaded, "Fitting the head", len(own), delay=1, disable=not trainer.is_global_zero, leave=False)
    was_training = model.training
    model.to(device).eval()
    with torch.no_grad():
        for inputs, batch_labels, _ in shown:
            statistics.add(model(inputs, features_only=True), torch.searchsorted(classes, batch_labels.cpu()))
    model.train(was_training)
    for total in statistics.sums():
        total.copy_(_sum_over_ranks(trainer, total.to(device)))
    return statistics


def _sum_over_ranks(trainer: Any, tensor: Tensor) -> Tensor:
    return trainer.strategy.reduce(tensor, reduce_op="sum") if trainer.world_size > 1 else tensor
