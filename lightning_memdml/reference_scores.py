"""Compares a trained network with the features that it started from, so that a training that makes it worse is seen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lightning_memdml.backbones import Embedder
from lightning_memdml.data import RetrievalDataModule
from lightning_memdml.data.images import ImageDataset
from lightning_memdml.heads import FeatureStatistics, fit_head
from lightning_memdml.reference_cache import ReferenceFile
from lightning_memdml.retrieval import rank_queries
from lightning_memdml.training_images import BATCH_SIZE

FROZEN, WHITENED = "frozen features", "frozen features, whitened"
SCORES = {"recall_at_1": "Recall@1 %", "map_at_r": "MAP@R %"}


class ReferenceScores(NamedTuple):
    """The scores of the features of a network before it is trained.

    Attributes:
        classes: The classes that are scored: `validation` or `test`.
        rows: Name of an arm -> score -> value in [0, 1].
        statistics: Sums over the features of the training images, to which a head can be fitted; None without a head.
    """

    classes: str
    rows: dict[str, dict[str, float]]
    statistics: FeatureStatistics | None = None


def score_before_training(
    model: Embedder, data: RetrievalDataModule, device: torch.device, cache: Path | None = None, *, test: bool = False
) -> ReferenceScores:
    """Score the features of a backbone as they are, and whitened on the training images.

    The images are those of the validation classes, or of the test classes if there are none. The whitening is that of
    `fit_head`, to the width of the embedding. The scores of the features as they are, which need the fewest images, are
    printed as soon as they are known.

    Args:
        model: The network before its training.
        data: A data module after `setup()`.
        device: Where the network runs.
        cache: A folder that keeps the result for a later run on the same images, files and weights.
        test: Score the test classes, also if there are validation classes.
    """
    classes, query_set, gallery_set = _scored_sets(data, test)
    file = None if cache is None else ReferenceFile.find(cache, model, data, classes)
    if file is not None and (kept := file.read()) is not None:
        rows, sums = kept
        statistics = None if sums is None else FeatureStatistics.from_sums(*sums)
        rank_zero_info(f"Frozen features on {classes} classes: {format_scores(rows[FROZEN])} ({file.path}).")
        return ReferenceScores(classes, rows, statistics)
    features_of = partial(model, features_only=True)
    queries = embed_set(features_of, model, query_set, device, data, f"Features of {classes} images")
    gallery = None
    if gallery_set is not query_set:
        gallery = embed_set(features_of, model, gallery_set, device, data, "Features of the gallery")
    rows = {FROZEN: _scores(queries, gallery, query_set, gallery_set)}
    rank_zero_info(f"Frozen features on {classes} classes: {format_scores(rows[FROZEN])}.")
    statistics = None
    if isinstance(model.head, nn.Linear):
        images = data.plain_train_set
        labels = images.labels.unique()
        statistics = FeatureStatistics(queries.shape[1], len(labels))
        features = embed_set(features_of, model, images, device, data, "Features of training images")
        places = torch.searchsorted(labels, images.labels)
        for part, at in zip(features.split(BATCH_SIZE), places.split(BATCH_SIZE), strict=True):
            statistics.add(part, at)  # in the batches of `fit_head_to_training_images`: the same sums, bit for bit
        with torch.random.fork_rng([]), torch.no_grad():
            head = nn.Linear(queries.shape[1], model.head.out_features)
            fit_head(head, statistics, "whitening")
            whitened = None if gallery is None else head(gallery)
            rows[WHITENED] = _scores(head(queries), whitened, query_set, gallery_set)
    if file is not None:
        file.write(rows, None if statistics is None else statistics.sums())
    return ReferenceScores(classes, rows, statistics)


def score_after_training(
    model: Embedder, data: RetrievalDataModule, device: torch.device, *, test: bool = False
) -> dict[str, float]:
    """Score the embeddings of a network on the images of `score_before_training`."""
    classes, query_set, gallery_set = _scored_sets(data, test)
    queries = embed_set(model, model, query_set, device, data, f"Embeddings of {classes} images")
    gallery = None
    if gallery_set is not query_set:
        gallery = embed_set(model, model, gallery_set, device, data, "Embeddings of the gallery")
    return _scores(queries, gallery, query_set, gallery_set)


def reference_table(reference: ReferenceScores, trained: dict[str, float]) -> str:
    """Return a table of the frozen and the trained network, and a warning if the training did not help.

    Example:
        >>> frozen = ReferenceScores("test", {"frozen features": {"recall_at_1": 0.34, "map_at_r": 0.043}})
        >>> print(reference_table(frozen, {"recall_at_1": 0.41, "map_at_r": 0.06}))
        Scores on test classes      Recall@1 %    MAP@R %
        frozen features                   34.0        4.3
        trained                           41.0        6.0
    """
    rows = {**reference.rows, "trained": trained}
    lines = [f"{f'Scores on {reference.classes} classes':27}" + "".join(f"{name:>11}" for name in SCORES.values())]
    lines += [f"{name:27}" + "".join(f"{100 * row[score]:>11.1f}" for score in SCORES) for name, row in rows.items()]
    better = [
        f"{name} ({SCORES[score].removesuffix(' %')})"
        for name, row in reference.rows.items()
        for score in SCORES
        if row[score] >= trained[score] and trained[score] < 1  # nothing is better than all of them right
    ]
    if better:
        lines.append(
            f"Warning: the trained network does not beat {', '.join(better)}. Train for more steps, or lower "
            "--model.backbone_lr; --model.head_init whitening starts from the features."
        )
    return "\n".join(lines)


def format_scores(row: dict[str, float]) -> str:
    """Return scores in a line.

    Example:
        >>> format_scores({"recall_at_1": 0.341, "map_at_r": 0.043})
        'Recall@1 34.1 %, MAP@R 4.3 %'
    """
    return ", ".join(f"{name.removesuffix(' %')} {100 * row[score]:.1f} %" for score, name in SCORES.items())


def _scored_sets(data: RetrievalDataModule, test: bool) -> tuple[str, ImageDataset, ImageDataset]:
    if len(data.val_set) and not test:
        return "validation", data.val_set, data.val_set
    return "test", data.query_set, data.gallery_set


@torch.no_grad()
def embed_set(
    function: Callable[[Tensor], Tensor],
    model: nn.Module,
    images: ImageDataset,
    device: torch.device,
    data: Any,
    description: str,
) -> Tensor:
    """Return what a function of images gives for all images of a set, `(N, F)` on the CPU.

    Args:
        function: Maps images `(B, C, H, W)` to rows `(B, F)`.
        model: The network behind the function, which is put into evaluation mode for the time of the call.
        images: The set.
        device: Where the network runs.
        data: The data module, for its number of workers.
        description: Of the progress bar.
    """
    was_training = model.training
    model.to(device).eval()
    # A generator of its own leaves the random numbers of the training alone.
    loader = DataLoader(images, batch_size=BATCH_SIZE, num_workers=data.num_workers or 0, generator=torch.Generator())
    rows = [function(batch[0].to(device)).float().cpu() for batch in tqdm(loader, description, delay=1, leave=False)]
    model.train(was_training)
    return torch.cat(rows)


def _scores(
    queries: Tensor, gallery: Tensor | None, query_set: ImageDataset, gallery_set: ImageDataset
) -> dict[str, float]:
    options: dict[str, Any] = {}
    if gallery is not None:
        options = {
            "gallery_embeddings": F.normalize(gallery, dim=1),
            "gallery_labels": gallery_set.labels,
            "gallery_indices": gallery_set.indices,
        }
    ranks = rank_queries(F.normalize(queries, dim=1), query_set.labels, indices=query_set.indices, **options)
    found = ranks.scores(k=(1,))
    return {score: float(found[score]) for score in SCORES}
