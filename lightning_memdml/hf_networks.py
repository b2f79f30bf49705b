"""Networks of Hugging Face by name: their vision part, its pooled features, and how images are prepared for each."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

HF_PREFIX = "hf:"
Output = Literal["pooled", "token", "features"]
# Image encoders whose architecture numbers and a few words describe. A file may name these, and nothing else.
MODEL_TYPES = (
    *("beit", "bit", "clip_vision_model", "convnext", "convnextv2", "data2vec-vision", "deit", "dinov2"),
    *("dinov2_with_registers", "dinov3_convnext", "dinov3_vit", "efficientnet", "focalnet", "hiera", "ijepa"),
    *("mobilenet_v1", "mobilenet_v2", "mobilevit", "mobilevitv2", "poolformer", "pvt", "pvt_v2", "regnet", "resnet"),
    *("siglip_vision_model", "swiftformer", "swin", "swinv2", "vit", "vit_msn"),
)
# The options of an architecture that are words; all others are numbers, or lists of numbers.
WORDS = ("hidden_act", "pooler_act", "hidden_norm", "pooling_type", "layer_type", "global_padding", "embedding_type")
WORD = r"[a-z0-9_]{1,40}"
# Of no effect on the features.
IGNORED = (
    *("transformers_version", "_name_or_path", "architectures", "problem_type", "dtype", "torch_dtype", "model_type"),
    *("id2label", "label2id", "stage_names", "out_features", "out_indices", "encoder_stride", "task_specific_params"),
    *("auto_map", "attn_implementation", "image_processor_type", "output_hidden_states", "output_attentions"),
    *("return_dict", "chunk_size_feed_forward", "is_encoder_decoder"),
)
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers
DEFAULT_SIDE = 224


class HuggingFaceModel(nn.Module):
    """An image encoder of `transformers`, built from its architecture, with random weights.

    Args:
        config: The `model_type`, and options of its configuration: numbers, lists of numbers, and a few words.
        preprocessing: How images are prepared for it, as options of a data module.
        output: `pooled` for the model's own pooled output (or the mean of its last features, if it has none), `token`
            for its first token, `features` for the last features: tokens `(B, N, F)` or a map `(B, F, H, W)`.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the architecture is not one of those that can be built.
    """

    def __init__(
        self, config: dict[str, Any], preprocessing: dict[str, Any] | None = None, output: Output = "pooled"
    ) -> None:
        super().__init__()
        transformers = _transformers()
        options = dict(config)
        kind = options.pop("model_type", None)
        if kind not in MODEL_TYPES:
            raise ValueError(
                f"Expected an image encoder of {', '.join(MODEL_TYPES)} but got {kind!r}. Load it in Python, and pass "
                "it inside a module that returns its features."
            )
        self.config, self.preprocessing, self.output = config, preprocessing, output
        made = transformers.AutoConfig.for_model(kind, **options)
        self.model = transformers.AutoModel.from_config(made)
        self.side = _side(getattr(made, "image_size", None)) or DEFAULT_SIDE
        self.takes_sizes = "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
        channels = int(getattr(made, "num_channels", 3))
        with torch.no_grad():
            features = self.eval()(torch.zeros(1, channels, self.side, self.side))
        self.train()
        self.num_features = int(features.shape[-1 if features.ndim == 3 else 1])

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to features `(B, F)`, or with `output="features"` to tokens or a map."""
        options: dict[str, Any] = {"return_dict": True}
        if self.takes_sizes and images.shape[-2:] != (self.side, self.side):
            options["interpolate_pos_encoding"] = True
        outputs = self.model(images, **options)
        features = outputs.last_hidden_state
        if self.output == "features":
            return features
        pooled = getattr(outputs, "pooler_output", None)
        if self.output == "pooled" and pooled is not None:
            return pooled.flatten(1)
        if features.ndim == 4:
            return features.mean(dim=(2, 3))
        return features[:, 0] if self.output == "token" else features.mean(dim=1)


