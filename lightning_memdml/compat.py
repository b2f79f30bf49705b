"""Differences between versions of torch and Lightning, and private names of third parties, all in this one file.

Each entry gives its reason and the versions it was tested with. `tests/test_compat.py` fails when upstream changes.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import maybe_mark_dynamic
from torch.utils.data import DataLoader

#: `mark_dynamic(tensor, 0)` lets `torch.compile` treat the length of a tensor as dynamic from the first call on. torch
#: has it in `torch._dynamo` only. Without the mark a compiled step compiles once more for the second length of a
#: memory. Tested with torch 2.10 and 2.14.
mark_dynamic = maybe_mark_dynamic

#: The batch norms of torch. Their common base class `_BatchNorm` is private.
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def all_gather_single(output: Tensor, input: Tensor, async_op: bool = False) -> Any:
    """Gather one tensor of the same shape from every rank into one tensor, rank 0 first.

    torch 2.14 deprecates `all_gather_into_tensor` in favour of `all_gather_single`, which torch 2.10 does not have.
    Tested with torch 2.10 and 2.14.

    Args:
        output: `(W * N, ...)`, overwritten.
        input: `(N, ...)`, of the same shape on every rank.
        async_op: Return at once, with an object whose `wait` ends when the output is there.
    """
    # Looked up at each call, so that a test can count the calls.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(output, input, async_op=async_op)


def products_of_pairs(starts: Tensor, columns: Tensor, anchors: Tensor, references: Tensor) -> Tensor:
    """Return the products of some pairs of rows, anchor by anchor, `(N,)`. On a CPU.

    torch warns once that its sparse tensors may change, and that it does not check them. Tested with torch 2.10 and
    2.14.

    Args:
        starts: How many pairs the anchors before have, `(B + 1,)`.
        columns: The reference of each pair, `(N,)`.
        anchors: `(B, D)`.
        references: `(Q, D)`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse ", category=UserWarning)
        nothing = anchors.new_zeros(len(columns))
        pairs = torch.sparse_csr_tensor(starts, columns, nothing, (len(anchors), len(references)))
        return torch.sparse.sampled_addmm(pairs, anchors, references.T).values()


@functools.cache
def has_avx512_bf16() -> bool:
    """Whether the processor has AVX512-BF16 instructions.

    `torch.cpu.get_capabilities` is public but newer than torch 2.10, which has the private
    `torch.cpu._is_avx512_bf16_supported`. Tested with torch 2.10 and 2.14.
    """
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if get_capabilities is not None:
        return bool(get_capabilities().get("avx512_bf16", False))
    return bool(torch.cpu._is_avx512_bf16_supported())


def in_place_changes(tensor: Tensor) -> int | None:
    """Return how often a tensor, and what shares its numbers as a view, was changed in place; None if not counted.

    autograd uses this count to refuse a backward pass after a change. torch has no public name for it. A tensor that
    was made in inference mode has no count. Tested with torch 2.10 and 2.14.
    """
    return None if tensor.is_inference() else tensor._version


def assert_async(condition: Tensor, message: str) -> None:
    """Raise a `RuntimeError` if a condition on a device is false, without waiting for the device.

    torch has no public function for it: reading the condition would make the host wait for a GPU. Tested with torch
    2.10 and 2.14.

    Args:
        condition: A scalar truth value.
        message: The message of the error. On a GPU the error comes with a later operation.
    """
    torch._assert_async(condition, message)


def move_towards_(tensors: list[Tensor], targets: list[Tensor], weight: float) -> None:
    """Replace each tensor `t` by `t + weight * (target - t)`, all in one call.

    torch has no public function over lists of tensors; a loop over the parameters of a ResNet-50 takes several times
    longer. Tested with torch 2.10 and 2.14.
    """
    torch._foreach_lerp_(tensors, targets, weight=weight)


def restore_forward(module: nn.Module) -> None:
    """Remove the `forward` that `torch.compile` left in a deep copy of a LightningModule.

    Lightning stores the compiled function in the module itself, so a copy would run the network that it was copied
    from. It is recognised by `_torchdynamo_orig_callable`. Tested with torch 2.10 and 2.14, lightning 2.6.
    """
    compiled = hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
    if compiled and not isinstance(module, torch._dynamo.OptimizedModule):
        del module.__dict__["forward"]


def given_training_data(trainer: Any) -> Any:
    """Return what the Trainer will load the training batches from, before it has loaded it: a loader or a module.

    `trainer.train_dataloader` is None until training starts, which is after a checkpoint was restored; the size of a
    memory is needed before. Tested with lightning 2.6.
    """
    return trainer.fit_loop._data_source.instance


def help_formatter(most_classes: int) -> type:
    """Return a formatter that keeps a description's line breaks, and lists classes only where they are few.

    jsonargparse lists every known subclass of a parameter's type in its help, hundreds for a `torch.nn.Module`, and has
    no setting for it. The text of an option comes from `_get_help_string`, which argparse documents for subclasses but
    names privately. Tested with jsonargparse 4.53 on Python 3.10 to 3.13.

    Args:
        most_classes: Longest list of classes that is shown.
    """
    import argparse

    from jsonargparse import DefaultHelpFormatter

    class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
        def _get_help_string(self, action: argparse.Action) -> Any:
            text = super()._get_help_string(action) or ""
            shown, _, names = text.partition(", known subclasses: ")
            return f"{shown})" if names.count(",") > most_classes else text

    return HelpFormatter


def ranks_start_method(trainer: Any) -> str | None:
    """Return how the Trainer starts its ranks from the running program: `spawn`, `fork` or `forkserver`, else None.

    When such ranks end, Lightning brings back the weights alone. Its launchers are private. Tested with lightning 2.6.
    """
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

    launcher = trainer.strategy.launcher
    return launcher._start_method if isinstance(launcher, _MultiProcessingLauncher) else None


def loader_iterator(loader: DataLoader[Any]) -> Any:
    """Return the iterator of a loader with persistent workers, which owns the workers; None before the first epoch.

    Lightning stops the workers of a `DataLoader` at the end of a run through its attribute `_iterator`, and
    `ClassBalancedLoader` passes this on to the loader inside it. Tested with torch 2.10 and 2.14, lightning 2.6.
    """
    return loader._iterator


def set_loader_iterator(loader: DataLoader[Any], iterator: Any) -> None:
    """Replace the iterator of a loader, see `loader_iterator`."""
    loader._iterator = iterator
