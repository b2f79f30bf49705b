"""Weight functions: the weight of a pair as a function of its similarity.

The same function can weigh positives or negatives. A hard negative is similar, a hard positive is dissimilar: a
decreasing function stresses hard positives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memdml.checks import check_finite, check_positive, check_similarity, check_types, refuse_renamed
from lightning_memdml.losses.constants import constant_like
from lightning_memdml.readable_repr import options_repr


class WeightFunction(nn.Module, ABC):
    r"""A weight curve $w(s) \ge 0$ over cosine similarities.

    A subclass defines `forward`, an element-wise function. If its weight is 0 at and below some similarity, it sets
    `zero_below` to it, and the streamed evaluation skips those pairs.

    Example:
        >>> class Quadratic(WeightFunction):
        ...     zero_below = 0.0
        ...
        ...     def forward(self, similarity):
        ...         return similarity.clamp(min=0) ** 2
        >>> Quadratic()(torch.tensor([-0.5, 0.5]))
        tensor([0.0000, 0.2500])
    """

    #: Similarity at or below which every weight is 0.
    zero_below: float = -torch.inf

    __repr__ = options_repr

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse the name of an earlier version."""
        super().__init_subclass__(**options)
        refuse_renamed(cls, {"cut": "zero_below"})

    @abstractmethod
    def forward(self, similarity: Tensor) -> Tensor:
        """Return the weight of each similarity, in the same shape. The argument must not be changed.

        Args:
            similarity: Cosine similarities, of any shape.
        """


class Constant(WeightFunction):
    r"""Weighs all pairs alike.

    $$
    w(s) = \text{value}
    $$

    Args:
        value: The weight, at least 0.

    Raises:
        ValueError: If `value` is below 0 or not finite.

    Example:
        >>> Constant()(torch.tensor([-0.5, 0.9]))
        tensor([1., 1.])
    """

    def __init__(self, value: float = 1.0) -> None:
        check_types(Constant.__init__, locals())
        super().__init__()
        self.value = _check_at_least_zero("value", value)

    def forward(self, similarity: Tensor) -> Tensor:
        """Return the weight of each similarity, in the same shape."""
        return torch.full_like(similarity, self.value)


class Threshold(WeightFunction):
    r"""Gives pairs above a threshold the weight 1 and all others 0, or the reverse.

    $$
    w(s) = \mathbb{1}[s > \text{threshold}]
    $$

    With `above=False` it is $\mathbb{1}[s < \text{threshold}]$. As the weight of negatives `Threshold(m)` is that of
    `ContrastiveLoss(margin=m)`.

    Args:
        threshold: Cosine similarity in [-1, 1].
        above: Whether the pairs above the threshold have the weight 1; if false, those below it.

    Raises:
        ValueError: If `threshold` is not a cosine similarity.

    Example:
        >>> Threshold(0.5)(torch.tensor([0.2, 0.5, 0.9]))
        tensor([0., 0., 1.])
        >>> Threshold(0.5, above=False)(torch.tensor([0.2, 0.5, 0.9]))
        tensor([1., 0., 0.])
    """

    def __init__(self, threshold: float = 0.5, above: bool = True) -> None:
        check_types(Threshold.__init__, locals())
        super().__init__()
        self.threshold = check_similarity("threshold", threshold)
        self.above = above
        self.zero_below = self.threshold if above else -torch.inf

    def forward(self, similarity: Tensor) -> Tensor:
        """Return the weight of each similarity, in the same shape."""
        compare = torch.gt if self.above else torch.lt
        return compare(similarity, self.threshold, out=torch.empty_like(similarity))


class Linear(WeightFunction):
    r"""Weighs pairs along a straight line, and by 0 where the line is negative.

    $$
    w(s) = \max(0, \text{slope} \cdot s + \text{intercept})
    $$

    `Linear()` stresses similar pairs. `Linear(slope=-1, intercept=1)` is $1 - s$ and stresses dissimilar ones.

    Args:
        slope: Weight per unit of similarity.
        intercept: Weight at similarity 0.

    Raises:
        ValueError: If a number is not finite.

    Example:
        >>> Linear(slope=-1, intercept=1)(torch.tensor([-1.0, 0.5, 1.0]))
        tensor([2.0000, 0.5000, 0.0000])
    """

    def __init__(self, slope: float = 1.0, intercept: float = 0.0) -> None:
        check_types(Linear.__init__, locals())
        super().__init__()
        self.slope, self.intercept = check_finite("slope", slope), check_finite("intercept", intercept)
        self.zero_below = -intercept / slope if slope > 0 else -torch.inf

    def forward(self, similarity: Tensor) -> Tensor:
        """Return the weight of each similarity, in the same shape."""
        return (self.slope * similarity).add_(self.intercept).clamp_min_(0)


