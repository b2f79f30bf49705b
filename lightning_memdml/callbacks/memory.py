"""The memory in a training: attached for the fit, written after each step, saved with the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_memdml.callbacks.memory_setup import (
    StorageName,
    check_place,
    check_strategy,
    describe_backends,
    fit_to_train_set,
    make_memory,
)
from lightning_memdml.callbacks.momentum_rows import MomentumRows
from lightning_memdml.callbacks.prefill import prefill_rows
from lightning_memdml.checks import check_types
from lightning_memdml.memory.gather import RowGather
from lightning_memdml.memory.momentum_encoder import BatchNorm, MomentumEncoder
from lightning_memdml.memory.protocol import Memory
from lightning_memdml.memory.rows import as_rows
from lightning_memdml.memory_term import step_embeddings
from lightning_memdml.readable_repr import options_repr
from lightning_memdml.training_images import find_encoder


class MemoryCallback(Callback):
    """Adds a memory of earlier embeddings to any LightningModule (Wang et al. 2020, arXiv 1912.06798).

    Three lines of an existing module change:

        from lightning_memdml import MemoryCallback, against_memory
        loss = self.loss(z, y) + against_memory(self, self.loss, z, y)
        trainer = Trainer(callbacks=[MemoryCallback(size=8192)])

    During `trainer.fit` the memory is `pl_module.memory`, so `training_step` may also read it directly. Then it returns
    what is to be stored, with `indices` (the data-set index of each row's image) if they are known:

        loss = self.loss(z, y) + self.loss(z, y, *self.memory.read()[:2])
        return {"loss": loss, "embeddings": z, "labels": y}

    **When.** The memory is read in the step and written after it, with the embeddings of that step, so a batch never
    meets its own rows. Only training batches are stored (no sanity check, validation, test or prediction), including
    every micro-batch of an accumulated step. A batch is stored if the weights that made it had taken at least
    `start_step` optimiser steps; before, `read()` gives zero rows. Steps are `trainer.global_step`, which with several
    optimisers counts each of them.

    **Where.** The callback owns the memory; it is not a buffer of the module. DDP does not broadcast it, weight
    averaging does not average it, `load_from_checkpoint` does not look for it, `bf16-true` does not cast it, and a deep
    copy of the module does not copy it. Rows are normalised and stored in float32 under every precision.

    **Ranks.** The rows of all ranks are gathered in rank order (one collective per step, batches may differ in size),
    so every rank holds the same memory. With `MetricLearner` and `against_memory` they travel during the backward pass.
    The memory term of a rank compares its own batch with the rows of all ranks; an in-batch term sees the rank's own
    batch only. DDP averages the gradients of the ranks. With equally large batches the memory term therefore trains as
    on one rank with the batch of all ranks; the in-batch term trains as the mean of the in-batch losses of the ranks'
    parts of it. Rows of a rank that gives no `indices` are stored as unknown (-1).

    **Rows without a direction.** Rows that are NaN, infinite or zero are dropped after the gather, on all ranks alike.
    They are counted in `memory.dropped`, and a warning is given once.

    **Momentum.** With `encoder_momentum` the rows are not the step's own embeddings, but those that a slowly moving
    copy of the encoder (`MomentumEncoder`) makes of the same images: one more forward pass, no backward pass. The copy
    starts as the network of the first step and is updated once per optimiser step, after the rows of the step are
    made. Images are what `training_step` returns as `inputs`, or else the first item of the batch.

    **Resume.** A checkpoint holds the rows, all counters and the momentum encoder; a resumed run continues exactly. A
    checkpoint without a memory leaves the memory empty; one with a memory of another size leaves its newest rows; one
    without a momentum encoder starts it from the restored network. After the fit the memory stays in
    `callback.memory`, on the CPU. A new fit starts with an empty memory, unless the same Trainer continues.

    **From outside.** `callback.memory.reset()` empties the memory. `callback.enabled = False` empties it, and nothing
    is stored until it is True again. Under DDP do either on every rank in the same step.

    Args:
        size: Rows the memory keeps, over all ranks: a whole number, or a share of the training images in (0, 1];
            8192 by default. 1.0 is as many rows as images, 1 is one row.
        start_step: Optimiser steps before rows are stored.
        dtype: How embeddings are stored. `float16` and `bfloat16` take half the bytes, and GPUs multiply them by tensor
            cores; similarities change by up to 4.9e-4 and 3.9e-3. `auto`: float16 on a CUDA GPU, float32 elsewhere.
        memory: The memory itself, instead of `size` and `dtype`: an `InstanceMemory`, a `ShardedMemory`, or your own
            class derived from `Memory`.
        prefill: Fill the memory with random training images before the first row is stored, as in the paper of XBM: a
            pass without gradient, shared by the ranks. A resumed run does not repeat it.
        encoder_momentum: Momentum of the encoder that makes the rows, in [0, 1); None: rows are the network's own.
        encoder_ramp: Lower momentum for early updates, see `MomentumEncoder`; 1 is none.
        encoder_batch_norm: With which statistics rows made here are normalised, see `MomentumEncoder`.
        encoder: Which part of the module maps images to embeddings, such as `net`; None: the one that the module's
            attribute `encoder_name` names, or else its `forward`.
        encoder_factory: Builds the encoder once more, if it cannot be copied.

    Attributes:
        memory: The memory itself.
        momentum_encoder: The momentum encoder; None outside of a fit, or without `encoder_momentum`.
        enabled: Whether rows are stored.

    Raises:
        ValueError: If an argument is out of range; in `fit`, if `training_step` returned no embeddings and
            labels, the module has another attribute `memory`, `size` is a share of a training set without a
            length, there is a second MemoryCallback, or the momentum encoder cannot be made.
        TypeError: If `memory` is not a `Memory`.

    Example:
        >>> MemoryCallback(size=1024, start_step=200).memory
        EmbeddingMemory(size=1024, rows=0, dim=0, dtype=torch.float32, device='cpu')
    """

    __repr__ = options_repr

    def __init__(
        self,
        size: int | float | None = None,
        start_step: int = 0,
        dtype: StorageName = "float32",
        memory: Memory | None = None,
        prefill: bool = False,
        encoder_momentum: float | None = None,
        encoder_ramp: float = 10,
        encoder_batch_norm: BatchNorm = "batch",
        encoder: str | None = None,
        encoder_factory: Callable[[], nn.Module] | None = None,
    ) -> None:
        check_types(MemoryCallback.__init__, locals(), "memory", "dtype")
        if start_step < 0:
            raise ValueError(
                f"Expected `start_step` of at least 0 optimiser steps but got {start_step}. Pass 0 to store at once."
            )
        self.memory: Memory
        if memory is None:
            self.memory, self._share = make_memory(8192 if size is None else size, dtype)
        elif size is not None or dtype != "float32":
            raise ValueError(
                "Expected `size` and `dtype`, or a `memory`, which has its own, but got both. Pass one of them."
            )
        elif not isinstance(memory, Memory):
            raise TypeError(
                f"Expected `memory` to be a Memory but got {type(memory).__name__}. Derive its class from "
                "`lightning_memdml.memory.Memory`."
            )
        else:
            self.memory, self._share = memory, 1.0 if memory.size is None else None
        self.start_step = start_step
        self.prefill = prefill
        self.encoder_momentum = encoder_momentum
        self.encoder_batch_norm = encoder_batch_norm
        self.encoder = encoder
        self._momentum = None
        unused = {"encoder_ramp": encoder_ramp != 10, "encoder_factory": encoder_factory is not None}
        if encoder_momentum is None and any(unused.values()):
            name = next(name for name, is_set in unused.items() if is_set)
            raise ValueError(
                f"Expected `encoder_momentum`, as `{name}` is set, but got None. Pass 0.99, or leave `{name}` out."
            )
        if encoder_momentum is not None:
            self._momentum = MomentumRows(encoder_momentum, encoder_ramp, encoder_batch_norm, encoder, encoder_factory)
        self._enabled = True
        self._prefilled = False
        self._gather = RowGather()
        self._step = 0
        self._reported: set[str] = set()
        self._sent: Tensor | None = None  # the embeddings whose gathering was started before the backward pass

    @property
    def momentum_encoder(self) -> MomentumEncoder | None:
        """The average of the encoder that makes the rows; None outside of a fit, or without `encoder_momentum`."""
        return None if self._momentum is None else self._momentum.momentum_encoder

    @property
    def enabled(self) -> bool:
        """Whether rows are stored; switched off, the memory is empty."""
        return self._enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._enabled = enabled
        self.memory.stores_batch = enabled and self._step >= self.start_step
        if not enabled:
            self.memory.reset()

    # ---------------------------------------------------------------- the life of a fit
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach the memory, empty unless the same Trainer continues its training."""
        if stage != "fit":
            return
        check_place(pl_module, self.memory)
        check_strategy(trainer)
        if sum(isinstance(callback, MemoryCallback) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ValueError(
                "Expected one MemoryCallback in the Trainer but got several. Remove all but one: each would replace "
                "the memory of the others."
            )
        if self._momentum is not None:
            self._momentum.stop()  # the last fit may have ended with an exception
        if self._share is not None:
            fit_to_train_set(trainer, self.memory, self._share)
        if trainer.global_step == 0 or trainer.ckpt_path is not None:
            self.memory.reset()
            self._prefilled, self._enabled = False, True
            if self._momentum is not None:
                self._momentum.saved = None
        self._gather = RowGather()
        self._reported = set()
        # Not by nn.Module.__setattr__, which would register a memory that is a module or a tensor.
        pl_module.__dict__["memory"] = self.memory

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move rows of a restored checkpoint to the module's device, and copy the encoder."""
        self.memory.to(pl_module.device)
        if self._momentum is not None:
            self._momentum.start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report fill and start."""
        made = "" if self._momentum is None else f", made by an encoder of momentum {self._momentum.momentum:g}"
        rank_zero_info(
            f"Memory: {len(self.memory):,} of {self.memory.size:,} rows filled; "
            f"rows are stored from optimiser step {self.start_step:,} on (now {trainer.global_step:,}){made}"
            f"{describe_backends(pl_module)}."
        )
        self._warn_of_late_start(trainer, pl_module)

    def _warn_of_late_start(self, trainer: Any, pl_module: LightningModule) -> None:
        # With several optimisers, which is manual, each step of one counts, and the number of steps is not known.
        steps = trainer.estimated_stepping_batches  # -1 or infinity where it is not known, as of a stream
        if 0 < steps <= self.start_step and pl_module.automatic_optimization and not trainer.fast_dev_run:
            rank_zero_warn(
                f"Expected `start_step` below the {steps:,} optimiser steps of the training but got "
                f"{self.start_step:,}: no row is stored, and the memory has no effect. Pass {int(steps) // 10}, for "
                "example."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach the memory: Lightning skips `teardown` after an exception."""
        self._detach(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach the memory, and free the accelerator as Lightning does with the module."""
        if stage == "fit":
            self._detach(pl_module)
            self.memory.to("cpu")
            if self._momentum is not None:
                self._momentum.stop()

    def _detach(self, pl_module: LightningModule) -> None:
        self.memory.given = {}
        if pl_module.__dict__.get("memory") is self.memory:
            del pl_module.__dict__["memory"]

    # ---------------------------------------------------------------- each batch
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note how many steps the weights have taken that make this batch's embeddings."""
        self._step = trainer.global_step
        self.memory.given = {}
        self.memory.stores_batch = self._enabled and self._step >= self.start_step
        if self.memory.stores_batch and self.prefill and not self._prefilled:
            self._fill(trainer, pl_module)

    def _fill(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Embed as many training images as there are rows, each rank its part of every batch."""
        encoder = self.momentum_encoder or find_encoder(pl_module, self.encoder)
        for rows in prefill_rows(trainer, encoder, self.memory.size or 0, self.encoder_batch_norm):
            embeddings, labels, indices = self._gather(*rows)
            dropped = self.memory.enqueue(embeddings, labels, indices, step=self._step)
            self._warn_dropped(dropped, len(labels))
        self._prefilled = True

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Send the batch to the other ranks, if the step gave it already; it arrives while gradients are computed."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        given = self.memory.given
        if self.memory.stores_batch and given and self._momentum is None and not self._gather.is_started:
            self._sent = given["embeddings"]
            self._gather.start(*as_rows(**given))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Store the rows of all ranks, then update the momentum encoder if the optimiser stepped."""
        if not outputs and pl_module.automatic_optimization:
            return  # training_step returned None, so Lightning skipped the batch (allowed on one rank only)
        found = step_embeddings(type(self).__name__, pl_module, outputs)
        embeddings, labels, indices = as_rows(**found)
        if not self.memory.was_read and len(self.memory):
            self._warn_unread(pl_module)
        if self.memory.stores_batch:
            if self._momentum is not None:
                embeddings = self._momentum.rows(trainer, pl_module, outputs, batch, like=embeddings).detach().float()
            if dist.is_available() and dist.is_initialized():
                sent = self._gather.finish() if self._gather.is_started else None
                if sent is None or self._sent is None or not self._sent.is_set_to(found["embeddings"]):
                    sent = self._gather(embeddings, labels, indices)
                embeddings, labels, indices = sent
            dropped = self.memory.enqueue(embeddings, labels, indices, step=self._step)
            if dropped:
                self._warn_dropped(dropped, len(labels))
            if "size" not in self._reported and len(labels):
                self._report_size(embeddings, batches_per_step=trainer.accumulate_grad_batches)
        if self._momentum is not None and trainer.global_step > self._step:
            self._momentum.update(pl_module)

    def _report_size(self, embeddings: Tensor, batches_per_step: int) -> None:
        self._reported.add("size")
        rows, dim = embeddings.shape
        age = math.ceil((self.memory.size or 0) / (rows * batches_per_step))
        rank_zero_info(
            f"Memory: {self.memory.size:,} rows x {dim}, {self.memory.nbytes / 1e6:.1f} MB on {embeddings.device}; at "
            f"{rows} rows per batch of all ranks, the oldest row of a full memory is {age} steps old."
        )

    def _warn_dropped(self, dropped: int, rows: int) -> None:
        if dropped and "dropped" not in self._reported:
            self._reported.add("dropped")
            rank_zero_warn(
                f"{dropped} of {rows} embeddings of the batch at optimiser step {self._step} were NaN, infinite or "
                "zero and did not enter the memory. `memory.dropped` counts them from now on."
            )

    def _warn_unread(self, pl_module: LightningModule) -> None:
        if "unread" not in self._reported:
            self._reported.add("unread")
            rank_zero_warn(
                f"MemoryCallback stores rows, but {type(pl_module).__name__}.training_step does not read "
                "them: the memory has no effect on the training. Change the loss to "
                "`loss = self.loss(z, y) + self.loss(z, y, *self.memory.read()[:2])`."
            )

    # ---------------------------------------------------------------- checkpoints
    def state_dict(self) -> dict[str, Any]:
        """Return rows and counters, and the momentum encoder."""
        state = {"memory": self.memory.state_dict(), "enabled": self._enabled, "prefilled": self._prefilled}
        average = None if self._momentum is None else self._momentum.state_dict()
        # The name in the file is that of version 0.1, for the key encoder of MoCo.
        return state if average is None else {**state, "keys": average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore rows, counters and momentum encoder, from a run with any number of ranks."""
        self.memory.load_state_dict(state_dict.get("memory", {}))
        self._enabled = state_dict.get("enabled", True)
        self._prefilled = state_dict.get("prefilled", len(self.memory) > 0)
        if self._momentum is not None:
            self._momentum.saved = state_dict.get("keys")
