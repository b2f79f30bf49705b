"""Backbones, which map images to features, and the embedder, which maps features to embeddings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_memdml.backbone_weights import load_weights, weights_file
from lightning_memdml.checks import check_count, check_types
from lightning_memdml.compat import BATCH_NORMS
from lightning_memdml.heads import HeadInit, Pool, Pooling, initialize_head
from lightning_memdml.hf_networks import HF_PREFIX, HuggingFaceModel, build_hf_network, preprocessing_of_hf
from lightning_memdml.timm_networks import PREFIX, FeatureMap, build_timm_network, preprocessing_of_timm

HeadKind = Literal["linear", "none"]
Neck = Literal["layer", "batch"]
# The last layer before the pooling, by the class of torchvision's networks.
LAST_LAYER = {
    **dict.fromkeys(("AlexNet", "ConvNeXt", "DenseNet", "EfficientNet", "MobileNetV2", "MobileNetV3"), "features"),
    **dict.fromkeys(("SqueezeNet", "VGG"), "features"),
    "MNASNet": "layers",
    "RegNet": "trunk_output",
    "ResNet": "layer4",
    "ShuffleNetV2": "conv5",
}
# Networks that would return three outputs while training.
AUXILIARY_HEADS = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}


class SmallConvNet(nn.Module):
    """A small convolutional network for images of 28 to 64 pixels: it trains from scratch on a CPU in seconds.

    Four 3 x 3 convolutions with batch norm and ReLU, strides 2, 2, 2, 1; then the feature map is averaged down to
    `pool x pool` places. The features have `2 * width * pool**2` numbers.

    Args:
        in_channels: Channels of the image: 1 for glyphs, 3 for photographs.
        width: Channels of the first layer; the others have twice as many.
        pool: Side of the averaged feature map, in places.

    Raises:
        ValueError: If an argument is below 1. When called, if images have another number of channels.

    Example:
        >>> SmallConvNet()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 1024])
    """

    def __init__(self, in_channels: int = 1, width: int = 32, pool: int = 4) -> None:
        check_types(SmallConvNet.__init__, locals())
        super().__init__()
        for name, value in (("in_channels", in_channels), ("width", width), ("pool", pool)):
            check_count(name, value)
        channels = [in_channels, width, 2 * width, 2 * width, 2 * width]
        layers: list[nn.Module] = []
        for inputs, outputs, stride in zip(channels[:-1], channels[1:], (2, 2, 2, 1), strict=True):
            convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.average = nn.AdaptiveAvgPool2d(pool)
        self.in_channels, self.width, self.pool = in_channels, width, pool
        self.num_features = channels[-1] * pool**2

    def forward(self, images: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, num_features)`."""
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"Expected images of shape (B, {self.in_channels}, H, W) for a SmallConvNet with in_channels="
                f"{self.in_channels} but got {tuple(images.shape)}. Pass in_channels=1 for grey images, 3 for RGB."
            )
        return self.average(self.layers(images)).flatten(1)


