"""Checks of arguments that several parts of the package share. Imports torch only.

`check_rows` is the one check of embeddings and of the integers that belong to them:

- losses call it through `check_pairs`;
- a memory checks a batch with it before it stores the batch;
- retrieval passes the names of its own arguments, such as `"gallery_embeddings"`, and adds what only it needs (finite
  rows, indices of at least 0).

`check_types` checks all other arguments by their annotations: a constructor calls it first, so that a wrong one is
named there, and not at its first use.

`check_rows` returns nothing: the caller converts afterwards (`.float()`, `.to(device, torch.int64)`). It reads types
and shapes only, never a value, so the host does not wait for a GPU.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

#: Integers that torch 2 stores, but compares with no others.
INCOMPARABLE = (torch.uint16, torch.uint32, torch.uint64)
#: By how much an embedding may be longer than 1. Normalisation in bfloat16 is off by up to 4e-3.
UNIT_TOLERANCE = 1e-2


def check_rows(name: str, embeddings: Tensor, **columns: Tensor) -> None:
    """Check embeddings, and the tensors that have one integer for each of them, such as labels and indices.

    Args:
        name: The name of the embeddings in the caller, for the message.
        embeddings: Must be a floating-point tensor `(B, D)`. D is at least 1, or 0 where there are no rows.
        **columns: By their names in the caller. Each must be an integer tensor `(B,)`.

    Raises:
        TypeError: If an argument is not a tensor, or of a wrong dtype.
        ValueError: If an argument has another shape.

    Example:
        >>> check_rows("embeddings", torch.ones(2, 3), labels=torch.tensor([0, 1]))
        >>> check_rows("embeddings", torch.ones(2, 3), labels=torch.tensor([[0], [1]]))
        Traceback (most recent call last):
        ValueError: Expected `labels` of shape (2,) but got (2, 1). Pass `labels.squeeze(1)`.
    """
    if not isinstance(embeddings, Tensor):
        raise TypeError(
            f"Expected `{name}` to be a tensor of shape (B, D) but got {type(embeddings).__name__}. "
            f"Pass `torch.as_tensor({name})`."
        )
    if embeddings.ndim != 2 or (embeddings.shape[0] and not embeddings.shape[1]):
        remedy = f"Pass one vector per image, for example `{name}.flatten(1)`."
        raise ValueError(
            f"Expected `{name}` of shape (B, D) with D of at least 1 but got {tuple(embeddings.shape)}. {remedy}"
        )
    if not embeddings.is_floating_point():
        raise TypeError(
            f"Expected `{name}` of a floating-point dtype but got {embeddings.dtype}. Pass `{name}.float()`."
        )
    rows = embeddings.shape[0]
    for name, column in columns.items():
        if not isinstance(column, Tensor):
            raise TypeError(
                f"Expected `{name}` to be an integer tensor of shape ({rows},) but got {type(column).__name__}. "
                f"Pass `torch.as_tensor({name})`."
            )
        if tuple(column.shape) != (rows,):
            is_matrix = tuple(column.shape) == (rows, 1)
            remedy = f"`{name}.squeeze(1)`" if is_matrix else "one integer for each row of the embeddings"
            raise ValueError(f"Expected `{name}` of shape ({rows},) but got {tuple(column.shape)}. Pass {remedy}.")
        if column.is_floating_point() or column.is_complex() or column.dtype == torch.bool:
            raise TypeError(f"Expected `{name}` of an integer dtype but got {column.dtype}. Pass `{name}.long()`.")


def check_pairs(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    indices: Tensor | None,
    ref_indices: Tensor | None,
) -> None:
    """Check the arguments of a pair loss, each by itself and against the others.

    The length of the embeddings is checked on the CPU only, and that of the references not at all: it would cost a
    pass over the memory, or make the host wait for a GPU. NaN passes, since the loss scaling of float16 training
    has to see it.

    Args:
        embeddings: Anchors, `(B, D)`, of unit length.
        labels: Class of each anchor, `(B,)`.
        ref_embeddings: References, `(M, D)`.
        ref_labels: Class of each reference, `(M,)`.
        indices: Image of each anchor, `(B,)`.
        ref_indices: Image of each reference, `(M,)`.

    Raises:
        TypeError: If a tensor is of a wrong dtype, or something is not a tensor.
        ValueError: If shapes or devices differ, an argument is missing, or an embedding is longer than 1.
    """
    if (ref_embeddings is None) != (ref_labels is None):
        given, missing = ("embeddings", "labels") if ref_labels is None else ("labels", "embeddings")
        raise ValueError(
            f"Expected `ref_embeddings` and `ref_labels` together but got `ref_{given}` alone. "
            f"Pass `ref_{missing}` too."
        )
    if ref_embeddings is None and ref_indices is not None:
        raise ValueError(
            "Expected `ref_indices` together with `ref_embeddings` but got `ref_indices` alone. "
            "Pass `indices` for the images of the batch."
        )
    check_rows("embeddings", embeddings, labels=labels, **({} if indices is None else {"indices": indices}))
    if ref_embeddings is not None and ref_labels is not None:
        known = {} if ref_indices is None else {"ref_indices": ref_indices}
        check_rows("ref_embeddings", ref_embeddings, ref_labels=ref_labels, **known)
    if ref_embeddings is not None and ref_embeddings.shape[0] and ref_embeddings.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"Expected `ref_embeddings` of shape (M, {embeddings.shape[1]}), as wide as `embeddings`, but got "
            f"{tuple(ref_embeddings.shape)}. Pass references of the same embedding layer."
        )
    others = {"labels": labels, "ref_embeddings": ref_embeddings, "ref_labels": ref_labels, "indices": indices}
    for name, tensor in {**others, "ref_indices": ref_indices}.items():
        if tensor is not None and tensor.device != embeddings.device:
            raise ValueError(
                f"Expected `{name}` on {embeddings.device}, like `embeddings`, but got {tensor.device}. Pass "
                f"`{name}.to(embeddings.device)`."
            )
        if tensor is not None and tensor.dtype in INCOMPARABLE:
            raise TypeError(
                f"Expected `{name}` of a signed integer dtype, or uint8, but got {tensor.dtype}. Pass `{name}.long()`."
            )
    if embeddings.device.type != "cpu" or embeddings.numel() == 0 or torch.compiler.is_compiling():
        return
    longest = float(torch.linalg.vector_norm(embeddings.detach().float(), dim=1).max())
    if longest > 1 + UNIT_TOLERANCE:
        raise ValueError(
            "Expected `embeddings` of unit length (similarities in [-1, 1]) but got a longest row of length "
            f"{longest:.4g}. Pass `torch.nn.functional.normalize(embeddings.float(), dim=1)`."
        )


def refuse_renamed(kind: type, renamed: Mapping[str, str]) -> None:
    """Refuse a subclass that sets a name of an earlier version, which nothing would read.

    Args:
        kind: The subclass.
        renamed: The present name of each earlier one.

    Raises:
        TypeError: If the subclass sets an earlier name.
    """
    for old, new in renamed.items():
        if old in vars(kind):
            raise TypeError(
                f"Expected `{new}` in the class {kind.__name__} but got `{old}`, its name in an earlier version. "
                f"Rename it to `{new}`."
            )


def check_similarity(name: str, value: float) -> float:
    """Return `value` if it is a cosine similarity, from -1 to 1.

    Raises:
        ValueError: If it is not.
    """
    if not -1 <= value <= 1:
        raise ValueError(
            f"Expected `{name}` to be a cosine similarity in [-1, 1] but got {value}. Pass a number in this range."
        )
    return value


def check_finite(name: str, value: float) -> float:
    """Return `value` if it is a finite number.

    Raises:
        ValueError: If it is NaN or infinite.
    """
    if not math.isfinite(value):
        raise ValueError(f"Expected `{name}` to be a finite number but got {value}. Pass another number.")
    return value


def check_count(name: str, value: int) -> int:
    """Return `value` if it is at least 1.

    Raises:
        ValueError: If it is not.
    """
    if not value >= 1:
        raise ValueError(f"Expected `{name}` of at least 1 but got {value}. Pass 1 or more.")
    return value


def check_not_negative(name: str, value: float | None) -> None:
    """Raise a `ValueError` if a number is given that is below 0."""
    if value is not None and not value >= 0:
        raise ValueError(f"Expected `{name}` of at least 0 but got {value}. Pass 0 or more.")


def check_positive(name: str, value: float) -> float:
    """Return `value` if it is above 0 and finite.

    Raises:
        ValueError: If it is not.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"Expected `{name}` above 0 but got {value}. Pass a positive number.")
    return value