class Power(WeightFunction):
    r"""Weighs pairs by a power of how far their similarity exceeds a threshold: a ramp from 0 to 1.

    $$
    w(s) = \left(\frac{\max(0, s - \text{threshold})}{1 - \text{threshold}}\right)^{\text{power}}
    $$

    Args:
        threshold: Cosine similarity in [-1, 1) where the ramp starts.
        power: Exponent above 0. 1 is a straight ramp, 2 stresses the most similar pairs, 0.5 is nearer to a step.

    Raises:
        ValueError: If `threshold` is not in [-1, 1), or `power` is not above 0.

    Example:
        >>> Power(threshold=0.5, power=2)(torch.tensor([0.2, 0.75, 1.0]))
        tensor([0.0000, 0.2500, 1.0000])
    """

    def __init__(self, threshold: float = 0.0, power: float = 1.0) -> None:
        check_types(Power.__init__, locals())
        super().__init__()
        if not -1 <= threshold < 1:
            raise ValueError(
                f"Expected `threshold` to be a cosine similarity in [-1, 1) but got {threshold}. "
                "Pass a number in this range."
            )
        self.threshold, self.power = threshold, check_positive("power", power)
        self.zero_below = threshold

    def forward(self, similarity: Tensor) -> Tensor:
        """Return the weight of each similarity, in the same shape."""
        return (similarity - self.threshold).clamp_min_(0).div_(1 - self.threshold).pow_(self.power)


class Exponential(WeightFunction):
    r"""Weighs pairs exponentially. The weight is 1 at the similarity `center`.

    $$
    w(s) = e^{\text{scale} (s - \text{center})}
    $$

    Args:
        scale: Growth per unit of similarity. Negative values stress dissimilar pairs.
        center: Similarity whose weight is 1.

    Raises:
        ValueError: If a number is not finite.

    Example:
        >>> Exponential(scale=10)(torch.tensor([0.0, 1.0]))
        tensor([4.5400e-05, 1.0000e+00])
    """

    def __init__(self, scale: float = 10.0, center: float = 1.0) -> None:
        check_types(Exponential.__init__, locals())
        super().__init__()
        self.scale, self.center = check_finite("scale", scale), check_finite("center", center)

    def forward(self, similarity: Tensor) -> Tensor:
        """Return the weight of each similarity, in the same shape."""
        return (similarity - self.center).mul_(self.scale).exp_()


class InverseDistance(WeightFunction):
    r"""Weighs pairs by an inverse power of their distance, so that distant pairs count little.

    $$
    w(s) = \left(\frac{r}{\max(r, d)}\right)^{\text{power}}, \qquad d = \sqrt{2 - 2 s}
    $$

    As the weight of positives it lets the pull of a positive decay with its distance, where most losses let it grow.
    This is the idea of potential field metric learning, whose potential $-1 / d^\alpha$ has the weight $\alpha /
    d^{\alpha + 2}$: `power` is $\alpha + 2$. Here the weight is 1 within the radius.

    Args:
        power: Exponent above 0.
        radius: Distance r between unit vectors, in (0, 2), up to which the weight is 1.

    Raises:
        ValueError: If `power` is not above 0, or `radius` is not in (0, 2).

    References:
        Bhatnagar and Ahuja 2025, arXiv 2405.18560 (potential fields).

    Example:
        >>> InverseDistance(power=2, radius=1)(torch.tensor([-1.0, 0.0, 0.5, 1.0]))
        tensor([0.2500, 0.5000, 1.0000, 1.0000])
    """

    def __init__(self, power: float = 3.0, radius: float = 0.5) -> None:
        check_types(InverseDistance.__init__, locals())
        super().__init__()
        if not 0 < radius < 2:
            raise ValueError(
                f"Expected `radius` to be a distance in (0, 2) but got {radius}. Pass a number in this range."
            )
        self.power, self.radius = check_positive("power", power), radius

    def forward(self, similarity: Tensor) -> Tensor:
        """Return the weight of each similarity, in the same shape."""
        squared = (-2 * similarity).add_(2).div_(self.radius**2)  # of the distance in radii
        return squared.clamp_min_(1).pow_(-self.power / 2)


