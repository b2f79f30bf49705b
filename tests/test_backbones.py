"""Trunks by name and by module, the weights they start from, and unit embeddings under any precision."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lightning_memdml.backbones import Embedder, SmallConvNet, build_backbone, nearest

# The widths of the published architectures: what goes into the last linear layer.
WIDTHS = {
    "resnet18": 512,
    "resnet50": 2048,
    "mobilenet_v2": 1280,
    "mobilenet_v3_small": 1024,
    "efficientnet_b0": 1280,
    "densenet121": 1024,
    "convnext_tiny": 768,
    "googlenet": 1024,
    "swin_t": 768,
}


class Flat(nn.Module):
    """A backbone that does not say how wide it is."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 4 * 4, width)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))


@pytest.mark.parametrize(("name", "width"), WIDTHS.items())
def test_torchvision_trunk_returns_features_of_the_published_width(name: str, width: int) -> None:
    with torch.device("meta"):  # no memory, no arithmetic
        trunk, found = build_backbone(name)
        features = trunk.train()(torch.zeros(2, 3, 64, 64))
    assert found == width
    assert features.shape == (2, width)
    assert not any(module.out_features == 1000 for module in trunk.modules() if isinstance(module, nn.Linear))


def test_vision_transformer_and_regnet_are_trunks_too() -> None:
    with torch.device("meta"):
        trunk, width = build_backbone("vit_b_16")
        assert trunk(torch.zeros(1, 3, 224, 224)).shape == (1, width) == (1, 768)
    trunk, width = build_backbone("regnet_y_400mf")  # its initialisation does not run on the meta device
    assert trunk.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, width) == (1, 440)


def test_trunk_is_the_network_before_its_last_layer() -> None:
    whole = torchvision.models.resnet18(weights=None).eval()
    trunk, _ = build_backbone("resnet18")
    trunk.load_state_dict({key: value for key, value in whole.state_dict().items() if not key.startswith("fc.")})
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(whole.fc(trunk.eval()(images)), whole(images))


def test_inception_has_no_auxiliary_head_even_while_training() -> None:
    with torch.device("meta"):
        trunk, width = build_backbone("inception_v3")
        features = trunk.train()(torch.zeros(2, 3, 299, 299))
    assert isinstance(features, Tensor)
    assert features.shape == (2, width) == (2, 2048)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet05", "Did you mean 'resnet50'"),
        ("SmallConvNt", "Did you mean 'SmallConvNet'"),
        ("deeplabv3_resnet50", "a model for another task"),
        ("fasterrcnn_resnet50_fpn", "a model for another task"),
        ("r3d_18", "a model for another task"),
        ("squeezenet1_0", "ends in a linear layer but torchvision's squeezenet1_0 has none"),
    ],
)
def test_unusable_name_is_answered_with_a_reason(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build_backbone(name)


@pytest.mark.parametrize("name", ["in_channels", "width", "pool"])
def test_a_network_without_channels_or_places_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^Expected `{name}` of at least 1 but got 0"):
        SmallConvNet(**{name: 0})


def test_grey_images_are_refused_by_a_trunk_for_rgb() -> None:
    trunk, _ = build_backbone("resnet18")
    with pytest.raises(ValueError, match=r"Expected RGB images .* ResNet but got \(2, 1, 28, 28\).*SmallConvNet"):
        trunk(torch.zeros(2, 1, 28, 28))


# ------------------------------------------------------------------ weights from a file


def mobilenet_file(path: Path, keep: str = "", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(1)
    whole = torchvision.models.mobilenet_v2(weights=None).state_dict()
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in whole.items()}
    state = {key: value for key, value in state.items() if key.startswith(keep)}
    torch.save(state, path)
    return state


@pytest.mark.parametrize("keep", ["", "features."])
def test_file_is_loaded_with_or_without_its_classifier(tmp_path: Path, keep: str) -> None:
    state = mobilenet_file(tmp_path / "weights.pth", keep, torch.float16)
    trunk, _ = build_backbone("mobilenet_v2", str(tmp_path / "weights.pth"))
    loaded = trunk.state_dict()
    assert set(loaded) == {key for key in state if key.startswith("features.")}
    assert all(value.dtype != torch.float16 for value in loaded.values())
    assert all(torch.equal(value, state[key].to(value.dtype)) for key, value in loaded.items())


def test_state_dict_inside_a_checkpoint_and_a_module_of_ones_own_are_loaded(tmp_path: Path) -> None:
    source = SmallConvNet(width=4)
    torch.save({"state_dict": source.state_dict(), "epoch": 3}, tmp_path / "small.ckpt")
    backbone, width = build_backbone(SmallConvNet(width=4), str(tmp_path / "small.ckpt"))
    assert width == source.num_features == 128
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in backbone.state_dict().items())


