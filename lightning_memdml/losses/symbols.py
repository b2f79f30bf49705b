"""Reads what a loss does to a negative's similarity as the text of a GPU kernel.

A loss says once, in torch, what its negatives weigh (:meth:`PairLoss.negative_terms`). Here those same lines run on a
:class:`Symbol` instead of a block of similarities; each operation on it writes one line of Triton. Numbers become
arguments of the kernel, so a margin that moves while training compiles nothing anew, and what stands once per anchor
becomes a column of a small table. Lines that are not element by element have no such text and raise
:class:`NoKernelError`; the caller then takes the way through torch.

>>> from lightning_memdml import BinomialDevianceLoss
>>> print(read_terms(BinomialDevianceLoss(), (), rows=64).text)
v0 = similarity - constants[0]
v1 = v0 * constants[1]
v2 = tl.sigmoid(v1)
v3 = tl.maximum(v1, constants[2], propagate_nan=tl.PropagateNan.ALL)
v4 = constants[3] - v2
v5 = tl.maximum(v2, v4, propagate_nan=tl.PropagateNan.ALL)
v6 = tl.log(v5)
v7 = v3 - v6
v8 = v2 * constants[1]
return v8, v7
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_memdml.losses.pair_loss import Context, PairLoss

_NAN = "propagate_nan=tl.PropagateNan.ALL"
_ARITHMETIC = {
    "abs": "tl.abs({})",
    "add": "{} + {}",
    "div": "{} / {}",
    "exp": "tl.exp({})",
    "exp2": "tl.exp2({})",
    "log": "tl.log({})",
    "log2": "tl.log2({})",
    "maximum": f"tl.maximum({{}}, {{}}, {_NAN})",
    "minimum": f"tl.minimum({{}}, {{}}, {_NAN})",
    "mul": "{} * {}",
    "neg": "-{}",
    "rsub": "{1} - {0}",
    "rtruediv": "{1} / {0}",
    "sigmoid": "tl.sigmoid({})",
    "sqrt": "tl.sqrt({})",
    "sub": "{} - {}",
}
_COMPARISONS = {"gt": "{} > {}", "ge": "{} >= {}", "lt": "{} < {}", "le": "{} <= {}"}
_LOGIC = {"and": "{} & {}", "or": "{} | {}", "invert": "~{}"}
# Torch's other names for these, and for an operator's method without its underscores (`__rmul__`).
_SAME = {
    "bitwise_and": "and", "bitwise_not": "invert", "bitwise_or": "or", "clamp_max": "minimum", "clamp_min": "maximum",
    "clip": "clamp", "divide": "div", "greater": "gt", "less": "lt", "logical_and": "and", "logical_not": "invert",
    "logical_or": "or", "multiply": "mul", "negative": "neg", "radd": "add", "rmul": "mul", "subtract": "sub",
    "true_divide": "div", "truediv": "div",
}  # fmt: skip


class NoKernelError(Exception):
    """These lines cannot be said element by element."""


@dataclass
class _Recorder:
    """What was written so far: lines, and the numbers and the anchors' own values that they read."""

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
        raise NoKernelError(f"neither a similarity, a number nor a value per anchor: {value}")

    def read_mask(self, value: object) -> str:
        if not isinstance(value, Symbol) or not value.mask:
            raise NoKernelError(f"no comparison of similarities: {value}")
        return value.name

    def do(self, name: str, *args: Any, **kwargs: Any) -> Symbol:
        """Write what a function or method of torch does; in place, if its name or ``out`` says so."""
        in_place = name.endswith("_") and not name.startswith("__")
        target = kwargs.pop("out", args[0] if in_place else None)
        name = name.strip("_")
        name = _SAME.get(name, name)
        if name not in _OPERATIONS:
            raise NoKernelError(name)
        result = _OPERATIONS[name](self, *args, **kwargs)
        if target is None:
            return result
        target.name, target.mask = result.as_float().name, False  # what it is stored in holds floats
        return target