def check_types(function: Callable[..., Any], given: Mapping[str, Any], *own: str) -> None:
    """Check the arguments of a function by their annotations, as its first statement: with `locals()`.

    Whole numbers are numbers, and a path is a string. 0 and 1 stand for False and True. NaN is no number. Tensors, and
    annotations that cannot be checked, are left to the function.

    Args:
        function: The function, such as `Class.__init__`.
        given: Its arguments by their names; other names are ignored.
        *own: Names of arguments that the function checks itself, as it has more to say about them.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If it is NaN, or a string other than those that are allowed.

    Example:
        >>> def embed(dim: int, pooling: Literal["average", "gem"] | None = None) -> None:
        ...     check_types(embed, locals())
        >>> embed(8)
        >>> embed(1.5)
        Traceback (most recent call last):
        TypeError: Expected `dim` to be a whole number but got 1.5. Pass one.
        >>> embed(8, "sum")
        Traceback (most recent call last):
        ValueError: Expected `pooling` to be one of average, gem or None but got 'sum'. Pass one of these.
    """
    for name, hint in _annotations(function).items():
        if name in own or name not in given:
            continue
        if float in _parts(hint) and isinstance(given[name], float) and math.isnan(given[name]):
            check_finite(name, given[name])
        if _fits(given[name], hint):
            continue
        value, kinds = given[name], _in_words(hint)
        words = " or ".join([", ".join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds)
        is_name = isinstance(value, str) and any(get_origin(one) is Literal for one in _parts(hint))
        shown = repr(value) if isinstance(value, str | int | float | list | tuple | None) else type(value).__name__
        several = len(kinds) > 1 or "one of" in words
        raise (ValueError if is_name else TypeError)(
            f"Expected `{name}` to be {words} but got {shown:.80}. Pass one{' of these' if several else ''}."
        )


@cache
def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(function).items() if name != "return"}


