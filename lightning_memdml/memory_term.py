"""What a training step does with a memory: the loss against its rows, by any loss, and the rows that it gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_memdml.checks import check_rows
from lightning_memdml.losses.pair_loss import PairLoss
from lightning_memdml.memory.protocol import Memory
from lightning_memdml.memory.rows import MemoryRows

Loss = PairLoss | Callable[..., Any]


def loss_term(
    loss: Loss, embeddings: Tensor, labels: Tensor, rows: MemoryRows | None = None, indices: Tensor | None = None
) -> Tensor:
    """Return the loss of a batch by itself or, with `rows`, against what `memory.read()` returned.

    A `PairLoss` is called with all that is known: indices, the bound of shared rows, the other ranks. Any other loss is
    called as `loss(embeddings, labels)`, and against rows in one of two ways:

    - a loss with a parameter `ref_emb`, as those of pytorch-metric-learning, with `ref_emb=, ref_labels=`;
    - any other function as `loss(embeddings, labels, ref_embeddings, ref_labels)`, and if it has a parameter
      `ref_indices`, also with `indices=, ref_indices=`.

    They are called in full precision, since similarities in bfloat16 would be off by up to 4e-3.

    Args:
        loss: A `PairLoss`, a loss of pytorch-metric-learning, or any function.
        embeddings: `(B, D)` of unit length.
        labels: `(B,)`.
        rows: What `memory.read()` returned, or three tensors in a plain tuple; `None` for the batch by itself.
        indices: `(B,)`, the data-set index of each row's image; `None` is unknown. A `PairLoss` leaves out pairs of
            equal indices.

    Returns:
        A scalar, the mean over the B anchors for a `PairLoss`; a differentiable 0 while the memory has no rows.

    Raises:
        ValueError: If the rows are only this rank's share of a memory and the loss is not a `PairLoss`, or the loss
            takes no references.

    Example:
        >>> from lightning_memdml.losses import ContrastiveLoss
        >>> loss_term(ContrastiveLoss(), torch.eye(2), torch.tensor([0, 0]))
        tensor(1.)
        >>> rows = MemoryRows(torch.eye(2), torch.tensor([0, 1]), torch.tensor([-1, -1]))
        >>> loss_term(ContrastiveLoss(), torch.eye(2), torch.tensor([0, 0]), rows)
        tensor(1.)
    """
    if not isinstance(loss, PairLoss):
        _check_arguments(loss, embeddings, labels, indices, with_rows=rows is not None)
    if rows is None:
        if isinstance(loss, PairLoss):
            return loss(embeddings, labels, indices=indices)
        with torch.autocast(embeddings.device.type, enabled=False):
            return loss(_at_least_float32(embeddings), labels)
    if not isinstance(rows, MemoryRows):
        rows = _as_memory_rows(rows)
    ref_embeddings, ref_labels, ref_indices = rows
    if (ref_labels.shape[0] if rows.ranks is None else len(rows.ranks)) == 0:
        return embeddings[:0].sum()
    options: dict[str, Any] = {} if indices is None else {"indices": indices, "ref_indices": ref_indices}
    if isinstance(loss, PairLoss):
        if rows.ranks is not None:
            options["ranks"] = rows.ranks
        if rows.bounds is not None:
            options["max_shared"] = rows.bounds
        # A `forward` of the user's own may not know this option, which changes no result. Asked first, so that a
        # compiled step does not depend on how `rounded` was made.
        if not torch.compiler.is_compiling() and rows.rounded is not None and type(loss).forward is PairLoss.forward:
            options["ref_rounded"] = rows.rounded
        return loss(embeddings, labels, ref_embeddings, ref_labels, **options)
    if rows.ranks is not None:
        raise ValueError(
            f"Expected a PairLoss against a ShardedMemory, whose rows are spread over the ranks, but got {loss}. Pass "
            "a PairLoss, or use an EmbeddingMemory."
        )
    if ref_embeddings.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"Expected embeddings of shape (B, {ref_embeddings.shape[1]}), as wide as the rows of the memory, but got "
            f"{tuple(embeddings.shape)}. Pass those of the same embedding layer, or empty the memory: "
            "`memory.reset()`."
        )
    embeddings = _at_least_float32(embeddings)
    ref_embeddings = ref_embeddings.to(embeddings.dtype)
    parameters = inspect.signature(loss.forward if isinstance(loss, torch.nn.Module) else loss).parameters
    with torch.autocast(embeddings.device.type, enabled=False):
        if "ref_emb" in parameters:
            try:
                return loss(embeddings, labels, ref_emb=ref_embeddings, ref_labels=ref_labels)
            except ValueError as error:
                if "ref_emb is not supported" not in str(error):
                    raise
                raise _takes_no_references(loss) from error
        if _is_of_pytorch_metric_learning(loss, "losses") or not _takes_four(parameters.values()):
            raise _takes_no_references(loss)
        return loss(embeddings, labels, ref_embeddings, ref_labels, **(options if "ref_indices" in parameters else {}))


def against_memory(
    module: LightningModule, loss: Loss, embeddings: Tensor, labels: Tensor, indices: Tensor | None = None
) -> Tensor:
    """Return the loss of a batch against the memory of `MemoryCallback`, which then stores the batch after the step.

    This is the shortest way to add a memory, since `training_step` need not return embeddings and labels:

        loss = self.loss(z, y) + against_memory(self, self.loss, z, y)

    Args:
        module: The LightningModule in training.
        loss: A `PairLoss`, a loss of pytorch-metric-learning, or a function, which is called as
            `loss(embeddings, labels, ref_embeddings, ref_labels)`, see `loss_term`.
        embeddings: Embeddings of the batch, of unit length, `(B, D)`.
        labels: Their classes, `(B,)`.
        indices: `(B,)`, the data-set index of each row's image; pairs of one image are left out.

    Returns:
        A scalar; a differentiable 0 while the memory has no rows.

    Raises:
        ValueError: If the module has no memory.

    Example:
        >>> from lightning_memdml.losses import ContrastiveLoss
        >>> from lightning_memdml.memory import EmbeddingMemory
        >>> module = LightningModule()
        >>> module.__dict__["memory"] = EmbeddingMemory(4)  # as `MemoryCallback` does for the time of the fit
        >>> against_memory(module, ContrastiveLoss(), torch.eye(2), torch.tensor([0, 0]))  # no rows yet
        tensor(0.)
    """
    memory = getattr(module, "memory", None)
    if not isinstance(memory, Memory):
        raise ValueError(
            f"Expected a memory of a MemoryCallback but {type(module).__name__} has no memory. Pass "
            "`Trainer(callbacks=[MemoryCallback(size=8192)])`. Outside of `trainer.fit` there is no memory: use the "
            "in-batch loss alone there."
        )
    check_rows("embeddings", embeddings, labels=labels, **({} if indices is None else {"indices": indices}))
    given = {"embeddings": embeddings.detach(), "labels": labels}
    memory.given = given if indices is None else {**given, "indices": indices}
    return loss_term(loss, embeddings, labels, memory.read(), indices)


def _check_arguments(loss: Any, embeddings: Any, labels: Any, indices: Any, *, with_rows: bool) -> None:
    """Check the arguments of a loss that does not check them itself.

    What it compares in the batch is its own matter: labels may be of any kind. Against rows they are integers, as those
    of the rows.
    """
    if not callable(loss):
        check_loss("loss", loss)
    if with_rows:
        check_rows("embeddings", embeddings, labels=labels, **({} if indices is None else {"indices": indices}))
    elif not isinstance(embeddings, Tensor):
        raise TypeError(
            f"Expected `embeddings` to be a tensor of shape (B, D) but got {type(embeddings).__name__}. Pass "
            "`torch.as_tensor(embeddings)`."
        )


def _as_memory_rows(rows: Any) -> MemoryRows:
    if not isinstance(rows, tuple | list) or len(rows) != 3:
        got = f"{len(rows)} items" if isinstance(rows, tuple | list) else type(rows).__name__
        raise TypeError(
            f"Expected `rows` to be embeddings, labels and indices but got {got}. Pass `memory.read()`, or "
            "(embeddings, labels, torch.full_like(labels, -1))."
        )
    return MemoryRows(*rows)


def check_memory_options(module: LightningModule, options: Sequence[str]) -> None:
    """Refuse options of a memory where there is none: they would change nothing, in silence.

    Args:
        module: The module, with its memory from the setup of the fit on.
        options: The names of the options that were set.

    Raises:
        ValueError: If there are any, and no memory.

    Example:
        >>> check_memory_options(LightningModule(), ["memory_weight"])
        Traceback (most recent call last):
        ValueError: Expected a memory, as `memory_weight` is set, but there is none. Pass \
