"""Learning rates of blocks, backbones and losses; and the blocks of networks of several sources."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from support.learners import DIM, learner, loader, trainer
from torch import nn
from torchvision import models

from lightning_memdml import ContrastiveLoss, MemoryCallback, MetricLearner, SmallConvNet
from lightning_memdml.backbone_blocks import find_blocks
from lightning_memdml.backbones import build_backbone

STAGES = ["layer1", "layer2", "layer3", "layer4"]
BLOCKS = {
    "resnet50": ["conv1", *STAGES],
    "mobilenet_v2": [f"features.{i}" for i in range(19)],
    "efficientnet_b0": [f"features.{i}" for i in range(9)],
    "convnext_tiny": [f"features.{i}" for i in range(8)],
    "regnet_y_400mf": ["stem", *(f"trunk_output.block{i}" for i in range(1, 5))],
    "vit_b_16": ["conv_proj", *(f"encoder.layers.encoder_layer_{i}" for i in range(12))],
    "shufflenet_v2_x0_5": ["conv1", "stage2", "stage3", "stage4", "conv5"],
}
TIMM_BLOCKS = {
    "test_vit": ["patch_embed", *(f"blocks.{i}" for i in range(6))],
    "test_resnet": ["conv1", *STAGES],
    "mobilenetv3_small_050": ["conv_stem", *(f"blocks.{i}" for i in range(6)), "conv_head"],
    "convnext_atto": ["stem", *(f"stages.{i}" for i in range(4))],
}


def check(network: nn.Module, names: list[str]) -> None:
    blocks = find_blocks(network)
    assert [block.name for block in blocks] == names
    parameters = [parameter for block in blocks for parameter in block.parameters]
    assert len(parameters) == len({id(p) for p in parameters}) == len(list(network.parameters()))


@pytest.mark.parametrize(("name", "names"), BLOCKS.items())
def test_blocks_of_torchvisions_networks(name: str, names: list[str]) -> None:
    network, _ = build_backbone(name)
    check(network, names)


@pytest.mark.parametrize("feature_map", [False, True])
@pytest.mark.parametrize(("name", "names"), TIMM_BLOCKS.items())
def test_blocks_of_timms_networks(name: str, names: list[str], feature_map: bool) -> None:
    pytest.importorskip("timm", reason="the extra `timm`")
    network, _ = build_backbone(f"timm:{name}", feature_map=feature_map)
    check(network, [f"network.{one}" for one in names] if feature_map else names)


def test_blocks_of_modules_of_ones_own() -> None:
    check(SmallConvNet(), ["layers.0", "layers.3", "layers.6", "layers.9"])  # each with its norm
    check(nn.Linear(2, 2), [""])
    check(nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2)), ["0", "1"])
    check(build_backbone("resnet18", feature_map=True)[0], ["conv1", *STAGES])
    with pytest.raises(ValueError, match=r"^Expected a network with parameters but got one without"):
        find_blocks(nn.ReLU())


def test_the_norm_behind_a_layer_and_the_positions_belong_to_a_block() -> None:
    network = models.vit_b_16(weights=None)
    network.heads = nn.Identity()
    first, *_, last = find_blocks(network)
    assert {id(network.class_token), id(network.encoder.pos_embedding)} <= {id(p) for p in first.parameters}
    assert network.encoder.ln in last.modules


class Proxies(nn.Module):
    """A loss with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.proxies = nn.Parameter(torch.ones(3, DIM))

    def forward(self, embeddings: Any, labels: Any) -> Any:
        return -(embeddings * self.proxies[labels]).sum(1).mean()


def rates(model: MetricLearner) -> dict[str, float]:
    """Name -> learning rate of every parameter."""
    optimizer = model.configure_optimizers()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optimizer.param_groups
    assert "lr_scale" not in {key for group in groups for key in group}
    return {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("backbone_lr", [None, 0.02])
def test_rates_fall_from_block_to_block_towards_the_input(backbone_lr: float | None) -> None:
    model = learner(backbone=SmallConvNet(width=4), loss=Proxies(), layer_decay=0.5, backbone_lr=backbone_lr, loss_lr=3)
    found, top = rates(model), backbone_lr or 0.1
    assert len(found) == len(list(model.parameters()))
    for place, layers in enumerate([(0, 1), (3, 4), (6, 7), (9, 10)]):
        for layer in layers:
            assert found[f"model.backbone.layers.{layer}.weight"] == pytest.approx(top * 0.5 ** (3 - place))
    assert found["model.head.weight"] == 0.1
    assert found["loss.proxies"] == 3


def test_frozen_blocks_get_no_group() -> None:
    model = learner(backbone=SmallConvNet(width=4), layer_decay=0.5)
    model.model.backbone.layers[:6].requires_grad_(False)
    assert [group["name"] for group in model.configure_optimizers().param_groups] == [
        "head",
        "backbone.layers.6",
        "backbone.layers.9",
    ]


@pytest.mark.parametrize("name", ["ProxyAnchorLoss", "ArcFaceLoss", "SoftTripleLoss"])
def test_losses_of_pytorch_metric_learning_learn_at_their_own_rate(name: str) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses", reason="its losses are accepted, not needed")
    before = {}

    class Before(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            before.update({key: value.clone() for key, value in pl_module.state_dict().items()})

    for rate in (0.0, 10.0):
        loss = getattr(losses, name)(num_classes=3, embedding_size=DIM)
        model = learner(loss=loss, memory_loss=ContrastiveLoss(), loss_lr=rate)
        run = trainer(Before(), MemoryCallback(size=8), max_epochs=2)
        run.fit(model, loader())
        after = model.state_dict()
        (own,) = [key for key in after if key.startswith("loss.") and after[key].ndim == 2]
        assert torch.equal(after[own], before[own]) is (rate == 0)
        assert not torch.equal(after["model.head.weight"], before["model.head.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_decay": 0.0}, r"Expected `layer_decay` in \(0, 1\] but got 0.0. Pass 0.75, for example."),
        ({"layer_decay": 1.1}, r"Expected `layer_decay` in \(0, 1\] but got 1.1. Pass 0.75, for example."),
        ({"backbone_lr": -1.0}, "Expected `backbone_lr` of at least 0 but got -1.0. Pass 0.0001, for example."),
        (
            {"loss_lr": 0.1},
            "Expected a loss with parameters of its own, such as proxies, for `loss_lr` but the losses have none. "
            "Leave `loss_lr` out.",
        ),
    ],
)
def test_rates_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        learner(**options)