def _parts(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says; True where it says nothing that can be checked."""
    parts, origin = _parts(hint), get_origin(hint)
    if len(parts) > 1:
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return isinstance(value, str | int) and value in get_args(hint)
    if origin is Callable:
        return callable(value)
    if origin is not None:
        return _holds(value, origin, get_args(hint))
    if hint in SIMPLE:
        return SIMPLE[hint][1](value)
    checked = isinstance(hint, type) and hint not in (Any, Tensor) and not getattr(hint, "_is_protocol", False)
    return not checked or isinstance(value, hint)


def _holds(value: Any, origin: type, items: tuple[Any, ...]) -> bool:
    """Whether a value is a collection, and its items are what its annotation says; True for other generic types."""
    if not issubclass(origin, Iterable):
        return True
    if isinstance(value, str) or not isinstance(value, origin if issubclass(origin, Mapping) else object):
        return False
    if not hasattr(value, "__iter__") or isinstance(value, Tensor):
        return isinstance(value, Tensor)
    return not isinstance(value, list | tuple) or len(items) != 1 or all(_fits(item, items[0]) for item in value)


def _is_bool(value: Any) -> bool:
    return type(value).__name__ in ("bool", "bool_") or (type(value) is int and value in (0, 1))


#: Annotation -> what it is in words, and whether a value is that.
SIMPLE: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("True or False", _is_bool),
    int: ("a whole number", lambda value: isinstance(value, Integral) and not isinstance(value, bool)),
    float: ("a number", lambda value: isinstance(value, Real) and not isinstance(value, bool)),
    str: ("a string", lambda value: isinstance(value, str | os.PathLike)),
    NoneType: ("None", lambda value: value is None),
}


def _in_words(hint: Any) -> list[str]:
    """Return what an annotation allows, None last."""
    words: list[str] = []
    for part in sorted(_parts(hint), key=lambda one: one is NoneType):
        origin, items = get_origin(part), get_args(part)
        if part in SIMPLE:
            words.append(SIMPLE[part][0])
        elif origin is Literal:
            words.append(f"one of {', '.join(map(str, items))}")
        elif origin is Callable:
            words.append("a function")
        elif origin is not None:
            of = "".join(_in_words(items[0])).removeprefix("a ") if items else ""
            words.append("a dictionary" if issubclass(origin, Mapping) else f"a list, each item a {of}")
        else:
            words.append(f"a {getattr(part, '__name__', part)}")
    return list(dict.fromkeys(words))
