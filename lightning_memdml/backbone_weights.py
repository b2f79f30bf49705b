"""The weights that a backbone starts from, in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

WEIGHT_SUFFIXES = {".pt", ".pth", ".ckpt", ".bin"}
# Files of a whole classifier carry it under one of these names; auxiliary classifiers go as well.
CLASSIFIERS = ("fc.", "classifier.", "head.", "heads.", "aux1.", "aux2.", "AuxLogits.")


def weights_file(weights: str | None) -> Path | None:
    """Return the path if `weights` names a file, `None` if it is a torchvision enum."""
    if weights is None:
        return None
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    if path.suffix in WEIGHT_SUFFIXES or len(path.parts) > 1:
        raise FileNotFoundError(
            f"Expected the backbone's weights in the file {weights} but it does not exist. Check the path, "
            "or pass DEFAULT."
        )
    return None


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict, in which only the classifier may be additional."""
    state = _read_state(path)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # one line per shape that differs
        first, *others = str(error).splitlines()[1:]
        raise ValueError(
            f"Expected weights of {type(model).__name__} in {path} but got others: {first.strip()} And {len(others)} "
            "more. Pass the weights of this network."
        ) from error
    unknown = [key for key in unexpected if not key.startswith(CLASSIFIERS)]
    if missing or unknown:
        raise ValueError(
            f"Expected weights of {type(model).__name__} in {path} but {len(missing)} entries are missing "
            f"({', '.join(missing[:3]) or 'none'}) and {len(unknown)} are unknown "
            f"({', '.join(unknown[:3]) or 'none'}). Pass the weights of this network."
        )


def _read_state(path: Path) -> Mapping[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"Expected weights in {path} but it cannot be read: it is damaged, or holds more than tensors, which "
            "may be code and is not loaded. Save `model.state_dict()` alone."
        ) from error
    if isinstance(state, Mapping):
        state = state.get("state_dict", state)
    if not isinstance(state, Mapping):
        raise ValueError(
            f"Expected a state dict in {path} but got a {type(state).__name__}. Save `model.state_dict()`."
        )
    return state
