"""A map of embeddings: each image is a point of the plane, near to similar images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_memdml.atomic_write import atomic_write
from lightning_memdml.checks import check_types
from lightning_memdml.picture_style import INK, STYLES, as_label, new_figure
from lightning_memdml.retrieval.cells import ClassNames, name_of
from lightning_memdml.retrieval.retrieval_sets import as_integers, check_finite_embeddings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Method = Literal["pca", "umap"]
_OTHERS = "#b9bfca"
# Classes with a colour and a mark of their own; more could not be distinguished.
_CLASSES = [*STYLES, *(style._replace(mark=mark) for style, mark in zip(STYLES, "*<>", strict=False))]


@torch.no_grad()
def map_points(embeddings: Tensor, method: Method = "pca", *, seed: int = 0) -> tuple[Tensor, tuple[float, ...]]:
    """Place unit embeddings in the plane.

    Args:
        embeddings: `(N, D)`, any norm, finite; D at least 2.
        method: `"pca"`: the two directions of largest variance, each turned so that its largest part is positive.
            `"umap"` (McInnes et al. 2018, arXiv 1802.03426; extra `umap`) keeps neighbours together.
        seed: Of UMAP.

    Returns:
        Points `(N, 2)`, and for PCA the share of the variance on each axis.

    Raises:
        ImportError: If UMAP is asked for and not installed.
        TypeError: If `embeddings` is not a floating-point tensor.
        ValueError: If there are fewer than 3 rows or 2 dimensions, a row is not finite, or `method` is unknown.

    Example:
        >>> points, shares = map_points(torch.eye(4)[[0, 0, 1, 2]])
        >>> points.shape, len(shares)
        (torch.Size([4, 2]), 2)
    """
    check_types(map_points, locals(), "method")
    check_finite_embeddings("embeddings", embeddings)
    if len(embeddings) < 3 or embeddings.shape[1] < 2:
        raise ValueError(
            f"Expected at least 3 embeddings of 2 dimensions to map but got {tuple(embeddings.shape)}. Pass more."
        )
    unit = F.normalize(embeddings.detach().cpu().float(), dim=1)
    if method == "umap":
        return _umap(unit, seed), ()
    if method != "pca":
        raise ValueError(f"Expected `method` to be 'pca' or 'umap' but got {method!r}. Pass one of these.")
    centred = unit - unit.mean(0)
    variance, directions = torch.linalg.eigh(centred.T.double() @ centred.double())
    axes = directions[:, [-1, -2]]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    points = centred @ (axes * largest.sign()).float()
    shares = (variance[[-1, -2]] / variance.sum().clamp_min(torch.finfo(torch.float64).tiny)).tolist()
    return points, tuple(shares)


def _umap(unit: Tensor, seed: int) -> Tensor:
    try:
        import umap
    except ImportError as error:
        raise ImportError(
            "Expected umap-learn but it is not installed. `pip install \"lightning-memdml[umap]\"`, or take 'pca'."
        ) from error
    neighbours = min(15, len(unit) - 1)
    layout = umap.UMAP(metric="cosine", random_state=seed, n_neighbors=neighbours, n_jobs=1).fit_transform(unit.numpy())
    return torch.from_numpy(np.asarray(layout, dtype=np.float32))


def save_map(
    path: str | Path,
    embeddings: Tensor,
    labels: Tensor,
    *,
    method: Method = "pca",
    class_names: ClassNames = None,
    title: str = "",
    seed: int = 0,
) -> Path:
    """Draw the map of embeddings (`.png`, `.pdf`, `.svg`): the ten largest classes in colour, the others in grey.

    Args:
        path: The file; folders are made.
        embeddings: `(N, D)`.
        labels: `(N,)` integers.
        method: See `map_points`.
        class_names: Name of each label.
        title: A heading.
        seed: Of UMAP.

    Raises:
        ImportError: As `map_points`.
        ValueError: As `map_points`, or if the ending is unknown or shapes disagree.
    """
    path = Path(path)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"Expected a path ending in .png, .pdf or .svg but got {path.name!r}. Pass map.png.")
    points, shares = map_points(embeddings, method, seed=seed)
    figure = _figure(points, as_integers("labels", labels, embeddings).cpu(), class_names, title, method, shares)
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, dpi=130)
    return path


def _figure(
    points: Tensor, labels: Tensor, class_names: ClassNames, title: str, method: Method, shares: tuple[float, ...]
) -> Figure:
    classes, sizes = labels.unique(return_counts=True)
    named = classes[sizes.argsort(descending=True, stable=True)[: len(_CLASSES)]]
    figure = new_figure(7.4, 5.2)
    axes = figure.add_subplot()
    size = float(np.clip(4000 / len(points), 3, 30))
    others = ~torch.isin(labels, named)
    if others.any():
        text = f"{len(classes) - len(named)} more classes"
        axes.scatter(points[others, 0], points[others, 1], s=size, color=_OTHERS, linewidths=0, label=text)
    for place, label in enumerate(named.tolist()):
        own, style = points[labels == label], _CLASSES[place]
        shown = as_label(name_of(label, class_names), width=28)
        axes.scatter(
            own[:, 0], own[:, 1], s=2.5 * size, color=style.color, marker=style.mark, linewidths=0, label=shown
        )
    axes.set(xticks=[], yticks=[])
    if shares:
        axes.set_xlabel(f"first axis, {shares[0]:.0%} of the variance", color=INK, fontsize=9)
        axes.set_ylabel(f"second axis, {shares[1]:.0%}", color=INK, fontsize=9)
    axes.spines[:].set_color(_OTHERS)
    axes.set_title(
        as_label(title) or f"{method.upper()} of {len(points):,} embeddings", loc="left", color=INK, fontsize=11
    )
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, labelcolor=INK)
    return figure
