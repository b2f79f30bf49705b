"""The memory in a training: attached for the fit, written after each step, saved with the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_memdml.memory.embedding_memory import EmbeddingMemory
from lightning_memdml.memory.gather import RowGather
from lightning_memdml.memory.rows import as_rows

# Where against_memory leaves the batch for the callback, on the module.
_OFFER = "_offered_to_memory"


class MemoryCallback(Callback):
    """Gives any LightningModule a memory of earlier embeddings (Wang et al. 2020, arXiv 1912.06798).

    For the time of `trainer.fit` the memory is `pl_module.memory`. Four lines of a module that trains already
    change::

        from lightning_memdml import MemoryCallback
        loss = self.loss(z, y) + self.loss(z, y, *self.memory.read()[:2])
        return {"loss": loss, "embeddings": z, "labels": y}
        trainer = Trainer(callbacks=[MemoryCallback(size=8192)])

    or three with `against_memory`, which needs no changed `return`. An item `indices` (which image each row
    is of) may be returned too.

    **When.** The memory is read in the step and written after it, with the embeddings the step was trained
    on: never the rows of the batch itself. Only training batches are stored (no sanity check, validation,
    test or prediction), every micro-batch of an accumulated step too. A batch is stored once the weights that
    made it had taken `start_step` optimiser steps; before, `read()` gives zero rows. Steps are
    `trainer.global_step`, which with several optimisers counts each of them.

    **Where.** The memory belongs to the callback, and is no buffer of the module: DDP does not broadcast it,
    weight averaging does not average it, `load_from_checkpoint` does not meet it, `bf16-true` does not cast
    it, a deep copy of the module does not copy it. Rows are normalised and stored in float32 under every
    precision.

    **Ranks.** The rows of all ranks are gathered in rank order (one collective per step, uneven batches
    included), so that every rank holds the same memory. The memory term of a rank compares its own batch with
    the rows of all ranks; an in-batch term sees the rank's own batch only. DDP averages the gradients of the
    ranks. With equally large batches the memory term therefore trains as on one rank with the batch of all
    ranks; the in-batch term trains as the mean of the in-batch losses of the ranks' parts of it.

    **Rows that are no embeddings.** Rows that are NaN, infinite or zero are dropped after the gather on all
    ranks alike, counted in `memory.dropped`, and warned about once.

    **Resume.** A checkpoint holds the rows and all counters; resuming goes on exactly. One without a memory
    leaves the memory empty; one with a memory of another size leaves its newest rows. After the fit the
    memory stays in `callback.memory`, on the CPU; a new fit starts with an empty one, except if the same
    Trainer goes on.

    Args:
        size: Rows the memory keeps, over all ranks.
        start_step: Optimiser steps before rows are stored.
        dtype: How embeddings are stored; float16 takes half the bytes.

    Attributes:
        memory: The memory itself.

    Raises:
        ValueError: If `size` is below 1 or `start_step` below 0; in `fit`, if `training_step` returned no
            embeddings and labels, or the module has another attribute `memory`.

    Example:
        >>> MemoryCallback(size=1024, start_step=200).memory
        EmbeddingMemory(size=1024, rows=0, dim=0, dtype=torch.float32, device='cpu')
    """

    def __init__(self, size: int = 8192, start_step: int = 0, dtype: Literal["float32", "float16"] = "float32") -> None:
        if start_step < 0:
            raise ValueError(f"Expected `start_step` of at least 0 optimiser steps but got {start_step}.")
        self.memory = EmbeddingMemory(size, getattr(torch, dtype))
        self.start_step = start_step
        self._gather = RowGather()
        self._step = 0
        self._reported = False
        self._warned: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach the memory, empty unless the same Trainer goes on with its training."""
        if stage != "fit":
            return
        _check_free(pl_module, self.memory)
        if trainer.global_step == 0 or trainer.ckpt_path is not None:
            self.memory.reset()
        self._gather = RowGather()
        self._reported = False
        self._warned = set()
        # Past nn.Module.__setattr__: whatever the memory becomes, it is no part of the module.
        pl_module.__dict__["memory"] = self.memory

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring rows from a checkpoint, which was restored before, to the module's device."""
        self.memory.to(pl_module.device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what to expect."""
        rank_zero_info(
            f"Memory: {len(self.memory)} of {self.memory.size} rows filled; "
            f"rows are stored from optimiser step {self.start_step} on (now {trainer.global_step})."
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note how many steps the weights have taken that make this batch's embeddings."""
        self._step = trainer.global_step
        pl_module.__dict__.pop(_OFFER, None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Store the rows of all ranks."""
        if not outputs and pl_module.automatic_optimization:
            return  # training_step returned None, so Lightning skipped the batch (allowed on one rank only)
        rows = as_rows(**find_rows(type(self).__name__, pl_module, outputs))
        self._warn_if_unread(pl_module)
        if self._step < self.start_step:
            return
        embeddings, labels, indices = self._gather(*rows)
        dropped = self.memory.enqueue(embeddings, labels, indices, step=self._step)
        self._warn_if_dropped(dropped, len(labels))
        self._report(trainer, len(labels))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach the memory: Lightning skips `teardown` after an exception."""
        self._detach(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach the memory, and free the accelerator as Lightning does with the module."""
        if stage == "fit":
            self._detach(pl_module)
            self.memory.to("cpu")

    def state_dict(self) -> dict[str, Any]:
        """Rows and counters."""
        return {"memory": self.memory.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over rows and counters, of a run with any number of ranks."""
        self.memory.load_state_dict(state_dict.get("memory", {}))

    def _detach(self, pl_module: LightningModule) -> None:
        if pl_module.__dict__.get("memory") is self.memory:
            del pl_module.__dict__["memory"]
        pl_module.__dict__.pop(_OFFER, None)

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            rank_zero_warn(message)

    def _warn_if_unread(self, pl_module: LightningModule) -> None:
        if len(self.memory) and not self.memory.was_read:
            self._warn_once(
                "unread",
                f"MemoryCallback stores rows, but {type(pl_module).__name__}.training_step does not read "
                "them: the memory has no effect on the training. Change the loss to "
                "`loss = self.loss(z, y) + self.loss(z, y, *self.memory.read()[:2])`.",
            )

    def _warn_if_dropped(self, dropped: int, rows: int) -> None:
        if dropped:
            self._warn_once(
                "dropped",
                f"{dropped} of {rows} embeddings of the batch at optimiser step {self._step} were NaN, "
                "infinite or zero and did not enter the memory. `memory.dropped` counts them from now on.",
            )

    def _report(self, trainer: Trainer, rows: int) -> None:
        if self._reported or not rows:
            return
        self._reported = True
        memory = self.memory
        oldest = math.ceil(memory.size / (rows * trainer.accumulate_grad_batches))
        rank_zero_info(
            f"Memory: {memory.size} rows x {memory.dim}, {memory.nbytes / 1e6:.1f} MB on {memory.device}; at "
            f"{rows} rows per batch of all ranks, the oldest row of a full memory is {oldest} steps old."
        )


def against_memory(
    module: nn.Module,
    loss: Callable[..., Tensor],
    embeddings: Tensor,
    labels: Tensor,
    indices: Tensor | None = None,
) -> Tensor:
    """The loss of a batch against the memory of `MemoryCallback`, which stores the batch after the step.

    The shorter drop-in: with it, `training_step` need not return embeddings and labels::

        loss = self.loss(z, y) + against_memory(self, self.loss, z, y)

    Args:
        module: The LightningModule in training.
        loss: Called as `loss(embeddings, labels, ref_embeddings, ref_labels)`, and with `indices` also with
            `indices=, ref_indices=`, by which pairs of one image are left out.
        embeddings: `(B, D)`.
        labels: `(B,)`.
        indices: `(B,)`, which image each row is of.

    Returns:
        A scalar; a differentiable 0 while the memory has no rows.

    Raises:
        ValueError: If the module has no memory.
    """
    memory = getattr(module, "memory", None)
    if memory is None:
        raise ValueError(
            f"{type(module).__name__} has no memory: pass `Trainer(callbacks=[MemoryCallback(size=8192)])`. "
            "Outside of `trainer.fit` there is none either; use the in-batch loss alone there."
        )
    offer = {"embeddings": embeddings.detach(), "labels": labels}
    setattr(module, _OFFER, offer if indices is None else {**offer, "indices": indices})
    ref_embeddings, ref_labels, ref_indices = memory.read()
    if len(ref_labels) == 0:
        return embeddings[:0].sum()
    if indices is None:
        return loss(embeddings, labels, ref_embeddings, ref_labels)
    return loss(embeddings, labels, ref_embeddings, ref_labels, indices=indices, ref_indices=ref_indices)


def _check_free(pl_module: LightningModule, memory: EmbeddingMemory) -> None:
    held = getattr(pl_module, "memory", None)
    if held is not None and held is not memory:
        raise ValueError(
            f"{type(pl_module).__name__} has an attribute `memory` of its own ({type(held).__name__}), where "
            "MemoryCallback puts its memory for the time of the fit. Rename the attribute; or, if it belongs "
            "to a second MemoryCallback, pass one only."
        )


def find_rows(callback: str, pl_module: LightningModule, outputs: Any) -> dict[str, Tensor]:
    """What `training_step` returned, or else what `against_memory` was given; the error names the `callback`."""
    returned = outputs if isinstance(outputs, Mapping) else {}
    offered = pl_module.__dict__.get(_OFFER, {})
    rows = returned if "embeddings" in returned or not offered else offered
    missing = [f"`{name}`" for name in ("embeddings", "labels") if name not in rows]
    if missing:
        raise ValueError(
            f"{callback} needs the embeddings and labels of each training batch, but found no "
            f"{' and no '.join(missing)} in what {type(pl_module).__name__}.training_step returned "
            f"({', '.join(map(str, returned)) or 'nothing'}). End it with "
            '`return {"loss": loss, "embeddings": z, "labels": y}`.'
        )
    return {name: rows[name] for name in ("embeddings", "labels", "indices") if name in rows}