def build_hf_network(backbone: str, pretrained: bool = False, feature_map: bool = False) -> HuggingFaceModel:
    """Return an image encoder of Hugging Face; of a model of images and texts the part for images.

    Args:
        backbone: `hf:` and a name of the hub (`hf:facebook/dinov2-small`) or a folder of `save_pretrained`.
        pretrained: Load its weights. From the hub they are downloaded.
        feature_map: Return the last features, tokens `(B, N, F)` or a map `(B, F, H, W)`, before any pooling.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If it is not an image encoder that can be built from its configuration.
        ConnectionError: If there is no such model, or it cannot be downloaded.
    """
    transformers, name = _transformers(), backbone.removeprefix(HF_PREFIX)
    name = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    try:
        full = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"Expected a model of the Hugging Face hub or a folder of `save_pretrained` but got {backbone!r}: "
            f"{str(error).strip().splitlines()[0].rstrip('.')}. Check the name, or download the model to a folder."
        ) from error
    vision = getattr(full, "vision_config", full)
    architecture = _plain(vision.to_dict(), vision.model_type, backbone)
    output: Output = "features" if feature_map else "pooled"
    if not pretrained:
        return HuggingFaceModel(architecture, preprocessing_of_hf(backbone), output)
    loaded, report = transformers.AutoModel.from_pretrained(name, config=vision, output_loading_info=True)
    if output == "pooled" and any(key.startswith("pooler") for key in report["missing_keys"]):
        output = "token"  # the pooled output would be that of random weights
    network = HuggingFaceModel(architecture, preprocessing_of_hf(backbone), output)
    network.model.load_state_dict(loaded.state_dict())
    return network


def preprocessing_of_hf(backbone: str) -> dict[str, Any]:
    """Return how images are prepared for a model of Hugging Face, as options of a data module; empty if not given.

    A model that stretches images to a square gets the square in their middle instead.

    Args:
        backbone: `hf:` and a name or folder.

    Raises:
        ImportError: If transformers is not installed.
    """
    name = backbone.removeprefix(HF_PREFIX)
    try:
        wanted, _ = _transformers().ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        return {}
    resized = _side(wanted.get("size"))
    crop = _side(wanted.get("crop_size")) if wanted.get("do_center_crop") else None
    side = crop or resized
    if side is None or not wanted.get("image_mean"):
        return {}
    return {
        "image_size": side,
        "mean": [float(value) for value in wanted["image_mean"]],
        "std": [float(value) for value in wanted["image_std"]],
        "interpolation": RESAMPLE.get(int(wanted.get("resample") or 2), "bilinear"),
        "crop_pct": min(1.0, side / (resized or side)),
    }


def _plain(options: Mapping[str, Any], kind: str, backbone: str) -> dict[str, Any]:
    """Return a configuration as numbers and words, without what has no effect on the features."""
    found: dict[str, Any] = {"model_type": kind}
    for name, value in options.items():
        if name in IGNORED or name.startswith("_") or value is None:
            continue
        is_word = name in WORDS and isinstance(value, str) and re.fullmatch(WORD, value)
        if not is_word and not _is_number(value):
            raise ValueError(
                f"Expected an architecture of numbers and words but the option {name} of {backbone} is {value!r}. Load "
                "the model in Python, and pass it inside a module that returns its features."
            )
        found[name] = value
    return found


def _is_number(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_number, value))
    return isinstance(value, bool | int | float)


def _side(size: Any) -> int | None:
    """Return the side in pixels: of a number, a pair, or a mapping of Hugging Face."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or size.get("height")
    if isinstance(size, list | tuple):
        size = size[0]
    return None if size is None else int(size)


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            'Expected transformers for a `hf:` backbone but it is not installed. `pip install "lightning-memdml[hf]"`.'
        ) from error
    return transformers
