"""MobileNetV1, the network of the studies on photographs, which torchvision does not have."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

# Output channels at width 1, and stride, of the thirteen pairs of a depthwise and a pointwise convolution.
PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


class MobileNetV1(nn.Module):
    """MobileNetV1 without its classifier.

    A step of training at width 0.25 takes about a tenth of the time of MobileNetV2.

    Args:
        width: Multiplier of all channels, such as 0.25.

    References:
        Howard et al. 2017, "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications".
    """

    def __init__(self, width: float = 0.25) -> None:
        super().__init__()
        self.width = width
        self.num_features = round(1024 * width)
        self.features = nn.Sequential(*self._layers())

    def _layers(self) -> Iterator[nn.Module]:
        channels = round(32 * self.width)
        yield convolution(3, channels, size=3, stride=2)
        for full_width, stride in PAIRS:
            yield convolution(channels, channels, size=3, stride=stride, groups=channels)
            outputs = round(full_width * self.width)
            yield convolution(channels, outputs)
            channels = outputs

    def forward(self, images: Tensor) -> Tensor:
        """Map `(B, 3, H, W)` to `(B, num_features)`."""
        return self.features(images).mean((2, 3))


def convolution(inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return a convolution with a batch norm and a ReLU that ends at 6."""
    layer = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))
