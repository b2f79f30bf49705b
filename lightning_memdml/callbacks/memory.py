"""The memory in a training: attached for the fit, written after each step, saved with the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from tqdm import tqdm

from lightning_memdml.callbacks.training_images import BATCH_SIZE, embed, find_encoder, find_train_set, load_images
from lightning_memdml.losses.pair_loss import PairLoss
from lightning_memdml.losses.sharded import check_needs_no_ranks
from lightning_memdml.memory.embedding_memory import EmbeddingMemory
from lightning_memdml.memory.gather import RowGather
from lightning_memdml.memory.instance_memory import InstanceMemory
from lightning_memdml.memory.momentum_encoder import BatchNorm, MomentumEncoder, check_momentum
from lightning_memdml.memory.rows import as_rows
from lightning_memdml.memory.sharded import ShardedMemory

# Where against_memory leaves the batch for the callback, on the module.
_OFFER = "_offered_to_memory"


class MemoryCallback(Callback):
    """Gives any LightningModule a memory of earlier embeddings (Wang et al. 2020, arXiv 1912.06798).

    Three lines of a module that trains already change::

        from lightning_memdml import MemoryCallback, against_memory
        loss = self.loss(z, y) + against_memory(self, self.loss, z, y)
        trainer = Trainer(callbacks=[MemoryCallback(size=8192)])

    For the time of `trainer.fit` the memory is `pl_module.memory`, to be read without `against_memory` too. Then
    `training_step` returns what is to be stored, with `indices` (which image each row is of) if they are known, and
    without the callback Python says that there is no attribute `memory`::

        loss = self.loss(z, y) + self.loss(z, y, *self.memory.read()[:2])
        return {"loss": loss, "embeddings": z, "labels": y}

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

    **Momentum.** With `encoder_momentum` the rows are not the step's own embeddings, but those that a slow copy
    of the encoder (`MomentumEncoder`) makes of the same images: one more forward, no backward. The copy starts
    as the network of the first step and is updated once per optimiser step, after the rows of the step are made.
    Images are what `training_step` returns as `inputs`, or else the first item of the batch.

    **Resume.** A checkpoint holds the rows, all counters and the momentum encoder; resuming goes on exactly. One
    without a memory leaves the memory empty; one with a memory of another size leaves its newest rows; one
    without a momentum encoder starts it from the restored network. After the fit the memory stays in
    `callback.memory`, on the CPU; a new fit starts with an empty one, except if the same Trainer goes on.

    **From outside.** `callback.memory.reset()` empties the memory, `callback.enabled = False` empties it and
    stores nothing until it is True again; under DDP on every rank in the same step.

    Args:
        size: Rows the memory keeps, over all ranks: a whole number, or a share of the training images in (0, 1];
            8192 by default. 1.0 is as many rows as images, 1 is one row.
        start_step: Optimiser steps before rows are stored.
        dtype: How embeddings are stored; float16 takes half the bytes.
        memory: The memory itself, in place of `size` and `dtype`: an `InstanceMemory`, for example.
        prefill: Fill the memory with training images, chosen at random, before the first row is stored, as XBM's
            paper does: a pass without gradient, over the ranks. It is never repeated.
        encoder_momentum: Momentum of the encoder that writes the rows, in [0, 1); None: the network's own rows.
        encoder_ramp: Lower momentum for early updates, see `MomentumEncoder`; 1 is none.
        encoder_batch_norm: By which statistics rows are normalised that are made here, see `MomentumEncoder`.
        encoder: Which part of the module maps images to embeddings, such as `net`; None: the one that the module's
            attribute `encoder_name` names, or else its `forward`.
        encoder_factory: Builds the encoder once more, where it cannot be copied.

    Attributes:
        memory: The memory itself.
        keys: The momentum encoder, for the time of the fit.
        enabled: Whether rows are stored.

    Raises:
        ValueError: If an argument is out of range; in `fit`, if `training_step` returned no embeddings and
            labels, the module has another attribute `memory`, `size` is a share of a training set without a
            length, or the momentum encoder cannot be made.

    Example:
        >>> MemoryCallback(size=1024, start_step=200).memory
        EmbeddingMemory(size=1024, rows=0, dim=0, dtype=torch.float32, device='cpu')
    """

    def __init__(
        self,
        size: int | float | None = None,
        start_step: int = 0,
        dtype: Literal["float32", "float16"] = "float32",
        memory: EmbeddingMemory | InstanceMemory | ShardedMemory | None = None,
        prefill: bool = False,
        encoder_momentum: float | None = None,
        encoder_ramp: float = 10,
        encoder_batch_norm: BatchNorm = "batch",
        encoder: str | None = None,
        encoder_factory: Callable[[], nn.Module] | None = None,
    ) -> None:
        if start_step < 0:
            raise ValueError(f"Expected `start_step` of at least 0 optimiser steps but got {start_step}.")
        if encoder_momentum is not None:
            check_momentum("encoder_momentum", encoder_momentum)
        self._share: float | None = None
        self.memory = self._make_memory(size, dtype) if memory is None else memory
        if memory is not None:
            if size is not None or dtype != "float32":
                raise ValueError("Expected `size` and `dtype` or a `memory`, which has its own, but got both.")
            self._share = 1.0 if memory.size is None else None
        self.start_step = start_step
        self.prefill = prefill
        self.encoder_momentum = encoder_momentum
        self.encoder_ramp = encoder_ramp
        self.encoder_batch_norm = encoder_batch_norm
        self.encoder = encoder
        self.encoder_factory = encoder_factory
        self.keys: MomentumEncoder | None = None
        self._keys_state: dict[str, Any] | None = None
        self._enabled = True
        self._prefilled = False
        self._gather = RowGather()
        self._step = 0
        self._reported = False
        self._warned: set[str] = set()

    def _make_memory(self, size: int | float | None, dtype: str) -> EmbeddingMemory:
        if dtype not in ("float32", "float16"):
            raise ValueError(f'Expected `dtype` to be "float32" or "float16" but got {dtype!r}.')
        size = 8192 if size is None else size
        if isinstance(size, float) and size > 1 and size.is_integer():
            size = int(size)  # Python 3.10 can cache `int | float` as `float | int`, and jsonargparse then reads 40.0
        if isinstance(size, float):
            if not 0 < size <= 1:
                raise ValueError(
                    f"Expected `size` as a share of the training set in (0, 1] but got {size}; pass a number of rows "
                    "as a whole number."
                )
            self._share, size = size, 1  # until the training set is known
        return EmbeddingMemory(size, getattr(torch, dtype))

    @property
    def enabled(self) -> bool:
        """Whether rows are stored; switched off, the memory is empty."""
        return self._enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._enabled = enabled
        if not enabled:
            self.memory.reset()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach the memory, empty unless the same Trainer goes on with its training."""
        if stage != "fit":
            return
        _check_free(pl_module, self.memory)
        self._keep_keys()
        if self._share is not None:
            self._fit_to_train_set(trainer, self._share)
        if trainer.global_step == 0 or trainer.ckpt_path is not None:
            self.memory.reset()
            self._prefilled, self._enabled = False, True
            self._keys_state = None
        self._gather = RowGather()
        self._reported = False
        self._warned = set()
        # Past nn.Module.__setattr__: whatever the memory becomes, it is no part of the module.
        pl_module.__dict__["memory"] = self.memory

    def _fit_to_train_set(self, trainer: Trainer, share: float) -> None:
        images = find_train_set(trainer)
        if images is None:
            raise ValueError(
                f"The memory's size is to be {share:g} of the training images, but their number is not known: there is "
                "no data module with a `train_set`, nor a loader with a `dataset` that has a length. Pass `size=`, a "
                "number of rows."
            )
        size = max(1, round(share * len(images)))
        if size != self.memory.size:
            self.memory.size = size
            self.memory.reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring rows from a checkpoint, which was restored before, to the module's device; copy the encoder."""
        self.memory.to(pl_module.device)
        if self.encoder_momentum is not None:
            self._start_keys(trainer, pl_module, self.encoder_momentum)
        self._keys_state = None

    def _start_keys(self, trainer: Trainer, pl_module: LightningModule, momentum: float) -> None:
        """Copy the encoder: here, where it has its weights and device, and DDP and optimisers have theirs."""
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
            raise ValueError(
                f"`encoder_momentum` averages whole weights, which {type(trainer.strategy).__name__} keeps in parts; "
                "train with `strategy='ddp'`, or leave it out: the memory itself works under every strategy."
            )
        encoder = find_encoder(pl_module, self.encoder)
        self.keys = MomentumEncoder(encoder, momentum, self.encoder_ramp, self.encoder_batch_norm, self.encoder_factory)
        if self._keys_state is not None:
            self.keys.load_state_dict(self._keys_state)
        elif trainer.global_step:
            rank_zero_info("Memory: the momentum encoder starts from the restored network; the checkpoint has none.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what to expect."""
        writer = "" if self.keys is None else f", written by an encoder of momentum {self.keys.momentum:g}"
        rank_zero_info(
            f"Memory: {len(self.memory)} of {self.memory.size} rows filled; "
            f"rows are stored from optimiser step {self.start_step} on (now {trainer.global_step}){writer}."
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note how many steps the weights have taken that make this batch's embeddings."""
        self._step = trainer.global_step
        pl_module.__dict__.pop(_OFFER, None)
        if self.prefill and not self._prefilled and self._enabled and self._step >= self.start_step:
            self._fill(trainer, pl_module)

    def _fill(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Embed as many training images as there are rows, each rank its part of every batch."""
        images = find_train_set(trainer)
        if images is None:
            raise ValueError(
                "`prefill` embeds training images, but there is no data module with a `train_set`, nor a loader with a "
                "`dataset` that can be indexed. Leave `prefill` out."
            )
        encoder = self.keys or find_encoder(pl_module, self.encoder)
        # Always the same choice: all ranks agree on it, and a run that is repeated does too.
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: self.memory.size]
        turns = chosen.tensor_split(math.ceil(len(chosen) / (BATCH_SIZE * trainer.world_size)))
        own = [turn[trainer.global_rank :: trainer.world_size].tolist() for turn in turns]
        # A rank without a part still takes part in the gather, for which it needs to know how long rows are.
        loaded = load_images(
            trainer, images, [part or turn[:1].tolist() for part, turn in zip(own, turns, strict=True)]
        )
        shown = tqdm(loaded, "Filling the memory", len(own), delay=1, disable=not trainer.is_global_zero, leave=False)
        for part, (inputs, labels, indices) in zip(own, shown, strict=True):
            rows = as_rows(embed(trainer, encoder, inputs, self.encoder_batch_norm), labels, indices)
            self._store(tuple(tensor[: len(part)] for tensor in rows), known=bool((indices >= 0).all()))
        self._prefilled = True

    def _store(self, rows: tuple[Tensor, ...], known: bool) -> int:
        """Gather the rows of all ranks and enqueue them; return how many they are."""
        embeddings, labels, indices = self._gather(*rows)
        dropped = self.memory.enqueue(embeddings, labels, indices if known else None, step=self._step)
        self._warn_if_dropped(dropped, len(labels))
        return len(labels)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Store the rows of all ranks, then let the momentum encoder follow the step."""
        if not outputs and pl_module.automatic_optimization:
            return  # training_step returned None, so Lightning skipped the batch (allowed on one rank only)
        found = find_rows(type(self).__name__, pl_module, outputs)
        rows = as_rows(**found)
        self._warn_if_unread(pl_module)
        if self._enabled and self._step >= self.start_step:
            if self.keys is not None:
                inputs = _inputs(pl_module, outputs, batch)
                made = embed(trainer, self.keys, inputs, self.encoder_batch_norm)
                _check_keys(made, rows[0])
                rows = as_rows(made, found["labels"], found.get("indices"))
            self._report(trainer, self._store(rows, known="indices" in found))
        if self.keys is not None and trainer.global_step > self._step:
            self.keys.update(find_encoder(pl_module, self.encoder))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach the memory: Lightning skips `teardown` after an exception."""
        self._detach(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach the memory, and free the accelerator as Lightning does with the module."""
        if stage == "fit":
            self._detach(pl_module)
            self.memory.to("cpu")
            self._keep_keys()

    def _keep_keys(self) -> None:
        """Free the momentum encoder; a Trainer that goes on makes it again of its state."""
        if self.keys is not None:
            self._keys_state, self.keys = self.keys.state_dict(), None

    def state_dict(self) -> dict[str, Any]:
        """Rows and counters, and the momentum encoder."""
        state = {"memory": self.memory.state_dict(), "enabled": self._enabled, "prefilled": self._prefilled}
        keys = self._keys_state if self.keys is None else self.keys.state_dict()
        return state if keys is None else {**state, "keys": keys}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over rows, counters and momentum encoder, of a run with any number of ranks."""
        self.memory.load_state_dict(state_dict.get("memory", {}))
        self._enabled = state_dict.get("enabled", True)
        self._prefilled = state_dict.get("prefilled", len(self.memory) > 0)
        self._keys_state = state_dict.get("keys")  # until there is an encoder to follow

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
        oldest = math.ceil((memory.size or 0) / (rows * trainer.accumulate_grad_batches))
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
    if len(memory) == 0:
        return embeddings[:0].sum()
    options = memory.loss_options(len(labels))
    if not isinstance(loss, PairLoss):
        check_needs_no_ranks(loss, options)
        options = {}
    if indices is not None:
        options |= {"indices": indices, "ref_indices": ref_indices}
    return loss(embeddings, labels, ref_embeddings, ref_labels, **options)


def _inputs(pl_module: LightningModule, outputs: Any, batch: Any) -> Any:
    """Return what the encoder was called with in this step."""
    if isinstance(outputs, Mapping) and "inputs" in outputs:
        return outputs["inputs"]
    if isinstance(batch, Sequence) and len(batch):
        return batch[0]
    raise ValueError(
        f"The momentum encoder needs the images of each training batch, but does not know where they are in a "
        f"{type(batch).__name__}. Let {type(pl_module).__name__}.training_step return them: "
        '`return {"loss": loss, "embeddings": z, "labels": y, "inputs": images}`.'
    )


def _check_keys(keys: Tensor, embeddings: Tensor) -> None:
    if keys.shape != embeddings.shape:
        raise ValueError(
            f"Expected the momentum encoder to return embeddings of shape {tuple(embeddings.shape)}, as "
            f"`training_step` does, but got {tuple(keys.shape)}. Name the part of the module that is the encoder, "
            "`encoder=`, or let `training_step` return what it called it with, as `inputs`."
        )


def _check_free(pl_module: LightningModule, memory: EmbeddingMemory | InstanceMemory | ShardedMemory) -> None:
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
            '`return {"loss": loss, "embeddings": z, "labels": y}`, or add `against_memory(self, self.loss, z, y)` to '
            "the loss."
        )
    return {name: rows[name] for name in ("embeddings", "labels", "indices") if name in rows}