def test_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"in the file nowhere/w\.pth but it does not exist"):
        build_backbone("resnet18", "nowhere/w.pth")


@pytest.mark.parametrize("content", [b"", b"no weights at all", b"PK\x03\x04 half a zip file"])
def test_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "damaged.pth"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.pth but it cannot be read: it is damaged"):
        build_backbone("resnet18", str(file))


def test_truncated_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "half.pth"
    mobilenet_file(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"half\.pth but it cannot be read: it is damaged"):
        build_backbone("mobilenet_v2", str(file))


def test_file_with_code_is_not_executed(tmp_path: Path) -> None:
    torch.save(SmallConvNet(), tmp_path / "module.pth")
    with pytest.raises(ValueError, match="holds more than tensors, which may be code"):
        build_backbone(SmallConvNet(), str(tmp_path / "module.pth"))


def test_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="but got a list"):
        build_backbone("resnet18", str(tmp_path / "list.pth"))


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    mobilenet_file(tmp_path / "weights.pth")
    with pytest.raises(
        ValueError, match=r"weights of ResNet in .* entries are missing \(conv1.weight, .* unknown \(feat"
    ):
        build_backbone("resnet18", str(tmp_path / "weights.pth"))


def test_weights_of_another_width_are_refused(tmp_path: Path) -> None:
    torch.save(SmallConvNet(width=8).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"SmallConvNet in .* mismatch for layers\.0\.weight.* 19 more\."):
        build_backbone(SmallConvNet(width=4), str(tmp_path / "weights.pth"))


def test_file_that_lacks_one_layer_is_refused(tmp_path: Path) -> None:
    state = SmallConvNet(width=4).state_dict()
    del state["layers.3.weight"]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"1 entries are missing \(layers\.3\.weight\) and 0 are unknown"):
        build_backbone(SmallConvNet(width=4), str(tmp_path / "weights.pth"))


