"""What comes in is checked once, here, with an error that says what to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RetrievalSet:
    """A checked set of embeddings, one row per image; `rows` are the positions that were kept."""

    rows: Tensor
    embeddings: Tensor
    labels: Tensor
    indices: Tensor | None
    groups: Tensor | None


def check_recall_levels(k: Sequence[int], name: str = "k") -> tuple[int, ...]:
    """Return `k` as a tuple of distinct positive integers.

    Raises:
        TypeError: If a level is no integer.
        ValueError: If there is none, one is below 1, or one occurs twice.
    """
    if isinstance(k, int):
        raise TypeError(f"Expected `{name}` to be a sequence of integers such as ({k},), got {k}.")
    levels = tuple(k)
    if any(not isinstance(level, int) or isinstance(level, bool) for level in levels):
        raise TypeError(f"Expected `{name}` to hold integers, got {levels}.")
    if not levels or min(levels) < 1 or len(set(levels)) < len(levels):
        raise ValueError(f"Expected `{name}` to hold distinct integers of at least 1, got {levels}.")
    return levels


def check_set(
    prefix: str, embeddings: Tensor, labels: Tensor, indices: Tensor | None, groups: Tensor | None
) -> RetrievalSet:
    """Check one set and keep the first row of each image number; `prefix` is that of the argument names.

    Raises:
        TypeError: If something is no tensor or of the wrong dtype.
        ValueError: If shapes disagree, values are not finite, or one number has two labels.
    """
    check_embeddings(embeddings, f"{prefix}embeddings")
    check_finite(embeddings, f"{prefix}embeddings")
    if embeddings.device.type == "mps":  # has no float64
        embeddings = embeddings.cpu()
    labels = check_integers(labels, f"{prefix}labels", embeddings)
    if groups is not None:
        groups = check_integers(groups, f"{prefix}groups", embeddings)
    if indices is None:
        rows = torch.arange(len(labels), device=embeddings.device)
        return RetrievalSet(rows, embeddings, labels, None, groups)
    indices = check_integers(indices, f"{prefix}indices", embeddings)
    check_non_negative(indices, f"{prefix}indices")
    rows = first_of_each(indices, labels, f"{prefix}indices")
    if len(rows) == len(indices):
        return RetrievalSet(rows, embeddings, labels, indices, groups)
    return RetrievalSet(rows, embeddings[rows], labels[rows], indices[rows], None if groups is None else groups[rows])


def check_pair(queries: RetrievalSet, gallery: RetrievalSet) -> None:
    """Check that two sets can be compared.

    Raises:
        ValueError: If they differ in device or dimension, only one has groups, or one image number has one
            label among the queries and another in the gallery.
    """
    check_same_space(queries.embeddings, gallery.embeddings)
    if (queries.groups is None) != (gallery.groups is None):
        raise ValueError("Expected both `groups` and `gallery_groups` or neither: one of them is missing.")
    if queries.indices is None or gallery.indices is None or len(gallery.indices) == 0:
        return
    numbers, order = gallery.indices.sort()
    place = torch.searchsorted(numbers, queries.indices).clamp_max(len(numbers) - 1)
    contradicts = (numbers[place] == queries.indices) & (gallery.labels[order[place]] != queries.labels)
    if contradicts.any():
        first = contradicts.nonzero()[0, 0]
        one, other = int(queries.labels[first]), int(gallery.labels[order[place[first]]])
        raise ValueError(
            f"Image number {int(queries.indices[first])} has label {one} in `indices` and label {other} in "
            "`gallery_indices`. Equal numbers mean the same image; leave both arguments out if the two sets "
            "are numbered each on their own."
        )


def check_same_space(embeddings: Tensor, gallery_embeddings: Tensor) -> None:
    """Check that two sets have one dimension and one device.

    Raises:
        ValueError: If not.
    """
    own, other = embeddings, gallery_embeddings
    if own.shape[1] != other.shape[1] or own.device != other.device:
        raise ValueError(
            f"Expected `gallery_embeddings` of dimension {own.shape[1]} on {own.device} like `embeddings`, "
            f"got dimension {other.shape[1]} on {other.device}."
        )


def check_embeddings(embeddings: Tensor, name: str) -> None:
    """Check for a floating `(N, D)` tensor.

    Raises:
        TypeError: If it is no floating tensor.
        ValueError: If it is not two-dimensional.
    """
    if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
        raise TypeError(f"Expected `{name}` to be a floating-point tensor of shape (N, D), got {_kind(embeddings)}.")
    if embeddings.ndim != 2 or embeddings.shape[1] == 0:
        raise ValueError(f"Expected `{name}` of shape (N, D) with D >= 1, got {tuple(embeddings.shape)}.")


def check_finite(embeddings: Tensor, name: str, numbers: Tensor | None = None) -> None:
    """Check that no row holds NaN or infinity; `numbers` says how rows are called in the error.

    Raises:
        ValueError: If some do; their positions, or numbers, are named.
    """
    if len(embeddings) == 0:
        return
    # Row extrema carry NaN and infinity along and, unlike isfinite, allocate nothing of the embeddings' size.
    finite = embeddings.amin(1).isfinite() & embeddings.amax(1).isfinite()
    if finite.all():
        return
    rows = (~finite).nonzero().squeeze(1)
    named = (rows if numbers is None else numbers[rows])[:10].tolist()
    kind = "rows" if numbers is None else "rows, image numbers"
    raise ValueError(
        f"`{name}` has NaN or infinity in {len(rows)} of {len(embeddings)} {kind}: "
        f"{', '.join(map(str, named))}{', ...' if len(rows) > 10 else ''}. Scores would be meaningless: "
        "look at these images or, if it is all of them, at a training run that has diverged."
    )


def check_integers(values: Tensor, name: str, embeddings: Tensor) -> Tensor:
    """Return the values as one int64 per row of `embeddings`, on their device.

    Raises:
        TypeError: If they are no integer tensor.
        ValueError: If there is not one per row.
    """
    integers = isinstance(values, Tensor) and not (
        values.is_floating_point() or values.is_complex() or values.dtype == torch.bool
    )
    if not integers:
        raise TypeError(
            f"Expected `{name}` to be an integer tensor of shape ({len(embeddings)},), got {_kind(values)}."
        )
    if values.shape != embeddings.shape[:1]:
        hint = f"; pass `{name}.flatten()`" if values.numel() == len(embeddings) else ""
        raise ValueError(f"Expected `{name}` of shape ({len(embeddings)},) but got {tuple(values.shape)}{hint}.")
    return values.to(embeddings.device, torch.int64)


def check_non_negative(numbers: Tensor, name: str) -> None:
    """Check that no number is below 0.

    Raises:
        ValueError: If one is.
    """
    if len(numbers) and int(numbers.min()) < 0:
        raise ValueError(f"Expected `{name}` to be non-negative, got {int(numbers.min())}.")


def first_of_each(indices: Tensor, labels: Tensor, name: str = "indices") -> Tensor:
    """Positions, ascending, of the first occurrence of each image number.

    Raises:
        ValueError: If one number has two labels.
    """
    numbers, order = indices.sort(stable=True)
    repeated = numbers[1:] == numbers[:-1]
    contradicts = repeated & (labels[order[1:]] != labels[order[:-1]])
    if contradicts.any():
        first = contradicts.nonzero()[0, 0]
        one, other = labels[order[first : first + 2]].tolist()
        raise ValueError(
            f"Image number {int(numbers[first])} occurs in `{name}` with the labels {one} and {other}. "
            "Equal numbers mean the same image; number images over the whole data set, not within a class."
        )
    return torch.cat([order[:1], order[1:][~repeated]]).sort().values


def _kind(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
