"""The forms in which embeddings are scored: plain, averaged with mirrored images, whitened, re-ranked."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_memdml.deploy.predictions import columns_of, read_embeddings
from lightning_memdml.deploy.trained import data_config_of, load_learner
from lightning_memdml.inference.evaluation import embed_views, flip_average
from lightning_memdml.inference.sources import data_of, part_of
from lightning_memdml.reference_scores import embed_set
from lightning_memdml.retrieval.reranking import require_rerankable


class Form(NamedTuple):
    """What is done with embeddings before they are scored.

    Example:
        >>> Form(flip=True, rerank=True).name, Form().name
        ('flip+re-ranked', 'plain')
    """

    flip: bool = False
    whiten: bool = False
    rerank: bool = False

    @property
    def name(self) -> str:
        """The heading of its column."""
        names = ("flip", "whitened", "re-ranked")
        return "+".join(name for name, on in zip(names, self, strict=True) if on) or "plain"

    @property
    def prefix(self) -> str:
        """What stands before the names of its scores; nothing for plain ones."""
        return f"{self.name.replace('-', '').replace('+', '_')}_" if any(self) else ""


def asked_forms(asked: Form) -> list[Form]:
    """Return the forms to score: plain, each part of what was asked for alone, and all of them together.

    Example:
        >>> [form.name for form in asked_forms(Form(flip=True, rerank=True))]
        ['plain', 'flip', 're-ranked', 'flip+re-ranked']
    """
    alone = [Form(**{name: True}) for name, on in asked._asdict().items() if on]
    return list(dict.fromkeys([Form(), *alone, asked]))


class EmbeddedImages(NamedTuple):
    """Embeddings with facts about their images.

    Attributes:
        rows: `(N, D)`.
        columns: `label` and others, N each.
        averaged: `(N, D)`, averaged with those of the mirrored images; None if there are none.
    """

    rows: Tensor
    columns: dict[str, list[Any]]
    averaged: Tensor | None = None

    def view(self, flip: bool) -> Tensor:
        """Return the embeddings, averaged or not."""
        if not flip:
            return self.rows
        assert self.averaged is not None, "mirrored images are embedded where `flip` is asked for"
        return self.averaged


class ScoredSets(NamedTuple):
    """What is scored: queries, named galleries (None: the queries search each other), and training images, if known."""

    queries: EmbeddedImages
    galleries: dict[str, EmbeddedImages | None]
    training: EmbeddedImages | None


def read_sets(embeddings: str, gallery: str | list[str] | None, training: str | None) -> ScoredSets:
    """Read sets from files of embeddings."""
    names = [gallery] if isinstance(gallery, str) else gallery or []
    galleries: dict[str, EmbeddedImages | None] = {name: EmbeddedImages(*read_embeddings(name)) for name in names}
    return ScoredSets(
        EmbeddedImages(*read_embeddings(embeddings)),
        galleries or {embeddings: None},
        None if training is None else EmbeddedImages(*read_embeddings(training)),
    )


def embed_sets(ckpt_path: str, form: Form, device: str, trust: bool) -> ScoredSets:
    """Embed the test images of a checkpoint, and its training images where they are needed.

    Args:
        ckpt_path: The checkpoint.
        form: What was asked for. With `flip` mirrored images are embedded too, with `whiten` the training images,
            prepared as for a test.
        device: Where the network runs.
        trust: Let the checkpoint build whatever it names.

    Raises:
        ValueError: If the checkpoint or the device cannot be used, there are no such images, or too many to re-rank.
    """
    data = data_of(data_config_of(ckpt_path, trust=trust), ckpt_path, trust=trust)
    learner = load_learner(ckpt_path, device, trust=trust)

    def views(images: Tensor) -> Tensor:
        return torch.cat(embed_views(learner, images), dim=1) if form.flip else learner(images)

    def embedded(part: Any) -> EmbeddedImages:
        images = part_of(data, part).images
        rows = embed_set(views, learner, images, torch.device(device), data, f"Embeddings of {part} images")
        columns = columns_of(images.labels, images.indices, images, data.classes)
        if not form.flip:
            return EmbeddedImages(rows, columns)
        plain, mirrored = rows.chunk(2, dim=1)
        return EmbeddedImages(plain.clone(), columns, flip_average(plain, mirrored))

    data.setup()
    searches_itself = data.gallery_set is data.query_set
    if form.rerank:  # before the images are embedded
        require_rerankable(len(data.query_set) + (0 if searches_itself else len(data.gallery_set)))
    queries, gallery = embedded("query"), None if searches_itself else embedded("gallery")
    return ScoredSets(queries, {ckpt_path: gallery}, embedded("train") if form.whiten else None)
