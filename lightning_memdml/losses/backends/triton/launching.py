"""What the backends of Triton share: the device, the lines of a loss as a function, and the totals of what they write.

A backend is a module with two functions: `launch`, which adds negatives and returns states, and `reason_against`.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_memdml.losses.accumulators import NegativeAccumulator
from lightning_memdml.losses.backends.triton.codegen import Terms, UnsupportedOpError, generate_terms
from lightning_memdml.losses.backends.triton.merging import merge
from lightning_memdml.losses.definition import Context, LossDefinition, NegativeTotals

DTYPES = (torch.float16, torch.bfloat16)


class Device(NamedTuple):
    """Compute capability without the minor number, multiprocessors, and bytes of memory that a program may share."""

    generation: int
    processors: int
    shared_memory: int


def device_of(tensor: Tensor) -> Device:
    """Return the numbers of the GPU that holds a tensor."""
    if tensor.device.type == "cpu":  # Triton's interpreter
        return Device(generation=9, processors=4, shared_memory=1 << 17)
    properties = torch.cuda.get_device_properties(tensor.device)
    # Missing from torch's type annotations.
    shared_memory: int = getattr(properties, "shared_memory_per_block_optin")  # noqa: B009
    return Device(properties.major, properties.multi_processor_count, shared_memory)


def reason_against(anchors: Tensor, references: Tensor) -> str | None:
    """Return what no backend of Triton can serve, or `None`.

    Args:
        anchors: `(B, D)`.
        references: `(M, D)`.
    """
    if references.dtype not in DTYPES:
        return f"{references.dtype}".removeprefix("torch.")
    if anchors.dtype != torch.float32:
        return f"embeddings in {anchors.dtype}".replace("torch.", "")
    return None if references.is_contiguous() else "references that are not contiguous"


class SharedNegatives(NamedTuple):
    """The shared references, among which only some pairs are negatives.

    Attributes:
        columns: Their numbers, `(Q,)`, -1 where there is none.
        negative: Mask of the negative pairs, `(B, Q)`.
        number: How many of all references are negatives of each anchor, `(B,)`.
    """

    columns: Tensor
    negative: Tensor
    number: Tensor


class Launch(Protocol):
    """Adds negatives to totals."""

    def __call__(
        self,
        loss: LossDefinition,
        terms: Terms,
        anchors: Tensor,
        references: Tensor,
        is_shared: Tensor,
        with_gradient: bool,
        shared: SharedNegatives | None = None,
    ) -> Tensor:
        """Return states over the references that are not shared, and the `shared` ones, `(W, B, 3 + D + S)`.

        Args:
            loss: A loss of one part.
            terms: Its lines.
            anchors: `(B, D)`, contiguous.
            references: `(M, D)`.
            is_shared: True for the references to leave out, `(M,)`.
            with_gradient: Whether the states contain a gradient.
            shared: Which of the pairs with the shared references are negatives.
        """


def stack_columns(terms: Terms, anchors: Tensor) -> Tensor:
    """Return the values per anchor that the lines of a loss read, `(B, K)`; the anchors where there are none."""
    columns = [column.to(anchors).expand(len(anchors), 1) for column in terms.columns]
    return torch.cat(columns, dim=1) if columns else anchors


@functools.lru_cache
def compile_terms(text: str, num_columns: int) -> triton.JITFunction:
    """Return the lines of a loss as a function that a kernel calls."""
    name = f"terms_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    loads = [
        f"column{k} = tl.load(columns + i * num_columns + {k}, mask=is_anchor)[:, None]" for k in range(num_columns)
    ]
    lines = [f"def {name}(similarity, columns, i, is_anchor, constants, num_columns: tl.constexpr):"]
    lines += [f"    {line}" for line in [*loads, *text.splitlines()]]
    file = f"<{name}>"
    # Triton reads the source of what it compiles; no file is needed for that.
    linecache.cache[file] = (0, None, [f"{line}\n" for line in lines], file)
    namespace = {"tl": tl, "__name__": __name__}
    exec(compile("\n".join(lines), file, "exec"), namespace)
    return triton.jit(namespace[name])


def total_negatives(
    parts: Sequence[LossDefinition],
    contexts: Sequence[Context],
    anchors: Tensor,
    references: Tensor,
    is_shared: Tensor,
    shared: SharedNegatives,
    launch: Launch,
) -> tuple[list[tuple[NegativeTotals, Tensor | None] | None], str | None]:
    """Return the totals over all negatives for each part of a loss, and for the first part their gradient.

    Args:
        parts: The parts of the loss.
        contexts: What their `context` returned.
        anchors: `(B, D)`.
        references: `(M, D)`.
        is_shared: True for the references that are not plain negatives, `(M,)`.
        shared: Which of the pairs with these are negatives.
        launch: That of the backend.

    Returns:
        Totals and gradient of each part, `None` for a part for which there is no kernel, and why there is none.
    """
    found: list[tuple[NegativeTotals, Tensor | None] | None] = []
    reason, anchors = None, anchors.contiguous()
    for part, context in zip(parts, contexts, strict=True):
        with_gradient = part is parts[0]
        terms = _terms_or_reason(part, context, anchors.shape[0])
        if isinstance(terms, str):
            found.append(None)
            reason = terms
            continue
        states = launch(part, terms, anchors, references, is_shared, with_gradient, shared)
        found.append(merge(part, states, anchors, shared.number, terms.num_sums, with_gradient))
    return found, reason


def add_plain_negatives(
    accumulators: list[NegativeAccumulator], references: Tensor, is_shared: Tensor, launch: Launch
) -> tuple[list[NegativeAccumulator], str | None]:
    """Add every reference that is not shared.

    Args:
        accumulators: Of the parts of one loss, with the same anchors.
        references: `(M, D)`.
        is_shared: True for the references to leave out, `(M,)`.
        launch: That of the backend.

    Returns:
        The accumulators for whose loss there is no kernel, and why.
    """
    left, reason = [], None
    for accumulator in accumulators:
        terms = _terms_or_reason(accumulator.loss, accumulator.context, accumulator.anchors.shape[0])
        if isinstance(terms, str):
            left.append(accumulator)
            reason = terms
        elif references.shape[0]:
            anchors, with_gradient = accumulator.anchors.contiguous(), accumulator.gradient is not None
            accumulator.merge(launch(accumulator.loss, terms, anchors, references, is_shared, with_gradient))
    return left, reason


def _terms_or_reason(loss: LossDefinition, context: Context, rows: int) -> Terms | str:
    """Return the lines of a loss of one part, or why there are none."""
    try:
        return generate_terms(loss, context, rows)
    except UnsupportedOpError as error:
        return f"a loss whose weights need {error}"
