"""Networks of timm by name, and how images are prepared for each."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "timm:"
INTERPOLATIONS = ("bilinear", "bicubic")


class FeatureMap(nn.Module):
    """A network of timm up to its last features, before its pooling: a map `(B, F, H, W)`, or tokens `(B, N, F)`.

    Args:
        network: A network of timm, which has `forward_features`.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.channels_last = str(getattr(network, "output_fmt", "NCHW")) == "NHWC"

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to features."""
        features = self.network.forward_features(images)
        return features.permute(0, 3, 1, 2) if self.channels_last else features


def build_timm_network(backbone: str, pretrained: bool = False) -> tuple[Any, int]:
    """Return a network of timm without its classifier, and the width of its pooled features.

    A vision transformer takes images of any size that its patches divide, if timm can build it so.

    Args:
        backbone: `timm:` and a name of timm's list, with or without the tag of its weights: `timm:resnet18.a1_in1k`.
        pretrained: Download timm's weights.

    Raises:
        ImportError: If timm is not installed.
        ValueError: If the name is not in timm's list, or there are no weights for it.
        ConnectionError: If the weights cannot be downloaded.
    """
    timm, name = _timm(), backbone.removeprefix(PREFIX)
    _check_name(timm, name)
    if pretrained and not timm.is_model_pretrained(name):
        raise ValueError(f"Expected pretrained weights of {backbone} but timm has none. Pass a file, or no `weights`.")
    options: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0}
    try:
        try:
            network = timm.create_model(name, dynamic_img_size=True, **options)
        except TypeError:  # a network without positions takes any size, and not this option
            network = timm.create_model(name, **options)
    except Exception as error:
        if not pretrained:
            raise
        # timm downloads through whichever library is installed, and each has errors of its own.
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ConnectionError(
            f"Expected to download the weights of {backbone} but got {type(error).__name__}: {reason}. "
            "Pass a file as `weights`, or none to start from random ones."
        ) from error
    return network, int(getattr(network, "head_hidden_size", None) or network.num_features)


def preprocessing_of_timm(backbone: nn.Module | str) -> dict[str, Any]:
    """Return how images are prepared for a network of timm, as options of a data module; empty for other networks.

    Args:
        backbone: `timm:` and a name, or a network that timm has made.

    Raises:
        ImportError: If timm is needed and not installed.

    Example:
        >>> preprocessing_of_timm("resnet18")
        {}
    """
    if isinstance(backbone, str):
        if not backbone.startswith(PREFIX):
            return {}
        timm, name = _timm(), backbone.removeprefix(PREFIX)
        _check_name(timm, name)
        found = timm.get_pretrained_cfg(name)
        config = {} if found is None else found.to_dict()
    else:
        config = getattr(getattr(backbone, "network", backbone), "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not config.get("mean"):
        return {}
    interpolation = str(config.get("interpolation"))
    return {
        "image_size": int(config["input_size"][-1]),
        "mean": [float(value) for value in config["mean"]],
        "std": [float(value) for value in config["std"]],
        "interpolation": interpolation if interpolation in INTERPOLATIONS else INTERPOLATIONS[0],
        "crop_pct": float(config.get("crop_pct") or 0.875),
    }


def describe_timm_network(network: Any) -> dict[str, Any] | None:
    """Return how a network of timm is made again, or None if it is of another kind or was made with more options.

    Args:
        network: What `timm.create_model(NAME, num_classes=0)` returned.
    """
    config = getattr(network, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, Mapping) else None
    if not isinstance(name, str) or not type(network).__module__.startswith("timm."):
        return None
    arguments = {"model_name": name, "num_classes": 0}
    with torch.device("meta"):
        again = _timm().create_model(**arguments)
    shapes = [{key: value.shape for key, value in made.state_dict().items()} for made in (network, again)]
    if shapes[0] != shapes[1] or repr(network) != repr(again):
        return None
    return {"class_path": "timm.create_model", "init_args": arguments}


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            'Expected timm for a `timm:` backbone but it is not installed. `pip install "lightning-memdml[timm]"`.'
        ) from error
    return timm


def _check_name(timm: Any, name: str) -> None:
    """Refuse what is not in timm's list, and so every name that timm would look up elsewhere (`hf-hub:`)."""
    names = timm.list_models()
    base, _, tag = name.partition(".")
    if base in names and (not tag or name in timm.list_pretrained(f"{base}.*")):
        return
    close = get_close_matches(name, [*names, *timm.list_pretrained(f"{base}.*")], n=1)
    raise ValueError(
        f"Expected the name of a network in timm's list but got {PREFIX + name!r}."
        f"{f' Did you mean {PREFIX + close[0]!r}?' if close else ' `timm.list_models()` has them.'}"
    )
