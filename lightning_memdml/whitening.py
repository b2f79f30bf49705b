"""Whitening of embeddings, learned on those of the training images, and the decomposition that fitted heads share."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SHRINKAGE = 0.5  # chosen on validation classes of two sets of photographs; 0.3 to 0.7 differ by 2 points at most


def shrunk_eigenvectors(covariance: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    r"""Return the eigenvalues, ascending, and the eigenvectors of a covariance that is shrunk towards the identity.

    $$
    C' = (1 - a) C + a \, \mathrm{tr}(C) / F \cdot I
    $$

    The eigenvectors, divided by the roots of their eigenvalues, map data of covariance `C'` to the identity.

    Args:
        covariance: `(F, F)`.
        shrinkage: The share `a` of the identity, in [0, 1].

    Returns:
        `(F,)` values, and `(F, F)` vectors, one in each column.

    Example:
        >>> shrunk_eigenvectors(torch.diag(torch.tensor([1.0, 3.0])), shrinkage=0.5)[0]
        tensor([1.5000, 2.5000])
    """
    scale = covariance.diagonal().mean().clamp_min(1e-12)
    identity = torch.eye(len(covariance), dtype=covariance.dtype)
    values, vectors = torch.linalg.eigh((1 - shrinkage) * covariance + shrinkage * scale * identity)
    return values, vectors


class Whitening:
    r"""Maps unit embeddings to unit rows, after it made their spread equal in all directions.

    With the mean $\mu$ and the covariance of the training embeddings, shrunk towards the identity, an embedding $x$
    becomes $W (x - \mu)$, divided by its norm. The rows of $W$ are the directions of largest variance (PCA), scaled
    so that the shrunk covariance becomes the identity.

    Args:
        mean: `(D,)`.
        weight: `(K, D)`, the rows of $W$.

    Source:
        Jegou and Chum, Negative Evidences and Co-occurences in Image Retrieval: The Benefit of PCA and Whitening,
        ECCV 2012.

    Example:
        >>> training = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
        >>> Whitening.fit(training, dim=2)(torch.eye(4)).shape
        torch.Size([4, 2])
    """

    def __init__(self, mean: Tensor, weight: Tensor) -> None:
        self.mean, self.weight = mean, weight

    @classmethod
    def fit(cls, embeddings: Tensor, dim: int | None = None, shrinkage: float = SHRINKAGE) -> Whitening:
        """Learn a whitening.

        Args:
            embeddings: `(N, D)` of the training images, any norm; they are divided by it first.
            dim: Number K of directions that are kept, those of largest variance; by default all D.
            shrinkage: Share of the identity in the covariance, in [0, 1). The fewer images, the more of it helps. With
                0 the whitened training images have exactly the identity as covariance.

        Raises:
            ValueError: If `dim` or `shrinkage` is out of range, values are not finite, or the images vary in fewer
                than `dim` directions and nothing is shrunk.
        """
        count, width = embeddings.shape
        kept = width if dim is None else dim
        if not 1 <= kept <= width:
            raise ValueError(
                f"Expected to keep 1 to {width} dimensions, the width of the embedding, but got {kept}. Pass fewer."
            )
        if not 0 <= shrinkage < 1:
            raise ValueError(f"Expected `shrinkage` in [0, 1) but got {shrinkage}. Pass {SHRINKAGE}, for example.")
        if count < 2 or not bool(embeddings.isfinite().all()):
            raise ValueError(
                f"Expected finite embeddings of at least two training images to whiten but got {count} of which "
                f"{int((~embeddings.isfinite().all(1)).sum())} are not finite. Pass others."
            )
        rows = F.normalize(embeddings.detach().cpu().double(), dim=1)
        mean = rows.mean(dim=0)
        centred = rows - mean
        values, vectors = shrunk_eigenvectors(centred.T @ centred / (count - 1), shrinkage)
        varied = int((values > 1e-12 * values[-1]).sum()) if values[-1] > 0 else 0
        if varied < kept:
            raise ValueError(
                f"Expected training images that vary in {kept} directions but these {count:,} vary in {varied}. Pass a "
                f"`shrinkage` above 0, or keep {varied} dimensions at most."
            )
        weight = (vectors / values.sqrt())[:, -kept:].flip(1).T
        # The sign of an eigenvector is arbitrary: the largest entry is made positive.
        return cls(mean, weight * weight.gather(1, weight.abs().argmax(dim=1, keepdim=True)).sign())

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Return unit rows `(N, K)` of embeddings `(N, D)` of any norm, in their type.

        Raises:
            ValueError: If the embeddings are of another dimension.
        """
        if embeddings.shape[-1] != len(self.mean):
            raise ValueError(
                f"Expected embeddings of dimension {len(self.mean)}, as those that the whitening was learned on, but "
                f"got {embeddings.shape[-1]}. Embed both with one network."
            )
        rows = F.normalize(embeddings, dim=1) - self.mean.to(embeddings)
        return F.normalize(rows @ self.weight.to(embeddings).T, dim=1)

    def digest(self) -> str:
        """Return a digest of the mean and the weight."""
        return hashlib.sha256(self._rows().tobytes()).hexdigest()

    def _rows(self) -> np.ndarray:
        return torch.cat([self.mean[None], self.weight]).numpy()

    def save(self, path: Path) -> None:
        """Write the whitening to a `.npy` file: the mean, then the rows of the weight."""
        buffer = io.BytesIO()  # by way of memory: numpy's file writer does not report a full disk as such
        np.save(buffer, self._rows())
        path.write_bytes(buffer.getbuffer())

    @classmethod
    def load(cls, path: Path) -> Whitening:
        """Read what `save` wrote.

        Raises:
            OSError: If there is no such file.
            ValueError: If it is damaged.
        """
        rows = torch.from_numpy(np.load(path, allow_pickle=False))
        if rows.ndim != 2 or len(rows) < 2 or rows.dtype != torch.float64:
            raise ValueError(f"{path.name} holds {tuple(rows.shape)} {rows.dtype}")
        if not bool(rows.isfinite().all()):
            raise ValueError(f"{path.name} holds NaN or infinity")
        return cls(rows[0], rows[1:])
