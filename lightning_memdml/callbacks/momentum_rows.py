"""The life of the momentum encoder in a training: made, saved, called on each batch, updated after each step, freed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_memdml.memory.momentum_encoder import BatchNorm, MomentumEncoder, check_average
from lightning_memdml.training_images import embed_batch, find_encoder


class MomentumRows:
    """Makes the rows of a memory with a `MomentumEncoder`, from the first step of a fit to its end.

    Args:
        momentum: As for `MomentumEncoder`, and so are `ramp`, `batch_norm` and `factory`.
        ramp: The lower momentum of early updates.
        batch_norm: With which statistics the copy normalises.
        encoder: Which part of the module is the encoder, as for `MemoryCallback`.
        factory: Builds the encoder once more.

    Attributes:
        momentum_encoder: The average; None outside of a fit.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        momentum: float,
        ramp: float,
        batch_norm: BatchNorm,
        encoder: str | None,
        factory: Callable[[], nn.Module] | None,
    ) -> None:
        check_average(momentum, ramp, batch_norm, prefix="encoder_")
        self.momentum = momentum
        self.ramp = ramp
        self.batch_norm = batch_norm
        self.encoder = encoder
        self.factory = factory
        self.momentum_encoder: MomentumEncoder | None = None
        self.saved: dict[str, Any] | None = None  # the state of the average, while there is none

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the encoder.

        In `on_fit_start`: the network has its weights and device then, and DDP and optimisers have their parameters.

        Raises:
            ValueError: If the strategy keeps the weights in parts, or the encoder is not found.
        """
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
            raise ValueError(
                f"Expected a strategy that keeps whole weights, which `encoder_momentum` averages, but got "
                f"{type(trainer.strategy).__name__}. Train with `strategy='ddp'`, or leave `encoder_momentum` out: the "
                "memory itself works with every strategy."
            )
        encoder = find_encoder(pl_module, self.encoder)
        self.momentum_encoder = MomentumEncoder(encoder, self.momentum, self.ramp, self.batch_norm, self.factory)
        if self.saved is not None:
            self.momentum_encoder.load_state_dict(self.saved)
        elif trainer.global_step:
            rank_zero_info("Memory: the momentum encoder starts from the restored network; the checkpoint has none.")
        self.saved = None

    def stop(self) -> None:
        """Free the average, which takes memory of the device; `start` makes it again from its state."""
        if self.momentum_encoder is not None:
            self.saved, self.momentum_encoder = self.momentum_encoder.state_dict(), None

    def state_dict(self) -> dict[str, Any] | None:
        """Return the state of the average; None before the first `start`."""
        return self.saved if self.momentum_encoder is None else self.momentum_encoder.state_dict()

    def rows(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, like: Tensor) -> Tensor:
        """Return the embeddings that the average makes of a batch, of the shape of `like`.

        Raises:
            ValueError: If the images are not found, or the embeddings have another shape.
        """
        assert self.momentum_encoder is not None, "called outside of a fit"
        made = embed_batch(trainer, self.momentum_encoder, _find_images(pl_module, outputs, batch), self.batch_norm)
        if made.shape != like.shape:
            raise ValueError(
                f"Expected the momentum encoder to return embeddings of shape {tuple(like.shape)}, as `training_step` "
                f"does, but got {tuple(made.shape)}. Name the part of the module that is the encoder, `encoder=`, or "
                "let `training_step` return what it called it with, as `inputs`."
            )
        return made

    def update(self, pl_module: LightningModule) -> None:
        """Move the average towards the network, after an optimiser step."""
        assert self.momentum_encoder is not None, "called outside of a fit"
        self.momentum_encoder.update(find_encoder(pl_module, self.encoder))


def _find_images(pl_module: LightningModule, outputs: Any, batch: Any) -> Any:
    """Return what the encoder was called with in this step."""
    if isinstance(outputs, Mapping) and "inputs" in outputs:
        return outputs["inputs"]
    if isinstance(batch, Sequence) and len(batch):
        return batch[0]
    raise ValueError(
        "Expected a batch whose first item is the images, which the momentum encoder needs, but got a "
        f"{type(batch).__name__}. Let {type(pl_module).__name__}.training_step return them: "
        '`return {"loss": loss, "embeddings": z, "labels": y, "inputs": images}`.'
    )
