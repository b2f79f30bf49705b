"""Checks of arguments that several parts of the package share. Imports torch only.

`check_embeddings` and `check_labels` are the one validation of rows and of integers per row:

- losses call them through `check_pairs`;
- a memory checks a batch before it stores it: `check_embeddings("embeddings", embeddings)`, then
  `check_labels("labels", labels, rows=len(embeddings))`, and the same for `indices`;
- retrieval passes the names of its own arguments, such as `"gallery_embeddings"`, and adds what only it needs (finite
  rows, indices of at least 0).

They return nothing: the caller converts afterwards (`.float()`, `.to(device, torch.int64)`). They read types and shapes
only, never a value, so the host does not wait for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: By how much an embedding may be longer than 1. Normalisation in bfloat16 is off by up to 4e-3.
UNIT_TOLERANCE = 1e-2


def check_embeddings(name: str, embeddings: Tensor) -> None:
    """Check for a floating-point tensor of shape `(B, D)`. D is at least 1, or 0 where there are no rows.

    Args:
        name: The name of the argument in the caller, for the message.
        embeddings: What the caller was given.

    Raises:
        TypeError: If it is not a tensor, or not of a floating-point dtype.
        ValueError: If it has another shape.

    Example:
        >>> check_embeddings("embeddings", torch.ones(2, 3))
        >>> check_embeddings("embeddings", torch.ones(2, 3, dtype=torch.int64))
        Traceback (most recent call last):
        TypeError: Expected `embeddings` of a floating-point dtype but got torch.int64. Pass `embeddings.float()`.
    """
    if not isinstance(embeddings, Tensor):
        raise TypeError(
            f"Expected `{name}` to be a tensor of shape (B, D) but got {type(embeddings).__name__}. "
            f"Pass `torch.as_tensor({name})`."
        )
    if embeddings.ndim != 2 or (embeddings.shape[0] and not embeddings.shape[1]):
        remedy = f"Pass one vector per image, for example `{name}.flatten(1)`."
        raise ValueError(
            f"Expected `{name}` of shape (B, D) with D of at least 1 but got {tuple(embeddings.shape)}. {remedy}"
        )
    if not embeddings.is_floating_point():
        raise TypeError(
            f"Expected `{name}` of a floating-point dtype but got {embeddings.dtype}. Pass `{name}.float()`."
        )


def check_labels(name: str, labels: Tensor, rows: int) -> None:
    """Check for an integer tensor of shape `(rows,)`: labels, image indices, or any other integer per row.

    Args:
        name: The name of the argument in the caller, for the message.
        labels: What the caller was given.
        rows: The number of rows, usually `len(embeddings)`.

    Raises:
        TypeError: If it is not a tensor, or not of an integer dtype.
        ValueError: If it has another shape.

    Example:
        >>> check_labels("labels", torch.tensor([0, 1]), rows=2)
        >>> check_labels("labels", torch.tensor([[0], [1]]), rows=2)
        Traceback (most recent call last):
        ValueError: Expected `labels` of shape (2,) but got (2, 1). Pass `labels.squeeze(1)`.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"Expected `{name}` to be an integer tensor of shape ({rows},) but got {type(labels).__name__}. "
            f"Pass `torch.as_tensor({name})`."
        )
    if tuple(labels.shape) != (rows,):
        is_column = tuple(labels.shape) == (rows, 1)
        remedy = f"`{name}.squeeze(1)`" if is_column else "one integer for each row of the embeddings"
        raise ValueError(f"Expected `{name}` of shape ({rows},) but got {tuple(labels.shape)}. Pass {remedy}.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"Expected `{name}` of an integer dtype but got {labels.dtype}. Pass `{name}.long()`.")


def check_pairs(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    indices: Tensor | None,
    ref_indices: Tensor | None,
) -> None:
    """Check the arguments of a pair loss, each by itself and against the others.

    The length of the embeddings is checked on the CPU only, and that of the references not at all: it would cost a
    pass over the memory, or make the host wait for a GPU. NaN passes, since the loss scaling of float16 training
    has to see it.

    Args:
        embeddings: Anchors, `(B, D)`, of unit length.
        labels: Class of each anchor, `(B,)`.
        ref_embeddings: References, `(M, D)`.
        ref_labels: Class of each reference, `(M,)`.
        indices: Image of each anchor, `(B,)`.
        ref_indices: Image of each reference, `(M,)`.

    Raises:
        TypeError: If a tensor is of a wrong dtype, or something is not a tensor.
        ValueError: If shapes or devices differ, an argument is missing, or an embedding is longer than 1.
    """
    if (ref_embeddings is None) != (ref_labels is None):
        given, missing = ("embeddings", "labels") if ref_labels is None else ("labels", "embeddings")
        raise ValueError(
            f"Expected `ref_embeddings` and `ref_labels` together but got `ref_{given}` alone. "
            f"Pass `ref_{missing}` too."
        )
    if ref_embeddings is None and ref_indices is not None:
        raise ValueError(
            "Expected `ref_indices` together with `ref_embeddings` but got `ref_indices` alone. "
            "Pass `indices` for the images of the batch."
        )
    sides = [("", embeddings, labels, indices)]
    if ref_embeddings is not None and ref_labels is not None:
        sides.append(("ref_", ref_embeddings, ref_labels, ref_indices))
    for prefix, rows, classes, images in sides:
        check_embeddings(f"{prefix}embeddings", rows)
        check_labels(f"{prefix}labels", classes, rows.shape[0])
        if images is not None:
            check_labels(f"{prefix}indices", images, rows.shape[0])
    if ref_embeddings is not None and ref_embeddings.shape[0] and ref_embeddings.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"Expected `ref_embeddings` of shape (M, {embeddings.shape[1]}), as wide as `embeddings`, but got "
            f"{tuple(ref_embeddings.shape)}. Pass references of the same embedding layer."
        )
    if ref_embeddings is not None and ref_embeddings.device != embeddings.device:
        raise ValueError(
            f"Expected `ref_embeddings` on {embeddings.device}, like `embeddings`, but got {ref_embeddings.device}. "
            "Pass `ref_embeddings.to(embeddings.device)`."
        )
    if embeddings.device.type != "cpu" or embeddings.numel() == 0 or torch.compiler.is_compiling():
        return
    longest = float(torch.linalg.vector_norm(embeddings.detach().float(), dim=1).max())
    if longest > 1 + UNIT_TOLERANCE:
        raise ValueError(
            "Expected `embeddings` of unit length (similarities in [-1, 1]) but got a longest row of length "
            f"{longest:.4g}. Pass `torch.nn.functional.normalize(embeddings.float(), dim=1)`."
        )


def check_similarity(name: str, value: float) -> float:
    """Return `value` if it is a cosine similarity, from -1 to 1.

    Raises:
        ValueError: If it is not.
    """
    if not -1 <= value <= 1:
        raise ValueError(
            f"Expected `{name}` to be a cosine similarity in [-1, 1] but got {value}. Pass a number in this range."
        )
    return value


def check_positive(name: str, value: float) -> float:
    """Return `value` if it is above 0.

    Raises:
        ValueError: If it is not.
    """
    if not value > 0:
        raise ValueError(f"Expected `{name}` above 0 but got {value}. Pass a positive number.")
    return value
