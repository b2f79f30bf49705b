"""How much memory a file that somebody else may have made can ask for: bounded before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MAX_BYTES = 8_000_000_000  # of a network, and of batches and memories together; the largest of torchvision takes 2.6e9
SIDES = ("image_size", "size", "max_size", "min_size", "target_size")


def requested_bytes(config: dict[str, Any]) -> dict[str, int]:
    """Return the bytes that batches and memories of a configuration need, by the key that asks for them.

    Args:
        config: What `lightning_memdml.trust.allowed_config` has found.

    Example:
        >>> data = {"class_path": "FolderDataModule", "init_args": {"batch_size": 64, "image_size": 224}}
        >>> requested_bytes({"data": data})
        {'data.batch_size': 38535168}
    """
    found: dict[str, int] = {}
    data = (config.get("data") or {}).get("init_args", {})
    side = max([_whole(data.get("image_size"), 224), *_sides(data)])
    for name in ("batch_size", "eval_batch_size"):
        if name in data:
            found[f"data.{name}"] = 4 * 3 * side**2 * _whole(data[name], 1)
    dim = _whole((config.get("model") or {}).get("embedding_dim"), 128)
    callbacks = (config.get("trainer") or {}).get("callbacks") or []
    for place, callback in enumerate(callbacks if isinstance(callbacks, list) else [callbacks]):
        options = callback.get("init_args", {})
        memory = (options.get("memory") or {}).get("init_args", {})
        rows = max(_whole(options.get("size"), 0), _whole(memory.get("size"), 0))
        if rows > 1:
            found[f"trainer.callbacks[{place}].size"] = 4 * dim * rows
    return found


def _whole(value: Any, otherwise: int) -> int:
    return int(value) if isinstance(value, int | float) and isfinite(value) else otherwise


def _sides(part: Any, name: str = "") -> Iterator[int]:
    """Yield every number of pixels in the options of transforms."""
    if isinstance(part, dict):
        for key, value in part.items():
            yield from _sides(value, str(key))
    elif isinstance(part, list | tuple):
        for value in part:
            yield from _sides(value, name)
    elif name in SIDES:
        yield _whole(part, 0)


def limited_tensors(source: str, *, trust: bool = False) -> AbstractContextManager[Any]:
    """Return a block in which a file builds its network, with a limit on its tensors unless the user trusts it."""
    return nullcontext() if trust else LimitedTensors(source)


class LimitedTensors(TorchFunctionMode):
    """Refuses tensors that need more memory than a limit, before they are allocated.

    Every function of torch that is called in the block is called on the device `meta` first, which computes shapes and
    allocates nothing. New tensors are added up. It holds for the thread that it was entered in.

    Args:
        source: The file that is built, for the error.
        limit: The limit in bytes.

    Raises:
        ValueError: In the block, if a tensor is too large.

    Example:
        >>> with LimitedTensors("last.ckpt", limit=1000):
        ...     layer = torch.nn.Linear(2, 3)
        ...     layer = torch.nn.Linear(20_000, 10_000)
        Traceback (most recent call last):
        ValueError: Expected last.ckpt to build tensors of at most 0.0 GB but got 0.8 GB. If you trust the maker of ...
    """

    def __init__(self, source: str, limit: int = MAX_BYTES) -> None:
        super().__init__()
        self.source = source
        self.limit = limit
        self.total = 0
        self.refusal: ValueError | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch if its result fits."""
        options = kwargs or {}
        is_new = not any(True for _ in tensors_in((args, options)))
        needed = _bytes_of(func, args, options, is_new)
        self.total += needed if is_new else 0
        if max(needed, self.total) > self.limit:
            self.refusal = ValueError(
                f"Expected {self.source} to build tensors of at most {self.limit / 1e9:.1f} GB but got "
                f"{max(needed, self.total) / 1e9:.1f} GB. If you trust the maker of this file, pass `--trust` (in "
                "Python `trust=True`)."
            )
            raise self.refusal
        return func(*args, **options)

    def __exit__(self, *error: Any) -> None:
        """Raise the refusal itself, which the parser may have put among other reasons."""
        super().__exit__(*error)
        if self.refusal is not None:
            raise self.refusal


def _bytes_of(func: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], is_new: bool) -> int:
    """Return the bytes of the result of a call, 0 if the device `meta` cannot compute it."""
    if is_new:
        options = {**{name: value for name, value in options.items() if name != "generator"}, "device": "meta"}
    # Many functions have no result to compute there, or take no device: these allocate nothing.
    with suppress(Exception), torch.no_grad():
        return sum(tensor.nbytes for tensor in tensors_in(func(*_on_meta(args), **_on_meta(options))))
    return 0


def tensors_in(part: Any) -> Iterator[Tensor]:
    """Yield the tensors in dictionaries, lists and tuples, each of which may hold itself."""
    left, seen = [part], set()
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, dict) else value


def _on_meta(part: Any) -> Any:
    """Return a copy of arguments in which no tensor has memory."""
    if isinstance(part, Tensor):
        return part.detach().to("meta")
    if isinstance(part, dict):
        return {name: _on_meta(value) for name, value in part.items()}
    return type(part)(map(_on_meta, part)) if type(part) in (list, tuple) else part
