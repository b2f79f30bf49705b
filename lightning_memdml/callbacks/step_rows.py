"""What a training step gives to be stored: what it returned, or what it gave to the memory before its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor


def choose_embeddings(
    owner: str, pl_module: LightningModule, outputs: Any, given: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the embeddings, labels and, if known, indices of a training step.

    Args:
        owner: Who needs them, for the message.
        pl_module: The module in training.
        outputs: What `training_step` returned.
        given: What `training_step` gave before its end, as to `against_memory`; used if it returned no embeddings.

    Raises:
        ValueError: If there are none.
    """
    returned = outputs if isinstance(outputs, Mapping) else {}
    rows = returned if "embeddings" in returned or not given else given
    missing = [f"`{name}`" for name in ("embeddings", "labels") if name not in rows]
    if missing:
        raise ValueError(
            f"Expected the embeddings and labels of each training batch, which {owner} needs, but got no "
            f"{' and no '.join(missing)} in what {type(pl_module).__name__}.training_step returned "
            f"({', '.join(map(str, returned)) or 'nothing'}). End it with "
            '`return {"loss": loss, "embeddings": z, "labels": y}`, or add `against_memory(self, self.loss, z, y)` to '
            "the loss."
        )
    return {name: rows[name] for name in ("embeddings", "labels", "indices") if name in rows}


def is_same(embeddings: Tensor, sent: Tensor | None) -> bool:
    """Whether a step returned the embeddings that it had given before."""
    return sent is not None and (embeddings.data_ptr(), embeddings.shape) == (sent.data_ptr(), sent.shape)
