"""Learning rates of the backbone, of its blocks, and of losses with parameters, as groups of an optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_memdml.backbone_blocks import find_blocks

LR_SCALE = "lr_scale"  # of a group, until the optimiser has decided about the rate that it scales


def check_rates(backbone_lr: float | None, layer_decay: float | None, loss_lr: float | None, losses: Any) -> None:
    """Check learning rates before a training.

    Raises:
        ValueError: If one is out of range, or there is no loss with parameters for `loss_lr`.
    """
    for name, rate in (("backbone_lr", backbone_lr), ("loss_lr", loss_lr)):
        if rate is not None and not rate >= 0:
            raise ValueError(f"Expected `{name}` of at least 0 but got {rate}. Pass 0.0001, for example.")
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"Expected `layer_decay` in (0, 1] but got {layer_decay}. Pass 0.75, for example.")
    if loss_lr is not None and not _parameters_of(losses):
        raise ValueError(
            "Expected a loss with parameters of its own, such as proxies, for `loss_lr` but the losses have none. "
            "Leave `loss_lr` out."
        )


def build_optimizer(
    make: Callable[[Any], Optimizer],
    module: nn.Module,
    backbone: nn.Module,
    losses: Iterable[Any] = (),
    backbone_lr: float | None = None,
    layer_decay: float | None = None,
    loss_lr: float | None = None,
) -> Optimizer:
    """Return an optimiser of the parameters that require a gradient, with a group for each learning rate.

    Args:
        make: Makes the optimiser from parameters or groups; its rate holds where no other is given.
        module: What is trained.
        backbone: The part of it that has a rate of its own, and whose blocks have lower rates.
        losses: Losses; those that are modules may have parameters.
        backbone_lr: Rate of the backbone's last block.
        layer_decay: Rate of each block of the backbone, divided by that of the next one, in (0, 1].
        loss_lr: Rate of the losses' parameters.

    Example:
        >>> import torch
        >>> module = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
        >>> made = build_optimizer(lambda p: torch.optim.SGD(p, lr=0.1), module, module[0], layer_decay=0.5)
        >>> [(group["name"], group["lr"]) for group in made.param_groups]
        [('head', 0.1), ('backbone.0', 0.05), ('backbone.1', 0.1)]
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = []
    if layer_decay is not None:
        blocks = find_blocks(backbone)
        for place, block in enumerate(blocks):
            scale = layer_decay ** (len(blocks) - 1 - place)
            groups.append({"params": block.parameters, "name": f"backbone.{block.name}", LR_SCALE: scale})
    elif backbone_lr is not None:
        groups.append({"params": list(backbone.parameters()), "name": "backbone"})
    if backbone_lr is not None:
        groups = [{**group, "lr": backbone_lr} for group in groups]
    if loss_lr is not None:
        groups.append({"params": _parameters_of(losses), "name": "losses", "lr": loss_lr})
    if not groups:
        return make(trained)
    taken = {parameter for group in groups for parameter in group["params"]}
    rest = {"params": [parameter for parameter in trained if parameter not in taken], "name": "head"}
    kept = set(trained)
    groups = [{**group, "params": [one for one in group["params"] if one in kept]} for group in (rest, *groups)]
    optimizer = make([group for group in groups if group["params"]])
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group.pop(LR_SCALE, 1.0)
    return optimizer


def base_rate(make: Callable[[Any], Optimizer]) -> float:
    """Return the learning rate that an optimiser gives to parameters without a rate of their own.

    Example:
        >>> import torch
        >>> base_rate(lambda parameters: torch.optim.SGD(parameters, lr=0.25))
        0.25
    """
    return float(make([nn.Parameter(torch.zeros(1, 1))]).param_groups[0]["lr"])


def with_base_rate(make: Callable[[Any], Optimizer], rate: float) -> Callable[[Any], Optimizer]:
    """Return a function that makes the same optimiser with another rate, except for groups with a rate of their own.

    Example:
        >>> import torch
        >>> weight = nn.Parameter(torch.zeros(1))
        >>> with_base_rate(torch.optim.SGD, 0.5)([{"params": [weight]}]).param_groups[0]["lr"]
        0.5
    """

    def made(parameters: Any) -> Optimizer:
        has_own = [isinstance(one, dict) and "lr" in one for one in parameters]  # torch adds it to each mapping
        optimizer = make(parameters)
        for group, own in zip(optimizer.param_groups, has_own, strict=False):
            if not own:
                group["lr"] = rate
        return optimizer

    return made


def _parameters_of(losses: Iterable[Any]) -> list[nn.Parameter]:
    found = (parameter for loss in losses if isinstance(loss, nn.Module) for parameter in loss.parameters())
    return list(dict.fromkeys(found))