class Symbol:
    """Stands for a block of similarities, or what became of it, and behaves like a tensor as far as kernels reach."""

    dtype = torch.float32

    def __init__(self, recorder: _Recorder, name: str, mask: bool = False) -> None:
        self.recorder, self.name, self.mask = recorder, name, mask

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Symbol:
        recorder = next(value.recorder for value in (*args, *(kwargs or {}).values()) if isinstance(value, cls))
        return recorder.do(function.__name__, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Callable[..., Symbol]:
        if name.rstrip("_") not in {*_OPERATIONS, *_SAME}:
            raise NoKernelError(name)
        return partial(self.recorder.do, name, self)

    def __bool__(self) -> bool:
        raise NoKernelError("a decision about a whole block")

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


def _formula(text: str, mask: bool = False, of_masks: bool = False) -> Callable[..., Symbol]:
    def operation(recorder: _Recorder, *args: object) -> Symbol:
        if len(args) != text.count("{"):
            raise NoKernelError(f"{text} of {len(args)} arguments")
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
        raise NoKernelError(f"a power of {exponent}")
    # NaN below 0, as in torch.
    return recorder.write(f"tl.exp2(tl.log2({recorder.read(base)}) * {recorder.read(exponent)})")


def _to(recorder: _Recorder, block: Symbol, like: object = torch.float32) -> Symbol:
    if like is not torch.float32 and not isinstance(like, Symbol):
        raise NoKernelError(f"another type, {like}")
    return block.as_float()


def _where(recorder: _Recorder, mask: object, value: object, other: object) -> Symbol:
    names = recorder.read_mask(mask), recorder.read(value), recorder.read(other)
    return recorder.write("tl.where({}, {}, {})".format(*names))


_OPERATIONS: dict[str, Callable[..., Symbol]] = {
    **{name: _formula(text) for name, text in _ARITHMETIC.items()},
    **{name: _formula(text, mask=True) for name, text in _COMPARISONS.items()},
    **{name: _formula(text, mask=True, of_masks=True) for name, text in _LOGIC.items()},
    "clamp": _clamp,
    "clone": lambda recorder, block: Symbol(recorder, block.name, block.mask),
    "empty_like": partial(_full, value=0.0),
    "float": _to,
    "full_like": _full,
    "masked_fill": lambda recorder, block, mask, value: _where(recorder, mask, value, block),
    "ones_like": partial(_full, value=1.0),
    "pow": _power,
    "relu": lambda recorder, block: recorder.do("maximum", block, 0.0),
    "square": lambda recorder, block: recorder.do("mul", block, block),
    "threshold": lambda recorder, block, edge, value: _where(recorder, recorder.do("gt", block, edge), block, value),
    "to": _to,
    "type_as": _to,
    "where": _where,
    "zeros_like": partial(_full, value=0.0),
}


class Terms(NamedTuple):
    """The negatives' terms of one loss as the text of a kernel.

    Attributes:
        text: Lines over ``similarity``, ``constants[k]`` and ``column<k>`` that end in
            ``return weights, values``; without values, the weights take their place.
        constants: The numbers in it.
        columns: The anchors' values in it, each of one element or ``(B, 1)``.
        has_values: Whether the loss has values.
    """

    text: str
    constants: tuple[float, ...]
    columns: list[Tensor]
    has_values: bool


def read_terms(loss: PairLoss, context: Context, rows: int) -> Terms:
    """Return what a loss says of its negatives, as text.

    Args:
        loss: Any pair loss.
        context: What its :meth:`~PairLoss.context` returned.
        rows: Number of anchors B.

    Raises:
        NoKernelError: If it is not said element by element.
    """
    recorder = _Recorder(rows)
    similarity: Any = Symbol(recorder, "similarity")
    try:
        weights, values, sums = loss.negative_terms(similarity, context)
    except Exception as error:  # whatever a symbol cannot bear: with a tensor it goes well, or fails in its own words
        raise NoKernelError(str(error)) from error
    if sums is not None:
        raise NoKernelError("further sums")
    if not isinstance(weights, Symbol) or not isinstance(values, Symbol | None):
        raise NoKernelError("weights that do not depend on the similarity")
    names = recorder.read(weights), recorder.read(weights if values is None else values)
    text = "\n".join([*recorder.lines, f"return {names[0]}, {names[1]}"])
    return Terms(text, tuple(recorder.constants), recorder.columns, values is not None)