class Embedder(nn.Module):
    """A backbone, pooling, a head, and L2 normalisation in float32 under any precision.

    Args:
        backbone: Maps images to features: `(B, F)`, or with `pooling` a map `(B, F, H, W)` or tokens `(B, N, F)`.
        num_features: Width F of the backbone's features.
        embedding_dim: Width D of the embedding.
        freeze_batch_norm: Keep the backbone's batch norms in evaluation mode while training: their statistics stay,
            their scale and shift still learn.
        head: `linear`, or `none` for the normalised features themselves; then D is F.
        head_init: How the linear head is initialised, see `initialize_head`.
        neck: A norm of the features before the head, `layer` or `batch`.
        pooling: How feature maps and tokens become rows, see `Pool`.

    Raises:
        ValueError: If an argument is not one of those named.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_features: int,
        embedding_dim: int,
        freeze_batch_norm: bool = False,
        head: HeadKind = "linear",
        head_init: HeadInit = "default",
        neck: Neck | None = None,
        pooling: Pooling | None = None,
    ) -> None:
        super().__init__()
        if head not in get_args(HeadKind):
            raise ValueError(
                f"Expected `head` to be one of {', '.join(get_args(HeadKind))} but got {head!r}."
                f"{nearest(str(head), get_args(HeadKind), ' Pass one of these.')}"
            )
        if neck not in (None, *get_args(Neck)):
            raise ValueError(
                f"Expected `neck` to be one of {', '.join(get_args(Neck))} or None but got {neck!r}. Pass one of these."
            )
        self.backbone = backbone
        self.pool = None if pooling is None else Pool(pooling)
        width = num_features * (1 if self.pool is None else self.pool.factor)
        self.num_features = width
        self.neck = None if neck is None else (nn.LayerNorm(width) if neck == "layer" else nn.BatchNorm1d(width))
        self.head: nn.Module = nn.Identity()
        if head == "linear":
            self.head = nn.Linear(width, embedding_dim)
            initialize_head(self.head, head_init)
        self.freeze_batch_norm = freeze_batch_norm
        self.train()  # Lightning trains in the mode it finds

    def forward(self, images: Tensor, *, features_only: bool = False) -> Tensor:
        """Map images `(B, C, H, W)` to unit embeddings `(B, D)` in float32, or to the features `(B, F)` of the head."""
        features = self.backbone(images)
        if not isinstance(features, Tensor):
            name = "pooler_output" if self.pool is None else "last_hidden_state"
            features = _tensor_of(features, name, self.backbone)
        if not features.is_floating_point():
            raise TypeError(
                f"Expected the backbone to return features as floating-point numbers but got {features.dtype}. Convert "
                "them with `.float()`."
            )
        if self.pool is not None:
            if features.ndim not in (3, 4):
                raise ValueError(
                    "Expected the backbone to return a map (B, F, H, W) or tokens (B, N, F) to pool but got "
                    f"{tuple(features.shape)}. Leave `pooling` out."
                )
            features = self.pool(features)
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(
                f"Expected the backbone to return features of shape (B, {self.num_features}) but got "
                f"{tuple(features.shape)}. Pass the width as `num_features`, and for a map (B, F, H, W) or tokens "
                "(B, N, F) also `pooling`."
            )
        features = features if self.neck is None else self.neck(features)
        # Norms in bfloat16 are off by up to 4e-3, enough to move pairs over a margin.
        return features if features_only else F.normalize(self.head(features).float(), dim=1)

    def train(self, mode: bool = True) -> Embedder:
        """Switch the mode; frozen batch norms stay in evaluation mode."""
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.backbone.modules():
                if isinstance(module, BATCH_NORMS):
                    module.eval()
        return self


def _tensor_of(output: Any, name: str, backbone: nn.Module) -> Tensor:
    """Return a tensor of an output object of Hugging Face."""
    found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    if isinstance(found, Tensor):
        return found
    raise TypeError(
        f"Expected the backbone {type(backbone).__name__} to return a tensor of features, or an object with `{name}`, "
        f"but got a {type(output).__name__}. Wrap it in a module that returns the features."
    )


def build_backbone(
    backbone: nn.Module | str,
    weights: str | None = None,
    num_features: int | None = None,
    feature_map: bool = False,
) -> tuple[nn.Module, int]:
    """Return a backbone without its classifier, and the width of its features.

    Args:
        backbone: The name of a torchvision classifier (`resnet50`), `timm:` and a name of timm's list
            (`timm:resnet18`), `hf:` and a name of the Hugging Face hub or a folder of `save_pretrained`, or any module
            that returns features.
        weights: A file with a state dict, for a torchvision name one of its enums (`IMAGENET1K_V2`, `DEFAULT`), or
            for the other names `DEFAULT`: those of the folder, or those that are downloaded.
        num_features: The width F, for a module without the attribute `num_features`.
        feature_map: Return a named network up to its last feature map `(B, F, H, W)` or its tokens `(B, N, F)`, before
            its own pooling. A module is returned as it is.

    Raises:
        ValueError: If the name is unknown, the width is not given, the weights do not fit, or the network has no
            feature map.
        FileNotFoundError: If `weights` names a file that does not exist.
        ConnectionError: If weights cannot be downloaded.
        ImportError: If timm or transformers is needed and not installed.

    Example:
        >>> trunk, width = build_backbone("resnet18")
        >>> width
        512
    """
    path = weights_file(weights)
    if isinstance(backbone, str) and backbone.startswith(PREFIX):
        if path is None and weights not in (None, "DEFAULT"):
            raise ValueError(
                f"Expected `weights` of {backbone} to be a file or DEFAULT but got {weights!r}. Check the path."
            )
        network, width = build_timm_network(backbone, pretrained=weights == "DEFAULT" and path is None)
        if path is not None:
            load_weights(network, path)
        network.register_forward_pre_hook(_check_rgb)
        return (FeatureMap(network), network.num_features) if feature_map else (network, width)
    if isinstance(backbone, str) and backbone.startswith(HF_PREFIX):
        if path is None and weights not in (None, "DEFAULT"):
            raise ValueError(
                f"Expected `weights` of {backbone} to be a file or DEFAULT but got {weights!r}. Check the path."
            )
        model = build_hf_network(backbone, pretrained=weights == "DEFAULT" and path is None, feature_map=feature_map)
        if path is not None:
            load_weights(model.model, path)
        model.register_forward_pre_hook(_check_rgb)
        return model, model.num_features
    if isinstance(backbone, str):
        network = _torchvision_model(backbone, weights, path)
        trunk, width = _up_to_feature_map(network, backbone) if feature_map else _without_classifier(network, backbone)
        if path is not None:
            load_weights(trunk, path)
        return trunk, width
    given = None if num_features is None else check_count("num_features", num_features)
    given = given or getattr(backbone, "num_features", None)
    if not isinstance(given, int):
        raise ValueError(
            f"Expected {type(backbone).__name__} to have the attribute `num_features`, the width of its features, but "
            "it has none. Pass `num_features=`."
        )
    if path is not None:
        load_weights(backbone, path)
    elif weights is not None:
        raise ValueError(
            f"Expected `weights` to be a file for a backbone given as a module but got {weights!r}. Pass a path."
        )
    return backbone, given


def preprocessing_of(backbone: nn.Module | str) -> dict[str, Any]:
    """Return how images are prepared for a network of timm or Hugging Face, as options of a data module; else nothing.

    Args:
        backbone: Its name, or the network.

    Example:
        >>> preprocessing_of("resnet18")
        {}
    """
    if isinstance(backbone, str) and backbone.startswith(HF_PREFIX):
        return preprocessing_of_hf(backbone)
    if isinstance(backbone, HuggingFaceModel):
        return dict(backbone.preprocessing or {})
    return preprocessing_of_timm(backbone)


def _torchvision_model(name: str, weights: str | None, path: Path | None) -> nn.Module:
    """Build one of torchvision's classifiers with its weights."""
    from torchvision import models

    _check_classifier(name)
    options: dict[str, Any] = {}
    if name in AUXILIARY_HEADS:
        # The published weights of these two expect input that is scaled as in TensorFlow.
        options = {"init_weights": True} if weights is None else {"transform_input": True}
    try:
        model = models.get_model(name, weights=_enum(name, weights, path), **options)
    except URLError as error:
        raise ConnectionError(
            f"Expected to download the weights {weights} of {name} but got {error.reason}. Pass a file as `weights`."
        ) from error
    for auxiliary in AUXILIARY_HEADS.get(name, ()):
        model.aux_logits = False
        setattr(model, auxiliary, None)
    return model


