"""Heads and pooling: how the features of a backbone become embeddings, and how a linear head is initialised.

A linear head with random weights loses much of what a pretrained backbone has learnt, and a short training cannot
repair it. A head that is fitted in closed form to the features of the training images starts at or above the features
themselves.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_memdml.checks import check_types
from lightning_memdml.whitening import SHRINKAGE, shrunk_eigenvectors

Pooling = Literal["average", "maximum", "both", "gem", "token"]
HeadInit = Literal["default", "kaiming", "orthogonal", "pca", "whitening"]
FITTED: tuple[HeadInit, ...] = ("pca", "whitening")


class GeneralizedMeanPool(nn.Module):
    r"""Pools a feature map by a generalised mean with a learned exponent.

    $$
    f_c = \Big(\frac{1}{HW} \sum_{h, w} \max(x_{chw}, \epsilon)^p\Big)^{1/p}
    $$

    `p = 1` is the average, `p \to \infty` the maximum.

    Args:
        p: First value of the exponent, above 0.
        eps: Lower bound of the features, above 0.

    Example:
        >>> GeneralizedMeanPool(p=1.0)(torch.ones(2, 8, 7, 7)).shape
        torch.Size([2, 8])

    References:
        Radenovic et al. 2018, arXiv 1711.02512.
    """

    def __init__(self, p: float = 3.0, eps: float = 1e-6) -> None:
        check_types(GeneralizedMeanPool.__init__, locals())
        super().__init__()
        if not (p > 0 and eps > 0):
            raise ValueError(f"Expected `p` and `eps` above 0 but got p={p} and eps={eps}. Pass positive numbers.")
        self.p = nn.Parameter(torch.tensor(float(p)))
        self.eps = eps

    def forward(self, features: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C)`, in at least float32 under any precision."""
        at_least_float32 = torch.promote_types(features.dtype, torch.float32)
        powers = features.to(at_least_float32).clamp_min(self.eps) ** self.p
        return powers.mean(dim=(2, 3)) ** (1 / self.p)


