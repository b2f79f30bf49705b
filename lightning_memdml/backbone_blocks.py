"""The blocks of any network in their order, to freeze the first of them or to give them lower learning rates."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

FEWEST = 4  # blocks; a network of fewer parts is taken apart further


class Block(NamedTuple):
    """A part of a network that is frozen or trained as a whole.

    Attributes:
        name: Name of its first module.
        modules: Its modules, one of which is the block itself; norms behind it belong to it.
        parameters: Its parameters.
    """

    name: str
    modules: list[nn.Module]
    parameters: list[nn.Parameter]


def find_blocks(network: nn.Module) -> list[Block]:
    """Return the blocks of a network, from its input to its output.

    The blocks are the children of the network that have weights, in the order in which they are defined. As long as
    there are fewer than four, the largest one is replaced by its children. So they are the stem and the stages of a
    convolutional network, and the patch embedding and the layers of a transformer, of torchvision, timm or any other
    source. A child that has only vectors, such as a norm, belongs to the block before it. Parameters of the network
    itself, such as positions, belong to the first block.

    Args:
        network: The network, without its classifier.

    Raises:
        ValueError: If it has no parameters.

    Example:
        >>> from torchvision.models import resnet18
        >>> network = resnet18()
        >>> network.fc = nn.Identity()
        >>> [block.name for block in find_blocks(network)]
        ['conv1', 'layer1', 'layer2', 'layer3', 'layer4']
    """
    parts, loose = [("", network)], list[nn.Parameter]()
    while len(_with_weights(parts)) < FEWEST:
        divisible = [part for part in parts if any(_size(child) for child in part[1].children())]
        if not divisible:
            break
        largest = max(divisible, key=lambda part: _size(part[1]))
        place, (name, module) = parts.index(largest), largest
        children = [(f"{name}.{child}".lstrip("."), inner) for child, inner in module.named_children()]
        parts[place : place + 1] = [child for child in children if _size(child[1])]
        loose += module.parameters(recurse=False)
    return _joined(parts, loose)


def _joined(parts: list[tuple[str, nn.Module]], loose: list[nn.Parameter]) -> list[Block]:
    """Return the parts as blocks, those without weights as a part of the block before."""
    blocks: list[Block] = []
    seen: set[nn.Parameter] = set()
    for name, module in parts:
        own = [*([] if blocks else loose), *module.parameters()]
        own = [parameter for parameter in dict.fromkeys(own) if parameter not in seen]  # shared ones count once
        seen.update(own)
        if blocks and not _has_weights(module):
            blocks[-1].modules.append(module)
            blocks[-1].parameters.extend(own)
        else:
            blocks.append(Block(name, [module], own))
    if not seen:
        raise ValueError("Expected a network with parameters but got one without. Pass a network that has layers.")
    return blocks


def _with_weights(parts: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    return [part for part in parts if _has_weights(part[1])]


def _has_weights(module: nn.Module) -> bool:
    """Whether a module has more than vectors, as all layers but norms have."""
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
