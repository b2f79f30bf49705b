"""What a memory accepts: its arguments, and a state that may come from a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_memdml.memory.rows import COLUMNS, TENSORS, Storage


def check_size(size: int) -> None:
    """Check the size of a memory.

    Raises:
        TypeError: If it is not a whole number.
        ValueError: If it is below 1.
    """
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"Expected `size` to be a whole number of rows but got {size!r}. Pass an int.")
    if size < 1:
        raise ValueError(f"Expected `size` of at least 1 but got {size}. Pass the number of rows to keep.")


def check_storage(dtype: Storage) -> None:
    """Raise a `TypeError` unless embeddings can be stored in this dtype."""
    if dtype != "auto" and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise TypeError(
            f'Expected a floating-point `dtype` or "auto" but got {dtype}. Pass torch.float32 or torch.float16.'
        )


def check_state(kind: str, state: dict[str, Any], names: Sequence[str]) -> None:
    """Check the state of a memory, which may come from a file.

    Args:
        kind: Name of the memory's class, for the message.
        state: What is to be loaded.
        names: The entries it needs: the four tensors, and numbers.

    Raises:
        ValueError: If an entry is missing or of another type or shape, or an embedding is not finite.
    """
    remedy = "The checkpoint is damaged or was written by another class: start without the memory's state."
    missing = ", ".join(name for name in names if name not in state)
    if missing:
        raise ValueError(
            f"Expected the state of an {kind} in the checkpoint to have {', '.join(names)} but {missing} is missing. "
            f"{remedy}"
        )
    for name in names:
        is_tensor = name in TENSORS
        right = isinstance(state[name], Tensor) if is_tensor else type(state[name]) is int and state[name] >= 0
        if not right:
            kinds = "a tensor" if is_tensor else "a whole number of at least 0"
            raise ValueError(
                f"Expected `{name}` in the state of an {kind} to be {kinds} but got {state[name]!r:.80}. {remedy}"
            )
    shapes = {name: tuple(state[name].shape) for name in TENSORS}
    dtypes = {name: state[name].dtype for name in TENSORS}
    rows = shapes["embeddings"][:1]
    if len(shapes["embeddings"]) != 2 or any(shapes[name] != rows for name in COLUMNS):
        raise ValueError(
            f"Expected the state of an {kind} to have embeddings of shape (M, D) and labels, indices and steps of "
            f"shape (M,) but got {shapes}. {remedy}"
        )
    if not dtypes["embeddings"].is_floating_point or any(dtypes[name] != torch.int64 for name in COLUMNS):
        raise ValueError(
            f"Expected the state of an {kind} to have floating-point embeddings and int64 labels, indices and steps "
            f"but got {dtypes}. {remedy}"
        )
    finite = state["embeddings"].isfinite().all(dim=1)
    if not finite.all():
        raise ValueError(
            f"Expected finite embeddings in the state of an {kind} in the checkpoint but {int((~finite).sum())} of "
            f"{len(finite)} rows hold NaN or infinity. {remedy}"
        )
