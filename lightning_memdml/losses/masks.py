"""Which pairs are positive, which negative, and which are left out."""

from __future__ import annotations

import torch
from torch import Tensor


def pair_masks(
    labels: Tensor,
    ref_labels: Tensor,
    indices: Tensor | None = None,
    ref_indices: Tensor | None = None,
    *,
    in_batch: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the masks of positive and of negative pairs, both ``(B, M)``.

    Left out of both: pairs of equal, known (not negative) index, and ``in_batch`` each row paired with itself.
    """
    same_class = labels[:, None] == ref_labels[None, :]
    left_out = torch.zeros_like(same_class)
    if indices is not None and ref_indices is not None:
        left_out |= (indices[:, None] == ref_indices[None, :]) & (indices >= 0)[:, None]
    if in_batch:
        left_out |= torch.eye(labels.shape[0], dtype=torch.bool, device=labels.device)
    return same_class & ~left_out, ~same_class & ~left_out