def test_file_with_a_layer_too_many_is_refused(tmp_path: Path) -> None:
    state = {**SmallConvNet(width=4).state_dict(), "layers.12.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"0 entries are missing \(none\) and 1 are unknown \(layers\.12\.weight\)"):
        build_backbone(SmallConvNet(width=4), str(tmp_path / "weights.pth"))


# ------------------------------------------------------------------ weights by torchvision's enum


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"])
def test_enum_is_asked_from_torchvision_by_any_of_its_names(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    published = torchvision.models.resnet18(weights=None).state_dict()
    asked = []
    monkeypatch.setattr(
        torchvision.models.WeightsEnum,
        "get_state_dict",
        lambda self, *args, **kwargs: asked.append(self) or published,
    )
    trunk, width = build_backbone("resnet18", weights)
    assert asked == [torchvision.models.ResNet18_Weights.IMAGENET1K_V1]
    assert width == 512
    assert torch.equal(trunk.conv1.weight, published["conv1.weight"])


def test_wrong_enum_is_answered_with_the_choices() -> None:
    with pytest.raises(
        ValueError, match=r"IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT but got 'IMAGENET1K_V3'.*Did you mean"
    ):
        build_backbone("resnet50", "IMAGENET1K_V3")


def test_enum_for_a_module_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected `weights` to be a file for a backbone given as a module"):
        build_backbone(SmallConvNet(), "IMAGENET1K_V1")


def test_download_without_a_network_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", unreachable)
    with pytest.raises(
        ConnectionError, match=r"download the weights DEFAULT of resnet18 but got no route .* Pass a file"
    ):
        build_backbone("resnet18", "DEFAULT")


# ------------------------------------------------------------------ modules, and the embedder


def test_the_width_of_a_module_is_its_attribute_or_an_argument() -> None:
    assert build_backbone(SmallConvNet(width=4, pool=2))[1] == 4 * 2 * 2 * 2
    assert build_backbone(Flat(), num_features=12)[1] == 12
    with pytest.raises(
        ValueError, match=r"Flat to have the attribute `num_features`, .* but it has none. Pass `num_features=`"
    ):
        build_backbone(Flat())


@pytest.mark.parametrize("pool", [1, 4])
@pytest.mark.parametrize("side", [28, 32, 64])
def test_small_net_has_its_width_at_any_small_size(side: int, pool: int) -> None:
    net = SmallConvNet(in_channels=3, width=4, pool=pool)
    assert net(torch.zeros(2, 3, side, side)).shape == (2, net.num_features)


def test_embeddings_have_unit_length_in_fp32_under_any_precision() -> None:
    torch.manual_seed(0)
    embedder = Embedder(Flat(), 12, 8)
    images = torch.randn(64, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert embedder.backbone(images).dtype == torch.bfloat16
        embeddings = embedder(images)
    assert embeddings.dtype == torch.float32
    assert (embeddings.double().norm(dim=1) - 1).abs().max() < 1e-6
    assert embedder.bfloat16()(images.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("told", "shape"), [(13, r"\(5, 12\)"), (4, r"\(5, 12\)")])
def test_wrong_width_of_features_is_named(told: int, shape: str) -> None:
    with pytest.raises(ValueError, match=rf"features of shape \(B, {told}\) but got {shape}. Pass the width"):
        Embedder(Flat(), told, 8)(torch.zeros(5, 3, 4, 4))


def test_frozen_batch_norms_keep_their_statistics_and_still_learn_scale_and_shift() -> None:
    frozen, free = (Embedder(SmallConvNet(width=4), 128, 8, freeze_batch_norm=freeze) for freeze in (True, False))
    for embedder, changes in ((frozen, False), (free, True)):
        before = copy.deepcopy(embedder.backbone.layers[1].state_dict())
        embedder.train()
        embedder(torch.randn(4, 1, 28, 28)).sum().backward()
        norm = embedder.backbone.layers[1]
        assert embedder.head.training
        assert norm.training is changes
        assert (not torch.equal(norm.running_mean, before["running_mean"])) is changes
        assert (norm.num_batches_tracked != before["num_batches_tracked"]).item() is changes
        assert norm.weight.grad is not None
        assert norm.weight.grad.abs().sum() > 0


def test_nearest_is_empty_without_a_similar_name() -> None:
    assert nearest("margn", ["margin", "alpha"]) == " Did you mean 'margin'?"
    assert nearest("xyz", ["margin", "alpha"]) == ""


def test_timm_model_is_a_backbone() -> None:
    timm = pytest.importorskip("timm", reason="timm is an optional source of backbones")
    model = timm.create_model("test_resnet", pretrained=False, num_classes=0)
    backbone, width = build_backbone(model)
    assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, width)


@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (1, 28, 28)])
def test_a_small_network_refuses_other_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(B, 1, H, W\) .* Pass in_channels=1 for grey images, 3 for RGB"):
        SmallConvNet()(torch.zeros(shape))
