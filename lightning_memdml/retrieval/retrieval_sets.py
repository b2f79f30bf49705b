"""The arguments of an evaluation, checked: sets of embeddings with labels, indices and groups, and recall levels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memdml.checks import check_rows

UNKNOWN = -1  # the index of an image that is not known; it equals no other


@dataclass(frozen=True)
class RetrievalSet:
    """A checked set of embeddings, one row per image.

    Attributes:
        rows: Positions that were kept of the given rows.
        embeddings: `(N, D)`.
        labels: `(N,)` int64.
        indices: `(N,)` int64, -1 where unknown, or None.
        groups: `(N,)` int64, or None.
    """

    rows: Tensor
    embeddings: Tensor
    labels: Tensor
    indices: Tensor | None
    groups: Tensor | None


def check_recall_levels(k: Sequence[int], name: str = "k") -> tuple[int, ...]:
    """Return `k` as a tuple of distinct positive integers.

    Raises:
        TypeError: If a level is not an integer.
        ValueError: If there is none, one is below 1, or one occurs twice.
    """
    if isinstance(k, str) or not isinstance(k, Iterable):
        example = k if isinstance(k, int) else 10
        raise TypeError(
            f"Expected `{name}` to be a sequence of integers but got {k!r:.80}. Pass a sequence such as ({example},)."
        )
    levels = tuple(k)
    if any(not isinstance(level, int) or isinstance(level, bool) for level in levels):
        raise TypeError(f"Expected `{name}` to hold integers but got {levels}. Pass, for example, (1, 10).")
    if not levels or min(levels) < 1 or len(set(levels)) < len(levels):
        raise ValueError(
            f"Expected `{name}` to hold distinct integers of at least 1 but got {levels}. Pass, for example, (1, 10)."
        )
    return levels


def check_sets(
    embeddings: Tensor,
    labels: Tensor,
    indices: Tensor | None,
    groups: Tensor | None,
    gallery_embeddings: Tensor | None,
    gallery_labels: Tensor | None,
    gallery_indices: Tensor | None,
    gallery_groups: Tensor | None,
) -> tuple[RetrievalSet, RetrievalSet | None]:
    """Check the queries and, if there is one, the gallery; see `check_set` and `check_pair`.

    Raises:
        TypeError: As `check_set`.
        ValueError: As `check_set` and `check_pair`, or if only a part of the gallery is given.
    """
    queries = check_set("", embeddings, labels, indices, groups)
    if gallery_embeddings is None or gallery_labels is None:
        if any(given is not None for given in (gallery_embeddings, gallery_labels, gallery_indices, gallery_groups)):
            raise ValueError(
                "Expected both `gallery_embeddings` and `gallery_labels`, or no `gallery_` argument, but one is "
                "missing. Leave out all of them to compare the embeddings with each other."
            )
        return queries, None
    gallery = check_set("gallery_", gallery_embeddings, gallery_labels, gallery_indices, gallery_groups)
    check_pair(queries, gallery)
    return queries, gallery


def check_set(
    prefix: str, embeddings: Tensor, labels: Tensor, indices: Tensor | None, groups: Tensor | None
) -> RetrievalSet:
    """Check one set, and keep the first row of each known index.

    Args:
        prefix: Prefix of the argument names, for messages.
        embeddings: `(N, D)`.
        labels: `(N,)` integers.
        indices: `(N,)` integers; negative ones are unknown.
        groups: `(N,)` integers.

    Raises:
        TypeError: If something is not a tensor or of the wrong dtype.
        ValueError: If shapes disagree, values are not finite, or one index has two labels.
    """
    check_finite_embeddings(f"{prefix}embeddings", embeddings)
    if embeddings.device.type == "mps":  # has no float64
        embeddings = embeddings.cpu()
    labels = as_integers(f"{prefix}labels", labels, embeddings)
    if groups is not None:
        groups = as_integers(f"{prefix}groups", groups, embeddings)
    if indices is None:
        rows = torch.arange(len(labels), device=embeddings.device)
        return RetrievalSet(rows, embeddings, labels, None, groups)
    indices = as_integers(f"{prefix}indices", indices, embeddings).clamp_min(UNKNOWN)
    rows = first_of_each(indices, labels, f"{prefix}indices")
    if len(rows) == len(indices):
        return RetrievalSet(rows, embeddings, labels, indices, groups)
    return RetrievalSet(rows, embeddings[rows], labels[rows], indices[rows], None if groups is None else groups[rows])


def check_pair(queries: RetrievalSet, gallery: RetrievalSet) -> None:
    """Check that two sets can be compared.

    Raises:
        ValueError: If they differ in device or dimension, only one has groups, or one index has one label among the
            queries and another in the gallery.
    """
    check_same_space(queries.embeddings, gallery.embeddings)
    if (queries.groups is None) != (gallery.groups is None):
        missing = "gallery_groups" if gallery.groups is None else "groups"
        raise ValueError(f"Expected both `groups` and `gallery_groups`, or neither. Pass `{missing}` too.")
    if queries.indices is None or gallery.indices is None or len(gallery.indices) == 0:
        return
    numbers, order = gallery.indices.sort()
    place = torch.searchsorted(numbers, queries.indices).clamp_max(len(numbers) - 1)
    same_image = same_known_index(queries.indices, numbers[place])
    contradicts = same_image & (gallery.labels[order[place]] != queries.labels)
    if contradicts.any():
        first = contradicts.nonzero()[0, 0]
        one, other = int(queries.labels[first]), int(gallery.labels[order[place[first]]])
        raise ValueError(
            f"Expected one label per image but image {int(queries.indices[first])} has label {one} in `indices` and "
            f"label {other} in `gallery_indices`. Equal indices mean the same image; leave both arguments out if the "
            "two sets are numbered each on its own."
        )


def check_same_space(embeddings: Tensor, gallery_embeddings: Tensor) -> None:
    """Check that two sets have one dimension and one device.

    Raises:
        ValueError: If not.
    """
    own, other = embeddings, gallery_embeddings
    if own.shape[1] != other.shape[1] or own.device != other.device:
        raise ValueError(
            f"Expected `gallery_embeddings` of dimension {own.shape[1]} on {own.device} like `embeddings` but got "
            f"dimension {other.shape[1]} on {other.device}. Embed both with one network, on one device."
        )


def check_finite_embeddings(name: str, embeddings: Tensor) -> None:
    """Check for a floating-point tensor `(N, D)` without NaN and infinity.

    Raises:
        TypeError: If it is not a floating-point tensor.
        ValueError: If it has another shape, or rows are not finite; their positions are named.
    """
    check_rows(name, embeddings)
    check_finite(name, embeddings)


def check_finite(name: str, embeddings: Tensor, indices: Tensor | None = None) -> None:
    """Check that no row holds NaN or infinity.

    Args:
        name: Of the argument, for the message.
        embeddings: `(N, D)`.
        indices: `(N,)` indices to name the images by; by default rows are named by their positions.

    Raises:
        ValueError: If some rows do.
    """
    if len(embeddings) == 0:
        return
    # Row extrema carry NaN and infinity along and, unlike isfinite, allocate nothing of the embeddings' size.
    finite = embeddings.amin(1).isfinite() & embeddings.amax(1).isfinite()
    if finite.all():
        return
    rows = (~finite).nonzero().squeeze(1)
    named = (rows if indices is None else indices[rows])[:10].tolist()
    kind = "rows" if indices is None else "rows, indices"
    raise ValueError(
        f"Expected finite `{name}` but got NaN or infinity in {len(rows)} of {len(embeddings)} {kind}: "
        f"{', '.join(map(str, named))}{', ...' if len(rows) > 10 else ''}. Look at these images or, if it is all of "
        "them, at a training run that has diverged."
    )


def as_integers(name: str, values: Tensor, embeddings: Tensor) -> Tensor:
    """Return one integer per row, as int64 on the device of the embeddings.

    Raises:
        TypeError: If `values` is not an integer tensor.
        ValueError: If it has not one value per row.
    """
    check_rows("embeddings", embeddings, **{name: values})
    return values.to(embeddings.device, torch.int64)


def same_known_index(one: Tensor, other: Tensor) -> Tensor:
    """Return where two indices are equal and known; shapes broadcast."""
    return (one == other) & (one >= 0)


def first_of_each(indices: Tensor, labels: Tensor, name: str = "indices") -> Tensor:
    """Return the positions, ascending, of the first row of each known index and of every row of unknown index.

    Raises:
        ValueError: If one index has two labels.

    Example:
        >>> first_of_each(torch.tensor([7, -1, 7, -1]), torch.tensor([0, 1, 0, 1])).tolist()
        [0, 1, 3]
    """
    numbers, order = indices.sort(stable=True)
    repeated = same_known_index(numbers[1:], numbers[:-1])
    contradicts = repeated & (labels[order[1:]] != labels[order[:-1]])
    if contradicts.any():
        first = contradicts.nonzero()[0, 0]
        one, other = labels[order[first : first + 2]].tolist()
        raise ValueError(
            f"Expected one label per image but image {int(numbers[first])} occurs in `{name}` with the labels {one} "
            f"and {other}. Equal indices mean the same image: number images over the whole data set, not per class."
        )
    return torch.cat([order[:1], order[1:][~repeated]]).sort().values