class Sigmoid(WeightFunction):
    r"""Weighs pairs by a soft step.

    $$
    w(s) = \frac{1}{1 + e^{-\text{scale} (s - \text{threshold})}}
    $$

    Args:
        scale: Steepness. Negative values weigh the pairs below the threshold.
        threshold: Cosine similarity in [-1, 1] at which the weight is 0.5.

    Raises:
        ValueError: If `threshold` is not a cosine similarity, or `scale` is not finite.

    Example:
        >>> Sigmoid(scale=10, threshold=0.5)(torch.tensor([0.5, 1.0]))
        tensor([0.5000, 0.9933])
    """

    def __init__(self, scale: float = 10.0, threshold: float = 0.5) -> None:
        check_types(Sigmoid.__init__, locals())
        super().__init__()
        self.scale, self.threshold = check_finite("scale", scale), check_similarity("threshold", threshold)

    def forward(self, similarity: Tensor) -> Tensor:
        """Return the weight of each similarity, in the same shape."""
        return (similarity - self.threshold).mul_(self.scale).sigmoid_()


class Band(WeightFunction):
    r"""Gives pairs between two similarities the weight 1 and all others 0: hard pairs without the hardest.

    $$
    w(s) = \mathbb{1}[\text{low} < s < \text{high}]
    $$

    The most similar pairs of different classes may be mislabelled, and a band leaves them out.

    Args:
        low: Lower edge, a cosine similarity in [-1, 1]. The edge itself has weight 0.
        high: Upper edge, above `low` and at most 1. The edge itself has weight 0.

    Raises:
        ValueError: If an edge is not a cosine similarity, or `low` is not below `high`.

    Example:
        >>> Band(0.5, 0.9)(torch.tensor([0.5, 0.7, 0.95]))
        tensor([0., 1., 0.])
    """

    def __init__(self, low: float = 0.5, high: float = 0.9) -> None:
        check_types(Band.__init__, locals())
        super().__init__()
        self.low, self.high = check_similarity("low", low), check_similarity("high", high)
        if low >= high:
            raise ValueError(
                f"Expected `low` below `high` but got low={low}, high={high}. Exchange them or widen the band."
            )
        self.zero_below = low

    def forward(self, similarity: Tensor) -> Tensor:
        """Return the weight of each similarity, in the same shape."""
        return ((similarity > self.low) & (similarity < self.high)).to(similarity.dtype)


class Piecewise(WeightFunction):
    r"""Weighs pairs along straight lines between given points $(s_k, w_k)$.

    $$
    w(s) = w_k + \frac{s - s_k}{s_{k+1} - s_k} (w_{k+1} - w_k) \quad\text{for}\quad s_k \le s \le s_{k+1}
    $$

    Below the first point and above the last one the weight is constant.

    Args:
        similarities: Similarities of the points, ascending, at least two.
        weights: Weight at each point, at least 0.

    Raises:
        ValueError: If the numbers of similarities and weights differ or are below 2, similarities do not ascend, or a
            weight is below 0 or not finite.

    Example:
        >>> Piecewise([0.0, 0.5, 1.0], [0.0, 1.0, 0.5])(torch.tensor([-1.0, 0.25, 0.75]))
        tensor([0.0000, 0.5000, 0.7500])
    """

    def __init__(self, similarities: Sequence[float], weights: Sequence[float]) -> None:
        check_types(Piecewise.__init__, locals())
        super().__init__()
        if len(similarities) != len(weights) or len(similarities) < 2:
            raise ValueError(
                f"Expected as many `weights` as `similarities`, at least two, but got {len(weights)} and "
                f"{len(similarities)}. Pass one weight for each similarity."
            )
        if not all(a < b for a, b in zip(similarities, similarities[1:])):  # noqa: B905, RUF007 (3.10 has both, this reads)
            raise ValueError(f"Expected ascending `similarities` but got {list(similarities)}. Sort the points.")
        if not all(0 <= weight < torch.inf for weight in weights):
            raise ValueError(f"Expected `weights` of at least 0 but got {list(weights)}. Leave out negative weights.")
        self.similarities, self.weights = list(similarities), list(weights)
        self.zero_below = _last_zero(self.similarities, self.weights)

    def forward(self, similarity: Tensor) -> Tensor:
        """Return the weight of each similarity, in the same shape."""
        points, weights = (constant_like(tuple(of), similarity) for of in (self.similarities, self.weights))
        right = torch.searchsorted(points, similarity.contiguous()).clamp(1, len(points) - 1)
        share = ((similarity - points[right - 1]) / (points[right] - points[right - 1])).clamp(0, 1)
        return torch.lerp(weights[right - 1], weights[right], share)


def _last_zero(similarities: list[float], weights: list[float]) -> float:
    """Return the last similarity up to which all weights are 0."""
    zeros = next((k for k, weight in enumerate(weights) if weight > 0), len(weights))
    return similarities[zeros - 1] if zeros else -torch.inf


def _check_at_least_zero(name: str, value: float) -> float:
    if not 0 <= value < torch.inf:
        raise ValueError(f"Expected `{name}` of at least 0 but got {value}. Pass 0 or a positive number.")
    return value