class Pool(nn.Module):
    """Pools a feature map `(B, C, H, W)`, or the tokens `(B, N, C)` of a transformer, to one row per image.

    Args:
        kind: `average`, `maximum`, `both` (concatenated, which doubles the width) or `gem`, over all places or all
            tokens, the class token among them; or `token`, the first token, which is the class token.

    Raises:
        ValueError: For another kind; for a feature map, if the kind is `token`.

    Example:
        >>> Pool("both")(torch.zeros(2, 8, 7, 7)).shape
        torch.Size([2, 16])
        >>> Pool("token")(torch.zeros(2, 50, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(self, kind: Pooling = "average") -> None:
        super().__init__()
        if kind not in get_args(Pooling):
            raise ValueError(
                f"Expected `pooling` to be one of {', '.join(get_args(Pooling))} but got {kind!r}. Pass one of these."
            )
        self.kind = kind
        self.gem = GeneralizedMeanPool() if kind == "gem" else None

    @property
    def factor(self) -> int:
        """By how much the width grows."""
        return 2 if self.kind == "both" else 1

    def forward(self, features: Tensor) -> Tensor:
        """Map `(B, C, H, W)` or `(B, N, C)` to `(B, factor * C)`."""
        if self.kind == "token":
            if features.ndim != 3:
                raise ValueError(
                    f"Expected tokens (B, N, F) for `pooling: token` but got {tuple(features.shape)}. Use `average`."
                )
            return features[:, 0]
        if features.ndim == 3:
            features = features.transpose(1, 2).unsqueeze(-1)  # (B, C, N, 1)
        if self.gem is not None:
            return self.gem(features)
        pooled = []
        if self.kind in ("average", "both"):
            pooled.append(features.mean(dim=(2, 3)))
        if self.kind in ("maximum", "both"):
            pooled.append(features.amax(dim=(2, 3)))
        return torch.cat(pooled, dim=1)


def initialize_head(head: nn.Linear, init: HeadInit) -> None:
    """Initialise a linear head in place; a fitted one (`pca`, `whitening`) stays as it is until it is fitted.

    Args:
        head: The layer.
        init: `default` (that of `torch.nn.Linear`), `kaiming` (normal, fan-out, zero bias: the head of XBM's authors),
            `orthogonal` (zero bias), `pca` or `whitening`.

    Raises:
        ValueError: For another name.
    """
    if init not in get_args(HeadInit):
        raise ValueError(
            f"Expected `head_init` to be one of {', '.join(get_args(HeadInit))} but got {init!r}. Pass one of these."
        )
    if init == "kaiming":
        nn.init.kaiming_normal_(head.weight, mode="fan_out")
    if init == "orthogonal":
        nn.init.orthogonal_(head.weight)
    if init in ("kaiming", "orthogonal"):
        nn.init.zeros_(head.bias)


class FeatureStatistics:
    """Sums over the features of training images, from which a head is fitted.

    They add up over batches and over ranks, so that the features themselves need not be kept. All sums are float64.

    Args:
        num_features: Width F of the features.
        num_classes: Number C of classes. Labels are in [0, C).

    Example:
        >>> statistics = FeatureStatistics(num_features=3, num_classes=2)
        >>> statistics.add(torch.randn(8, 3), torch.arange(8) // 4)
        >>> [tuple(part.shape) for part in statistics.sums()]
        [(3, 3), (2, 3), (2,)]
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        self.products = torch.zeros(num_features, num_features, dtype=torch.float64)  # sum of x x^T
        self.class_sums = torch.zeros(num_classes, num_features, dtype=torch.float64)
        self.class_counts = torch.zeros(num_classes, dtype=torch.float64)

    @classmethod
    def from_sums(cls, products: Tensor, class_sums: Tensor, class_counts: Tensor) -> FeatureStatistics:
        """Return statistics with what `sums` returned."""
        statistics = cls(len(products), len(class_counts))
        for total, given in zip(statistics.sums(), (products, class_sums, class_counts), strict=True):
            total.copy_(given)
        return statistics

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums `(F, F)`, `(C, F)` and `(C,)`, which ranks add up."""
        return self.products, self.class_sums, self.class_counts

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch of features `(B, F)` with labels `(B,)`.

        Raises:
            ValueError: If features are not finite.
        """
        rows = features.detach().cpu().double()
        if not bool(rows.isfinite().all()):
            raise ValueError("Expected finite features to fit the head but got NaN or infinity. Check the weights.")
        self.products.addmm_(rows.T, rows)
        self.class_sums.index_add_(0, labels.cpu(), rows)
        self.class_counts += torch.bincount(labels.cpu(), minlength=len(self.class_counts))

    def covariances(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean `(F,)`, the covariance of all images `(F, F)`, and that within classes `(F, F)`.

        Raises:
            ValueError: If no class has two images.
        """
        number, present = float(self.class_counts.sum()), self.class_counts > 0
        within_freedom = number - int(present.sum())
        if within_freedom < 1:
            raise ValueError(
                "Expected training classes with at least two images, to fit the head, but got none. "
                "Pass `head_init='default'`."
            )
        mean = self.class_sums.sum(dim=0) / number
        class_means = self.class_sums[present] / self.class_counts[present, None]
        between = class_means.T @ (self.class_counts[present, None] * class_means)
        total = self.products - number * torch.outer(mean, mean)
        return mean, total / (number - 1), (self.products - between) / within_freedom


@torch.no_grad()
def fit_head(head: nn.Linear, statistics: FeatureStatistics, init: HeadInit, shrinkage: float = SHRINKAGE) -> None:
    r"""Set a linear head to the closed form of PCA, or of whitening within classes.

    With the mean $\mu$, the covariance $T$ of all images and the covariance $S$ within classes:

    - `pca`: the rows of $W$ are the eigenvectors of $T$ with the largest eigenvalues;
    - `whitening`: $S$ is shrunk towards the identity, $S' = (1 - a) S + a \, \mathrm{tr}(S) / F \cdot I$, and the rows
      of $W$ are the directions with the largest ratio of total to within-class variance, scaled so that $S'$ becomes
      the identity.

    The bias is $-W \mu$, so that the head maps features $x$ to $W (x - \mu)$. If the embedding is wider than the
    features, the remaining rows are zero.

    Args:
        head: The layer, `(D, F)` with a bias.
        statistics: Sums over the training images.
        init: `pca` or `whitening`.
        shrinkage: The share $a$ of the identity, in (0, 1].
    """
    mean, total, within = statistics.covariances()
    if init == "pca":
        axes = torch.linalg.eigh(total).eigenvectors.flip(1)
    else:
        values, vectors = shrunk_eigenvectors(within, shrinkage)
        whiten = vectors / values.sqrt()
        axes = whiten @ torch.linalg.eigh(whiten.T @ total @ whiten).eigenvectors.flip(1)
    rows = axes[:, : head.out_features].T
    # The sign of an eigenvector is arbitrary: the largest entry is made positive.
    rows = rows * rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).sign()
    head.weight.zero_()
    head.bias.zero_()
    head.weight[: len(rows)] = rows.to(head.weight)
    head.bias[: len(rows)] = -(rows @ mean).to(head.bias)
