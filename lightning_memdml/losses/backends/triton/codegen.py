"""Translates the lines of a loss into the text of a Triton kernel.

A loss defines the weights of its negatives once, in torch (`LossDefinition.negative_terms`). Here those lines run on a
`Symbol` in place of a block of similarities, and each operation on it writes one line of Triton. Numbers become
arguments of the kernel, so a margin that changes during training compiles nothing again. A value per anchor becomes a
column of a small table. A sum over a row (`sum(dim=1)`) may be one of the further sums that a loss returns. Any other
operation that is not element-wise raises `UnsupportedOpError`, and the caller takes another backend.

>>> from lightning_memdml import MarginLoss
>>> print(generate_terms(MarginLoss(), (), rows=64).text)
v0 = similarity * constants[0]
v1 = v0 + constants[1]
v2 = tl.maximum(v1, constants[2], propagate_nan=tl.PropagateNan.ALL)
v3 = tl.rsqrt(v2)
v4 = v2 * v3
v5 = constants[3] - v4
v6 = tl.maximum(v5, constants[4], propagate_nan=tl.PropagateNan.ALL)
v7 = v3 > constants[5]
v8 = tl.where(v7, v3, constants[4])
return v8, v6, v8
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_memdml.losses.definition import Context, LossDefinition

_NAN = "propagate_nan=tl.PropagateNan.ALL"
_ARITHMETIC = {
    "abs": "tl.abs({})",
    "add": "{} + {}",
    "addcmul": "{} + {} * {}",
    "div": "{} / {}",
    "exp": "tl.exp({})",
    "exp2": "tl.exp2({})",
    "log": "tl.log({})",
    "log2": "tl.log2({})",
    "maximum": f"tl.maximum({{}}, {{}}, {_NAN})",
    "minimum": f"tl.minimum({{}}, {{}}, {_NAN})",
    "mul": "{} * {}",
    "neg": "-{}",
    "rsqrt": "tl.rsqrt({})",
    "rsub": "{1} - {0}",
    "rtruediv": "{1} / {0}",
    "sigmoid": "tl.sigmoid({})",
    "sqrt": "tl.sqrt({})",
    "sub": "{} - {}",
}
_COMPARISONS = {"gt": "{} > {}", "ge": "{} >= {}", "lt": "{} < {}", "le": "{} <= {}"}
_LOGIC = {"and": "{} & {}", "or": "{} | {}", "invert": "~{}"}
# Other names in torch, and operator methods without their underscores (`__rmul__`).
_ALIASES = {
    "bitwise_and": "and", "bitwise_not": "invert", "bitwise_or": "or", "clamp_max": "minimum", "clamp_min": "maximum",
    "clip": "clamp", "divide": "div", "greater": "gt", "less": "lt", "logical_and": "and", "logical_not": "invert",
    "logical_or": "or", "multiply": "mul", "negative": "neg", "radd": "add", "rmul": "mul", "subtract": "sub",
    "true_divide": "div", "truediv": "div",
}  # fmt: skip


class UnsupportedOpError(Exception):
    """An operation of a loss is not element-wise, or has no translation here."""


@dataclass
class _Recorder:
    """The lines so far, and the numbers and the values per anchor that they read."""

    rows: int
    lines: list[str] = field(default_factory=list)
    constants: list[float] = field(default_factory=list)
    columns: list[Tensor] = field(default_factory=list)

    def write(self, text: str, mask: bool = False) -> Symbol:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return Symbol(self, name, mask)

    def read(self, value: object) -> str:
        """Return the name of a similarity, a number, or a value per anchor."""
        if isinstance(value, Symbol):
            return value.as_float().name
        if isinstance(value, bool | int | float):
            if float(value) not in self.constants:
                self.constants.append(float(value))
            return f"constants[{self.constants.index(float(value))}]"
        if isinstance(value, Tensor) and (value.numel() == 1 or value.shape == (self.rows, 1)):
            self.columns.append(value)
            return f"column{len(self.columns) - 1}"
        raise UnsupportedOpError(f"a value that is not a similarity, a number or a value per anchor: {value}")

    def read_mask(self, value: object) -> str:
        if not isinstance(value, Symbol) or not value.mask:
            raise UnsupportedOpError(f"a mask that is not a comparison of similarities: {value}")
        return value.name

    def do(self, name: str, *args: Any, **kwargs: Any) -> Symbol:
        """Write the line of a function or method of torch. It is in place if its name ends so, or with `out`."""
        in_place = name.endswith("_") and not name.startswith("__")
        target = kwargs.pop("out", args[0] if in_place else None)
        name = name.strip("_")
        name = _ALIASES.get(name, name)
        if name not in _OPERATIONS:
            raise UnsupportedOpError(name)
        result = _OPERATIONS[name](self, *args, **kwargs)
        if target is None:
            return result
        target.name, target.mask = result.as_float().name, False  # what it is stored in holds floats
        return target


class Symbol:
    """A block of similarities, or a result computed from it. It behaves like a tensor for element-wise operations."""

    dtype = torch.float32
    shape = ("B", "n")

    def __init__(self, recorder: _Recorder, name: str, mask: bool = False) -> None:
        self.recorder, self.name, self.mask = recorder, name, mask

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Symbol:
        recorder = next(value.recorder for value in (*args, *(kwargs or {}).values()) if isinstance(value, cls))
        return recorder.do(function.__name__, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Callable[..., Symbol]:
        if name.rstrip("_") not in {*_OPERATIONS, *_ALIASES}:
            raise UnsupportedOpError(name)
        return partial(self.recorder.do, name, self)

    def __bool__(self) -> bool:
        raise UnsupportedOpError("a condition on a whole block")

    def as_float(self) -> Symbol:
        """Return 1 and 0 in place of true and false."""
        return self.recorder.write(f"tl.where({self.name}, 1.0, 0.0)") if self.mask else self


def _operator(name: str) -> Callable[..., Symbol]:
    return lambda symbol, *others: symbol.recorder.do(name, symbol, *others)


for _name in (
    "abs", "add", "and", "ge", "gt", "invert", "le", "lt", "mul", "neg", "or", "pow", "radd", "rmul", "rsub",
    "rtruediv", "sub", "truediv",
):  # fmt: skip
    setattr(Symbol, f"__{_name}__", _operator(f"__{_name}__"))


class RowSums:
    """Sums over the rows of blocks, one column each."""

    def __init__(self, blocks: list[str]) -> None:
        self.blocks = blocks

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> RowSums:
        given = kwargs or {}
        if function is not torch.stack or (*args[1:], *given.values()) != (1,):
            raise UnsupportedOpError(f"{function.__name__} of sums over rows")
        return cls([block for sums in args[0] for block in sums.blocks])


def _formula(text: str, mask: bool = False, of_masks: bool = False) -> Callable[..., Symbol]:
    def operation(recorder: _Recorder, *args: object) -> Symbol:
        if len(args) != text.count("{"):
            raise UnsupportedOpError(f"{text} of {len(args)} arguments")
        return recorder.write(text.format(*map(recorder.read_mask if of_masks else recorder.read, args)), mask)

    return operation


def _clamp(recorder: _Recorder, block: Symbol, min: object = None, max: object = None) -> Symbol:
    block = block if min is None else recorder.do("maximum", block, min)
    return block if max is None else recorder.do("minimum", block, max)


def _full(recorder: _Recorder, block: Symbol, value: float) -> Symbol:
    return recorder.write(f"tl.zeros_like(similarity) + {recorder.read(value)}")


def _power(recorder: _Recorder, base: object, exponent: object) -> Symbol:
    if exponent == 2:
        return recorder.do("mul", base, base)
    if not isinstance(exponent, float | int) or float(exponent).is_integer():
        raise UnsupportedOpError(f"a power of {exponent}")
    # NaN below 0, as in torch.
    return recorder.write(f"tl.exp2(tl.log2({recorder.read(base)}) * {recorder.read(exponent)})")


def _sum(_: _Recorder, block: Symbol, dim: object = None) -> RowSums:
    if dim != 1:
        raise UnsupportedOpError("a sum that is not over the rows")
    return RowSums([block.as_float().name])


def _sum_negative_logs(recorder: _Recorder, block: Symbol) -> RowSums:
    return RowSums([recorder.do("neg", recorder.do("log", block)).name])


def _to(recorder: _Recorder, block: Symbol, like: object = torch.float32) -> Symbol:
    if like is not torch.float32 and not isinstance(like, Symbol):
        raise UnsupportedOpError(f"a conversion to {like}")
    return block.as_float()


def _where(recorder: _Recorder, mask: object, value: object, other: object) -> Symbol:
    names = recorder.read_mask(mask), recorder.read(value), recorder.read(other)
    return recorder.write("tl.where({}, {}, {})".format(*names))


_OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name: _formula(text) for name, text in _ARITHMETIC.items()},
    **{name: _formula(text, mask=True) for name, text in _COMPARISONS.items()},
    **{name: _formula(text, mask=True, of_masks=True) for name, text in _LOGIC.items()},
    "clamp": _clamp,
    "clone": lambda recorder, block: Symbol(recorder, block.name, block.mask),
    "empty_like": partial(_full, value=0.0),
    "expand_as": lambda recorder, value, block: recorder.write(f"tl.zeros_like(similarity) + {recorder.read(value)}"),
    "float": _to,
    "full_like": _full,
    "masked_fill": lambda recorder, block, mask, value: _where(recorder, mask, value, block),
    "ones_like": partial(_full, value=1.0),
    "pow": _power,
    "relu": lambda recorder, block: recorder.do("maximum", block, 0.0),
    "sum": _sum,
    "sum_negative_logs": _sum_negative_logs,
    "square": lambda recorder, block: recorder.do("mul", block, block),
    "threshold": lambda recorder, block, edge, value: _where(recorder, recorder.do("gt", block, edge), block, value),
    "to": _to,
    "type_as": _to,
    "where": _where,
    "zeros_like": partial(_full, value=0.0),
}


class Terms(NamedTuple):
    """The `negative_terms` of one loss as the text of a kernel.

    Attributes:
        text: Lines over `similarity`, `constants[k]` and `column<k>` that end in
            `return weights, values, sums`. Where there are no values or sums, the weights are returned in their place.
            Sums are of shape `(anchors, padded_sums)`.
        constants: The numbers that the lines read.
        columns: The values per anchor that the lines read, each of one element or `(B, 1)`.
        has_values: Whether the loss has values.
        num_sums: How many further sums S the loss has.
        threshold: What `LossDefinition.negative_threshold` returned, a number or `(B,)`.
    """

    text: str
    constants: tuple[float, ...]
    columns: list[Tensor]
    has_values: bool
    num_sums: int
    threshold: Tensor | float = -math.inf

    @property
    def padded_sums(self) -> int:
        """The power of two that is not below S."""
        return 1 << max(0, self.num_sums - 1).bit_length()


def generate_terms(loss: LossDefinition, context: Context, rows: int) -> Terms:
    """Translate the `negative_terms` of a loss.

    Args:
        loss: A loss of one part.
        context: What its `PairLoss.context` returned.
        rows: Number of anchors B.

    Raises:
        UnsupportedOpError: If they are not element-wise.
    """
    if loss.hardest_negatives is not None:
        raise UnsupportedOpError("the hardest negatives of the whole row")
    recorder = _Recorder(rows)
    similarity: Any = Symbol(recorder, "similarity")
    try:
        weights, values, sums = loss.negative_terms(similarity, context)
    except Exception as error:  # anything a symbol does not support; torch then computes it, or raises its own error
        raise UnsupportedOpError(str(error)) from error
    if not isinstance(sums, RowSums | None):
        raise UnsupportedOpError("further sums that are not over the rows")
    if not isinstance(weights, Symbol) or not isinstance(values, Symbol | None):
        raise UnsupportedOpError("weights that do not depend on the similarity")
    names = recorder.read(weights), recorder.read(weights if values is None else values)
    blocks = [] if sums is None else sums.blocks
    padded = 1 << max(0, len(blocks) - 1).bit_length()
    lines = [f"place = tl.arange(0, {padded})[None, :]", "sums = tl.where(place < 0, 0.0, 0.0)"] if blocks else []
    lines += [
        f"sums = sums + tl.where(place == {k}, tl.sum({block}, 1)[:, None], 0.0)" for k, block in enumerate(blocks)
    ]
    last = "sums" if blocks else names[0]
    text = "\n".join([*recorder.lines, *lines, f"return {names[0]}, {names[1]}, {last}"])
    numbers, threshold = tuple(recorder.constants), loss.negative_threshold(context)
    return Terms(text, numbers, recorder.columns, values is not None, len(blocks), threshold)
