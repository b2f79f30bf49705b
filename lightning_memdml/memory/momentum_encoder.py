"""A slowly moving copy of the encoder, which makes the rows of a memory, so that they stay comparable for longer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_memdml.checks import check_types
from lightning_memdml.compat import BATCH_NORMS, move_towards_, restore_forward
from lightning_memdml.memory.gather import ranks

BatchNorm = Literal["batch", "running"]


class MomentumEncoder:
    r"""An exponential moving average of an encoder's weights (He et al. 2020, arXiv 1911.05722).

    $$
    \theta_k \leftarrow m_t \theta_k + (1 - m_t) \theta, \qquad
    m_t = \min\Big(m, \frac{1 + t}{r + t}\Big)
    $$

    A memory holds rows of many steps. If the network moves fast, rows of different steps no longer fit together; rows
    made by its slowly moving copy do. The copy is a plain object, not a module: a LightningModule that holds it has
    none of it among its parameters, checkpoints or DDP buckets.

    **Precision.** The copy is float32 whatever the encoder is: at `momentum=0.999` a bfloat16 average would not move.
    Floating-point inputs are converted to float32; under autocast its products are in the lower precision, as those of
    the encoder.

    **Batch norm.** `"batch"` (as in MoCo): the copy normalises with the statistics of its own batch wherever the
    encoder does; batch norms that the encoder keeps in evaluation mode (frozen ones) stay in evaluation mode.
    `"running"`: with the encoder's running statistics, so that a row does not depend on the other images of its batch;
    these are statistics of the newest weights, not of the average. Everything else (dropout, stochastic depth) is in
    evaluation mode.

    **Side effects.** A call changes no buffers, no gradients and no random state of torch.

    **Ranks.** The copies on all ranks stay equal, if the weights they follow are. Buffers (running statistics) are
    those of rank 0: one broadcast of all of them per update.

    Args:
        encoder: What is averaged. It is copied deeply, with its forward hooks, unless a `factory` is given.
        momentum: The $m$ of later updates, in [0, 1). At 0 the copy is the encoder as it was last updated.
        ramp: The $r$ of the formula, at least 1: early updates average over about as many steps as there were. 1
            is no ramp. With 10, a momentum of 0.99 is reached after 900 updates, one of 0.999 after 9,000.
        batch_norm: With which statistics the copy normalises.
        factory: Builds a module with the parameters of `encoder`, if a deep copy cannot be made or is too large.

    Attributes:
        module: The copy.
        updates: How often it was updated.

    Raises:
        ValueError: If an argument is out of range, or the factory builds another network.
        TypeError: If the encoder cannot be copied.

    Example:
        >>> encoder = nn.Linear(3, 2)
        >>> average = MomentumEncoder(encoder, momentum=0.9, ramp=1)
        >>> before = average.module.weight.clone()
        >>> with torch.no_grad():
        ...     _ = encoder.weight.add_(1)
        >>> average.update(encoder)
        >>> torch.testing.assert_close(average.module.weight, before + 0.1)
    """

    def __init__(
        self,
        encoder: nn.Module,
        momentum: float = 0.99,
        ramp: float = 10,
        batch_norm: BatchNorm = "batch",
        factory: Callable[[], nn.Module] | None = None,
    ) -> None:
        check_types(MomentumEncoder.__init__, locals())
        check_average(momentum, ramp, batch_norm)
        self.momentum = momentum
        self.ramp = ramp
        self.batch_norm = batch_norm
        self.updates = 0
        self.module = _copied(encoder) if factory is None else _built(factory, encoder)
        self.module.requires_grad_(False).float()
        _set_mode(self.module, encoder, batch_norm)

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Tensor:
        """Return what the copy computes from these inputs, without gradient."""
        with _own_random_numbers(self.module):
            return self.module(*map(_in_float32, inputs))

    @torch.no_grad()
    def update(self, encoder: nn.Module) -> None:
        """Move towards the weights of `encoder`, and copy its buffers and which of its batch norms are frozen.

        Args:
            encoder: The network of which this is the copy.
        """
        averaged: list[Tensor] = list(self.module.parameters())
        newest = [new.detach().to(old) for old, new in zip(averaged, encoder.parameters(), strict=True)]
        if averaged:
            move_towards_(averaged, newest, weight=1 - self.momentum_now)
        buffers = list(self.module.buffers())
        for held, buffer in zip(buffers, encoder.buffers(), strict=True):
            held.copy_(buffer)
        _share_buffers(buffers)
        self.updates += 1
        _set_mode(self.module, encoder, self.batch_norm)

    @property
    def momentum_now(self) -> float:
        """The momentum of the next update."""
        return min(self.momentum, (1 + self.updates) / (self.ramp + self.updates))

    def to(self, device: torch.device | str) -> MomentumEncoder:
        """Move the copy to a device."""
        self.module.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the weights as CPU copies, and the number of updates; only tensors and numbers."""
        weights = {name: value.detach().to("cpu", copy=True) for name, value in self.module.state_dict().items()}
        return {"weights": weights, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace weights and number of updates.

        Raises:
            ValueError: If they are of another network.
        """
        weights = state.get("weights", {})
        own = self.module.state_dict()
        if {name: value.shape for name, value in weights.items()} != {name: own[name].shape for name in own}:
            raise ValueError(
                "Expected the state of a momentum encoder of this network but got that of another network "
                f"({_first_difference(weights, own)}). Restore the network it was trained with, or start without its "
                "state."
            )
        self.module.load_state_dict(weights)
        self.updates = state["updates"]


@contextmanager
def frozen_inference(encoder: nn.Module, batch_norm: BatchNorm) -> Iterator[None]:
    """Call a network inside the block without side effects on gradients, running statistics or random state.

    Args:
        encoder: The network; its modules have their modes back after the block.
        batch_norm: With which statistics it normalises inside the block; see `MomentumEncoder`.
    """
    modes = [(module, module.training) for module in encoder.modules()]
    tracking = [(norm, norm.track_running_stats) for norm in _batch_norms(encoder)]
    _set_mode(encoder, encoder, batch_norm)
    try:
        with torch.no_grad(), _own_random_numbers(encoder):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, tracked in tracking:
            norm.track_running_stats = tracked


def check_momentum(name: str, momentum: float) -> None:
    """Raise a `ValueError` unless `momentum` is in [0, 1)."""
    if not 0 <= momentum < 1:
        raise ValueError(
            f"Expected `{name}` in [0, 1) but got {momentum}. At 1 nothing would ever change; pass 0.99, for example."
        )


def check_average(momentum: float, ramp: float, batch_norm: str, prefix: str = "") -> None:
    """Check the options of a `MomentumEncoder`.

    Args:
        momentum: The momentum, in [0, 1).
        ramp: The ramp, at least 1.
        batch_norm: With which statistics the copy normalises.
        prefix: What the names of the options begin with in the caller.

    Raises:
        ValueError: If one is out of range; the message names it.
    """
    check_momentum(f"{prefix}momentum", momentum)
    if not ramp >= 1:
        raise ValueError(f"Expected `{prefix}ramp` of at least 1 but got {ramp}. Pass 1 for no ramp.")
    if batch_norm not in get_args(BatchNorm):
        raise ValueError(
            f"Expected `{prefix}batch_norm` to be one of {', '.join(get_args(BatchNorm))} but got {batch_norm!r}. Pass "
            "one of these names."
        )


def _copied(encoder: nn.Module) -> nn.Module:
    # A module built by LightningCLI holds its optimizer as a partial, and in it the parser, the Trainer and DDP.
    shared = {id(value): value for part in encoder.modules() for value in vars(part).values() if _is_code(value)}
    try:
        module = copy.deepcopy(encoder, shared)
    except Exception as error:  # whatever a part of it raises, there is no copy
        raise TypeError(
            f"Expected an encoder that can be copied deeply but {type(encoder).__name__} cannot be copied ({error}). "
            "Pass a function that builds the same network, `factory=` here or `encoder_factory=` of MemoryCallback, or "
            "name the part that is the encoder, `MemoryCallback(encoder=...)`."
        ) from error
    for part in module.modules():
        restore_forward(part)
    return module


def _is_code(value: Any) -> bool:
    """Return whether a value is a partial function that holds no part of the network."""
    if not isinstance(value, partial):
        return False
    held = (getattr(value.func, "__self__", None), *value.args, *value.keywords.values())
    return not any(isinstance(given, nn.Module | Tensor) for given in held)


def _built(factory: Callable[[], nn.Module], encoder: nn.Module) -> nn.Module:
    module = factory()
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    other = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in other.items()}:
        raise ValueError(
            f"Expected the factory to build a network with the parameters and buffers of {type(encoder).__name__} but "
            f"got {_first_difference(own, other)}. Build it with the same arguments."
        )
    some = next(encoder.parameters(), None)
    module.to("cpu" if some is None else some.device)
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(other[name])
    return module


def _first_difference(own: dict[str, Tensor], other: dict[str, Tensor]) -> str:
    for name in (*own, *other):
        shapes = [tuple(side[name].shape) if name in side else "none" for side in (own, other)]
        if shapes[0] != shapes[1]:
            return f"`{name}` of shape {shapes[0]} instead of {shapes[1]}"
    return "nothing differs"


def _set_mode(module: nn.Module, encoder: nn.Module, batch_norm: BatchNorm) -> None:
    """Put `module` into evaluation mode, except for batch norms that are to use the statistics of the batch."""
    by_batch = [batch_norm == "batch" and norm.training for norm in _batch_norms(encoder)]
    for part in module.modules():
        part.training = False
    for norm, training in zip(_batch_norms(module), by_batch, strict=True):
        norm.training = training
        # Without this the statistics of the batch would enter the running ones.
        norm.track_running_stats = not training


def _batch_norms(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if isinstance(part, BATCH_NORMS)]


@contextmanager
def _own_random_numbers(module: nn.Module) -> Iterator[None]:
    """Restore the random state of torch, from which the training draws, after the block."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _share_buffers(buffers: list[Tensor]) -> None:
    """Replace floating-point buffers, statistics of the batches of each rank, by those of rank 0."""
    shared = [buffer for buffer in buffers if buffer.is_floating_point()]
    if not shared or ranks()[1] == 1:
        return
    message = torch.cat([buffer.flatten() for buffer in shared])
    dist.broadcast(message, src=0)
    for buffer, values in zip(shared, message.split([buffer.numel() for buffer in shared]), strict=True):
        buffer.copy_(values.view_as(buffer))
