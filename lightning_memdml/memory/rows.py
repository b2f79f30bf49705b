"""A batch on its way into a memory: what is accepted, and in which form it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

UNKNOWN_INDEX = -1
"""Stored where a row's image index is not given. It names no image, so it equals no other index."""

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def as_rows(embeddings: Tensor, labels: Tensor, indices: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Check a batch and bring it into the form in which memories take and ranks exchange it.

    Args:
        embeddings: `(B, D)` floating point, of any precision, with or without a gradient.
        labels: `(B,)` integers; every value of int64 is a label, 0 and negative ones included.
        indices: `(B,)` integers, which image each row is of; `None`: unknown, stored as -1.

    Returns:
        `embeddings (B, D)` float32 without gradient, `labels (B,)` and `indices (B,)` int64, on one device.

    Raises:
        TypeError: For an argument that is no tensor, or of a wrong dtype.
        ValueError: For an argument of a wrong shape.

    Example:
        >>> as_rows(torch.ones(2, 3), torch.tensor([0, 4]))[1:]
        (tensor([0, 4]), tensor([-1, -1]))
    """
    _check_embeddings(embeddings)
    batch, device = embeddings.shape[0], embeddings.device
    labels = _as_integers("labels", labels, batch, device)
    if indices is None:
        indices = torch.full((batch,), UNKNOWN_INDEX, device=device)
    else:
        indices = _as_integers("indices", indices, batch, device)
    return embeddings.detach().float(), labels, indices


def unit_rows(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Scale rows to length 1 and tell which of them have a direction at all.

    A row without a direction is one with a NaN or an infinity, one whose length overflows float32, or a zero
    row.

    Args:
        embeddings: `(B, D)` float32.

    Returns:
        `(B, D)` rows, equal to `torch.nn.functional.normalize(embeddings)` where they have a direction, and
        the `(B,)` mask of those that have one.

    Example:
        >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, float("nan")], [0.0, 0.0]]))[1].tolist()
        [True, False, False]
    """
    lengths = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
    # The lower edge is that of F.normalize, below which its result is shorter than 1.
    usable = (lengths > 1e-12) & lengths.isfinite()
    return embeddings / lengths, usable.squeeze(1)


def check_dim(held: int, given: int) -> None:
    """Raise a `ValueError` if a memory that holds rows of `held` numbers is given rows of another length."""
    if held not in (0, given):
        raise ValueError(
            f"The memory holds embeddings of D={held}, but the batch has D={given}. If the memory came "
            "from a checkpoint, it belongs to another embedding layer: restore the one it was trained "
            "with, or start without the memory's state; otherwise call `memory.reset()` first."
        )


def check_state(kind: str, state: dict[str, Any], names: Sequence[str]) -> None:
    """Raise a `ValueError` unless the state of a memory has these entries, and its rows fit each other."""
    missing = ", ".join(name for name in names if name not in state)
    if missing:
        raise ValueError(
            f"The state of an {kind} needs {', '.join(names)}, but {missing} is missing: it was not written by "
            f"`{kind}.state_dict()`, or the checkpoint is damaged."
        )
    shapes = {name: tuple(state[name].shape) for name in ("embeddings", "labels", "indices", "steps")}
    rows = shapes["embeddings"][:1]
    if len(shapes["embeddings"]) != 2 or any(shapes[name] != rows for name in ("labels", "indices", "steps")):
        raise ValueError(
            f"The state of an {kind} needs embeddings of shape (M, D) and labels, indices and steps of shape (M,), "
            f"but has {shapes}: the checkpoint is damaged."
        )


def _check_embeddings(embeddings: Tensor) -> None:
    if not isinstance(embeddings, Tensor):
        raise TypeError(f"Expected `embeddings` to be a tensor of shape (B, D) but got {type(embeddings).__name__}.")
    if embeddings.ndim != 2 or embeddings.shape[1] == 0:
        raise ValueError(
            f"Expected `embeddings` of shape (B, D) with D >= 1 but got {tuple(embeddings.shape)}; "
            "pass one vector per image, for example `embeddings.flatten(1)`."
        )
    if not embeddings.is_floating_point():
        raise TypeError(
            f"Expected `embeddings` of a floating point dtype but got {embeddings.dtype}; "
            "pass the output of the embedding layer."
        )


def _as_integers(name: str, values: Tensor, batch: int, device: torch.device) -> Tensor:
    if not isinstance(values, Tensor):
        raise TypeError(
            f"Expected `{name}` to be an integer tensor of shape ({batch},) but got {type(values).__name__}; "
            f"pass `torch.as_tensor({name})`."
        )
    if values.shape != (batch,):
        squeezable = values.shape == (batch, 1)
        way_out = f"pass `{name}.squeeze(1)`" if squeezable else f"pass one of `{name}` for each row of `embeddings`"
        raise ValueError(f"Expected `{name}` of shape ({batch},) but got {tuple(values.shape)}; {way_out}.")
    if values.dtype not in _INTEGERS:
        raise TypeError(f"Expected `{name}` of an integer dtype but got {values.dtype}; pass `{name}.long()`.")
    return values.detach().to(device, torch.int64)