def _without_classifier(model: nn.Module, name: str) -> tuple[nn.Module, int]:
    """Replace the last linear layer by the identity."""
    linear_layers = {key: module for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not linear_layers:
        raise ValueError(
            f"Expected a classifier that ends in a linear layer but torchvision's {name} has none. Use another network."
        )
    last = next(reversed(linear_layers))
    width = linear_layers[last].in_features
    model.set_submodule(last, nn.Identity())
    model.register_forward_pre_hook(_check_rgb)
    return model, width


def _up_to_feature_map(model: nn.Module, name: str) -> tuple[nn.Module, int]:
    """Return the layers of a convolutional network before its pooling, and the channels of its feature map."""
    last = LAST_LAYER.get(type(model).__name__)
    if last is None:
        raise ValueError(
            f"Expected a convolutional network of torchvision to use `pooling` but got {name}. Leave `pooling` out: "
            "the network has its own."
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for key, module in model.named_children():
        layers[key] = module
        if key == last:
            break
    if type(model).__name__ == "DenseNet":
        layers["relu"] = nn.ReLU()  # a function in torchvision's network
    trunk = nn.Sequential(layers)
    trunk.register_forward_pre_hook(_check_rgb)
    with torch.no_grad():
        width = trunk.eval()(torch.zeros(1, 3, 64, 64)).shape[1]
    return trunk.train(), int(width)


def _check_classifier(name: str) -> None:
    from torchvision import models

    names = models.list_models(module=models)
    if name in names:
        return
    if name in models.list_models():
        raise ValueError(
            f"Expected `backbone` to be one of torchvision's image classifiers but {name!r} is a model for "
            "another task. Pass a classifier, for example 'resnet50'."
        )
    raise ValueError(
        "Expected `backbone` to be the name of a torchvision classifier, or a module (in YAML and on the command "
        f"line the name of its class) but got {name!r}."
        f"{nearest(name, [*names, SmallConvNet.__name__], ' `torchvision.models.list_models()` has the names.')}"
    )


def _check_rgb(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    images = inputs[0]
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"Expected RGB images of shape (B, 3, H, W) for {type(model).__name__} but got "
            f"{tuple(images.shape)}. Convert the images to RGB, or use `SmallConvNet` for grey images."
        )


def _enum(name: str, weights: str | None, path: Path | None) -> Any:
    """Return torchvision's enum of published weights."""
    from torchvision.models import get_model_weights

    if weights is None or path is not None:
        return None
    published = get_model_weights(name)
    choices = dict(published.__members__)  # with the alias DEFAULT
    chosen = weights.rpartition(".")[2]  # ResNet50_Weights.IMAGENET1K_V2 is the full name
    if chosen not in choices:
        raise ValueError(
            f"Expected `weights` of {name} to be a file or one of {', '.join(choices)} but got {weights!r}."
            f"{nearest(chosen, choices, ' Check the path, or pass DEFAULT.')}"
        )
    return choices[chosen]


def nearest(name: str, names: Iterable[str], otherwise: str = "") -> str:
    """Return a sentence with the most similar of some names, or `otherwise` if none is similar.

    Example:
        >>> nearest("resnet05", ["resnet50", "vit_b_16"])
        " Did you mean 'resnet50'?"
    """
    close = get_close_matches(name, list(names), n=1)
    return f" Did you mean {close[0]!r}?" if close else otherwise
