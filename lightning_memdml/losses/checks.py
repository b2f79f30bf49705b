"""What the losses refuse, and the sentences they refuse it with."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT_TOLERANCE = 1e-2  # bf16 normalisation is off by up to 4e-3


def check_pairs(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    indices: Tensor | None,
    ref_indices: Tensor | None,
) -> None:
    """Raise the error that names what does not fit among the arguments of a loss."""
    _check_side(embeddings, labels, indices, "")
    if (ref_embeddings is None) != (ref_labels is None):
        missing = "ref_labels" if ref_labels is None else "ref_embeddings"
        raise ValueError(f"Expected `ref_embeddings` and `ref_labels` together but `{missing}` is missing.")
    if ref_embeddings is None or ref_labels is None:
        if ref_indices is not None:
            raise ValueError("Expected `ref_indices` only with `ref_embeddings`; the batch itself takes `indices`.")
        return
    _check_side(ref_embeddings, ref_labels, ref_indices, "ref_")
    if ref_embeddings.shape[0] and ref_embeddings.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"Expected `ref_embeddings` of shape (M, {embeddings.shape[1]}) to match `embeddings` "
            f"but got {tuple(ref_embeddings.shape)}."
        )
    if ref_embeddings.device != embeddings.device:
        raise ValueError(
            f"Expected `ref_embeddings` on {embeddings.device} like `embeddings` but they are on "
            f"{ref_embeddings.device}."
        )


def _check_side(embeddings: Tensor, labels: Tensor, indices: Tensor | None, prefix: str) -> None:
    for name, given in (("embeddings", embeddings), ("labels", labels), ("indices", indices)):
        if given is not None and not isinstance(given, Tensor):
            name = f"{prefix}{name}"
            raise TypeError(
                f"Expected `{name}` to be a tensor but got {type(given).__name__}; pass `torch.as_tensor({name})`."
            )
    if embeddings.ndim != 2:
        raise ValueError(
            f"Expected `{prefix}embeddings` of shape (B, D), one row per image, but got {tuple(embeddings.shape)}."
        )
    if not embeddings.is_floating_point():
        raise TypeError(f"Expected `{prefix}embeddings` of a floating-point dtype but got {embeddings.dtype}.")
    _check_ids(labels, f"{prefix}labels", embeddings.shape[0])
    if indices is not None:
        _check_ids(indices, f"{prefix}indices", embeddings.shape[0])
    _check_unit_length(embeddings, prefix)


def _check_ids(ids: Tensor, name: str, rows: int) -> None:
    if tuple(ids.shape) != (rows,):
        way_out = f"; pass `{name}.squeeze(1)`" if tuple(ids.shape) == (rows, 1) else ""
        raise ValueError(f"Expected `{name}` of shape ({rows},) but got {tuple(ids.shape)}{way_out}.")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"Expected `{name}` of an integer dtype but got {ids.dtype}; pass `{name}.long()`.")


def _check_unit_length(embeddings: Tensor, prefix: str) -> None:
    # Anchors only, and on the CPU only: reading the memory's norms would cost a pass over it, and reading a number
    # from a GPU would stall it. A NaN compares false and passes: fp16 training relies on it reaching the loss scaler.
    if prefix or embeddings.device.type != "cpu" or embeddings.numel() == 0 or torch.compiler.is_compiling():
        return
    longest = float(torch.linalg.vector_norm(embeddings.detach().float(), dim=1).max())
    if longest > 1 + UNIT_TOLERANCE:
        raise ValueError(
            f"Expected `embeddings` of unit length (similarities in [-1, 1]) but the longest has length {longest:.4g}; "
            "pass `torch.nn.functional.normalize(embeddings.float(), dim=1)`."
        )


def check_similarity(name: str, value: float) -> float:
    """Return ``value`` if it is a cosine similarity, else raise the error that names it."""
    if not -1 <= value <= 1:
        raise ValueError(f"Expected `{name}` to be a cosine similarity in [-1, 1] but got {value}.")
    return value


def check_positive(name: str, value: float) -> float:
    """Return ``value`` if it is above 0, else raise the error that names it."""
    if not value > 0:
        raise ValueError(f"Expected `{name}` above 0 but got {value}.")
    return value
