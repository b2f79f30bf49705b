"""The reference arms of a study: the scores of the network and its features before any training.

They belong to no arm, and are measured once for all arms that share network and data: the untrained network, the
features as they are, and the features whitened on the training images (`lightning_memdml.reference_scores`).
"""

from __future__ import annotations

import math
import time
from copy import deepcopy
from datetime import datetime, timezone
from typing import Any

import torch
from lightning.pytorch import seed_everything

from lightning_memdml.data import RetrievalDataModule
from lightning_memdml.reference_scores import score_after_training, score_before_training
from lightning_memdml.study.isolation import isolated
from lightning_memdml.study.plan import CLI, Record, Run
from lightning_memdml.study.training import made_by
from lightning_memdml.verbosity import quiet


def score_references(run: Run, cli: CLI) -> Record:
    """Score the references of a run on the test classes.

    Args:
        run: A run of the stage `reference`.
        cli: Builds learner, data and Trainer from the configuration.

    Returns:
        A record whose `references` map a name to scores in [0, 1].
    """
    config = deepcopy(run.config)
    config["trainer"] |= {"devices": 1, "logger": False, "enable_checkpointing": False, "callbacks": None}
    start = time.perf_counter()
    with isolated(), quiet():
        built = cli(run=False, args=config, load_from_checkpoint_support=False)
        seed_everything(run.seed)
        model, data, device = built.model.model, built.datamodule, built.trainer.strategy.root_device
        data.prepare_data()
        data.setup()
        limit_test_images(data, config["trainer"].get("limit_test_batches"))
        rows: dict[str, Any] = {"untrained network": score_after_training(model, data, device, test=True)}
        rows |= score_before_training(model, data, device, test=True).rows
    return {
        "stage": run.stage,
        "arm": run.arm,
        "data": run.data,
        "seed": run.seed,
        "key": run.key,
        "references": rows,
        "seconds": round(time.perf_counter() - start, 2),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "made_by": made_by(device),
        "config": run.config,
    }


def limit_test_images(data: RetrievalDataModule, limit: int | float | None) -> None:
    """Keep the test images that `trainer.limit_test_batches` leaves: a number of batches, or a share of them."""
    if limit is None or (isinstance(limit, float) and limit == 1):
        return
    is_both = data.gallery_set is data.query_set
    for name in ("query_set", "gallery_set"):
        images = getattr(data, name)
        # A number of batches may have been read as a float, such as 84.0.
        is_share = isinstance(limit, float) and limit < 1
        batches = int(limit * math.ceil(len(images) / data.eval_batch_size)) if is_share else int(limit)
        kept = torch.arange(min(len(images), batches * data.eval_batch_size))
        setattr(data, name, images.part(kept, images.transform, images.indices[kept]))
    if is_both:
        data.gallery_set = data.query_set