`Trainer(callbacks=[MemoryCallback(size=8192)])`, or leave out what is set.
    """
    if options and getattr(module, "memory", None) is None:
        names = " and ".join(f"`{name}`" for name in options)
        raise ValueError(
            f"Expected a memory, as {names} {'is' if len(options) == 1 else 'are'} set, but there is none. Pass "
            "`Trainer(callbacks=[MemoryCallback(size=8192)])`, or leave out what is set."
        )


def step_embeddings(owner: str, pl_module: LightningModule, outputs: Any) -> dict[str, Tensor]:
    """Return the embeddings, labels and, if known, indices of a training step.

    They are what `training_step` returned, or else what it gave to the memory before its end, as by `against_memory`.

    Args:
        owner: Who needs them, for the message.
        pl_module: The module in training.
        outputs: What `training_step` returned.

    Raises:
        ValueError: If there are none.
    """
    memory = getattr(pl_module, "memory", None)
    given = memory.given if isinstance(memory, Memory) else {}
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


def check_loss(name: str, loss: Any) -> None:
    """Check that an argument is a loss.

    Args:
        name: The argument, for the error.
        loss: What was given.

    Raises:
        TypeError: If it is a miner of pytorch-metric-learning, or cannot be called.

    Example:
        >>> check_loss("loss", 0.5)
        Traceback (most recent call last):
        TypeError: Expected `loss` to be a loss but got 0.5. Pass ContrastiveLoss(), for example.
    """
    if _is_of_pytorch_metric_learning(loss, "miners"):
        raise TypeError(
            f"Expected `{name}` to be a loss but got the miner {type(loss).__name__}. Pass both: MinedLoss(loss, "
            "miner)."
        )
    if not callable(loss):
        raise TypeError(f"Expected `{name}` to be a loss but got {loss!r}. Pass ContrastiveLoss(), for example.")


class MinedLoss(torch.nn.Module):
    """Combines a loss and a miner of pytorch-metric-learning to one loss, for the batch and against a memory.

    Args:
        loss: A loss of pytorch-metric-learning.
        miner: A miner of pytorch-metric-learning, which chooses the pairs or triplets.

    Raises:
        TypeError: If `loss` or `miner` is something else, such as a loss of this package, which takes no pairs.

    Example:
        >>> def miner(embeddings, labels, *references): return labels > 0  # any function that chooses
        >>> def loss(embeddings, labels, chosen, *references): return embeddings[chosen].sum()
        >>> loss_term(MinedLoss(loss, miner), torch.eye(3), torch.tensor([0, 0, 1]))
        tensor(1.)
    """

    def __init__(self, loss: torch.nn.Module, miner: torch.nn.Module) -> None:
        super().__init__()
        if isinstance(loss, PairLoss) or not callable(loss) or _is_of_pytorch_metric_learning(loss, "miners"):
            raise TypeError(
                f"Expected `loss` to be a loss of pytorch-metric-learning but got {loss!r}. Pass one, such as "
                "TripletMarginLoss(). Losses of this package need no miner."
            )
        if not callable(miner) or _is_of_pytorch_metric_learning(miner, "losses"):
            raise TypeError(
                f"Expected `miner` to be a miner of pytorch-metric-learning but got {miner!r}. Pass one, such as "
                "TripletMarginMiner()."
            )
        self.loss, self.miner = loss, miner

    def forward(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None
    ) -> Tensor:
        """Mine, and return the loss of what was chosen."""
        chosen = self.miner(embeddings, labels, ref_emb, ref_labels)
        return self.loss(embeddings, labels, chosen, ref_emb, ref_labels)


def _is_of_pytorch_metric_learning(made: Any, part: str) -> bool:
    """Whether an object is a loss or a miner of pytorch-metric-learning, without importing it."""
    # All of them are modules. For a function, torch 2.10 cannot compile the next line.
    return isinstance(made, torch.nn.Module) and any(
        base.__module__.startswith(f"pytorch_metric_learning.{part}") for base in type(made).__mro__
    )


def _takes_four(parameters: Iterable[inspect.Parameter]) -> bool:
    """Whether a function can be called with embeddings, labels, and those of references."""
    kinds = [parameter.kind for parameter in parameters]
    positional = kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) + kinds.count(inspect.Parameter.POSITIONAL_ONLY)
    return positional >= 4 or inspect.Parameter.VAR_POSITIONAL in kinds


def _takes_no_references(loss: Any) -> ValueError:
    name = getattr(loss, "__name__", type(loss).__name__)
    return ValueError(
        f"Expected a loss that compares with references against the memory but got {name}, which takes none. Pass "
        "another one for the memory: `memory_loss=ContrastiveLoss()`, or `against_memory(self, ContrastiveLoss(), "
        "...)`."
    )


def _at_least_float32(embeddings: Tensor) -> Tensor:
    return embeddings if embeddings.dtype == torch.float64 else embeddings.float()
