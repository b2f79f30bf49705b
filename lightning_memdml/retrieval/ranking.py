"""Retrieval scores from exact ranks: R@K for any K, MAP@R, R-precision, mAP; per class; intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memdml.checks import check_types
from lightning_memdml.retrieval.class_sorted import ClassSortedEmbeddings
from lightning_memdml.retrieval.counting import Progress, count_ranks
from lightning_memdml.retrieval.retrieval_sets import RetrievalSet, check_recall_levels, check_sets


@dataclass(frozen=True)
class QueryRanks:
    """The ranks counted for each query; every score is a mean over the queries that have a match.

    Attributes:
        rows: `(Q,)` position of each query in the given embeddings, duplicates left out, ascending.
        labels: `(Q,)` label of each query.
        relevant: `(Q,)` number `r` of its matches in the gallery, its own image and ignored group left out.
        best_rank: `(Q,)` 1-based rank of the best match; `depth + 1` for any rank beyond `depth`. Undefined where
            `relevant` is 0.
        r_precision: `(Q,)` matches among the first `r` references, divided by `r`.
        average_precision_at_r: `(Q,)` precision summed over the matches among the first `r` references, divided by `r`.
        average_precision: `(Q,)` precision summed over all matches, divided by `r`; None unless asked for.
        depth: Largest exact rank, and the largest K of a recall.
    """

    rows: Tensor
    labels: Tensor
    relevant: Tensor
    best_rank: Tensor
    r_precision: Tensor
    average_precision_at_r: Tensor
    average_precision: Tensor | None
    depth: int

    def scores(self, k: Sequence[int] = (1, 10, 100, 1000)) -> dict[str, float]:
        """Return means over the queries with a match, and how many those are; see `retrieval_scores`.

        Raises:
            ValueError: If a K exceeds `depth`.
        """
        values, _ = self._matched_values(k)
        means = {name: value.mean().item() for name, value in values.items()}
        matched = int((self.relevant > 0).sum())
        return {**means, "queries": matched, "excluded": len(self.relevant) - matched}

    def per_class(self, k: Sequence[int] = (1,)) -> dict[str, Tensor]:
        """Return the same means for each class: columns `label`, `queries` and one per score, all `(classes,)`."""
        values, labels = self._matched_values(k)
        classes, sums, sizes = _class_sums(values, labels)
        means = {name: column / sizes for name, column in zip(values, sums, strict=True)}
        return {"label": classes, "queries": sizes.long(), **means}

    def confidence_intervals(
        self,
        k: Sequence[int] = (1, 10, 100, 1000),
        *,
        confidence: float = 0.95,
        resamples: int = 1000,
        seed: int = 0,
    ) -> dict[str, tuple[float, float]]:
        """Return percentile bootstrap intervals of each score, with **classes** drawn with replacement.

        Queries of one class depend on each other, since they are each other's matches. Drawing queries would give
        intervals that are too narrow.

        Args:
            k: Recall levels.
            confidence: Mass of the interval, in (0, 1).
            resamples: Number of bootstrap samples.
            seed: Seed of the draws.

        Raises:
            ValueError: If `confidence` or `resamples` is out of range.
        """
        if not 0 < confidence < 1 or resamples < 1:
            raise ValueError(
                f"Expected 0 < confidence < 1 and resamples >= 1 but got {confidence=} and {resamples=}. "
                "Pass 0.95 and 1000, for example."
            )
        values, labels = self._matched_values(k)
        _, sums, sizes = _class_sums(values, labels)
        if len(sizes) == 0:
            return dict.fromkeys(values, (float("nan"), float("nan")))
        sums, sizes = sums.cpu(), sizes.cpu()
        generator = torch.Generator().manual_seed(seed)
        means = torch.empty(resamples, len(values), dtype=torch.float64)
        for sample in means:
            drawn = torch.randint(len(sizes), (len(sizes),), generator=generator)
            sample.copy_(sums[:, drawn].sum(1) / sizes[drawn].sum())
        tail = (1 - confidence) / 2
        low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0).tolist()
        return dict(zip(values, zip(low, high, strict=True), strict=True))

    def _matched_values(self, k: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the values of each score for the queries with a match, in float64, and those queries' labels."""
        k = check_recall_levels(k)
        if max(k) > self.depth:
            raise ValueError(
                f"Expected `k` of at most {self.depth}, the depth of these ranks, but got {max(k)}. Rank with "
                f"depth={max(k)}."
            )
        matched = self.relevant > 0
        values = {f"recall_at_{level}": self.best_rank <= level for level in k}
        values |= {"map_at_r": self.average_precision_at_r, "r_precision": self.r_precision}
        if self.average_precision is not None:
            values["mean_average_precision"] = self.average_precision
        return {name: value[matched].double() for name, value in values.items()}, self.labels[matched]


def retrieval_scores(
    embeddings: Tensor,
    labels: Tensor,
    gallery_embeddings: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    k: Sequence[int] = (1, 10, 100, 1000),
    indices: Tensor | None = None,
    gallery_indices: Tensor | None = None,
    groups: Tensor | None = None,
    gallery_groups: Tensor | None = None,
    mean_average_precision: bool = False,
) -> dict[str, float]:
    r"""Score nearest-neighbour retrieval by cosine similarity, exactly.

    With `rank_i` the rank of the i-th best of the `r` matches of a query,

    - `recall_at_<k>` = mean over queries of `[rank_1 <= k]`,
    - `map_at_r` = mean of `(1/r) sum_{i: rank_i <= r} i / rank_i`,
    - `r_precision` = mean of `(1/r) #{i: rank_i <= r}`,
    - `mean_average_precision` (if asked for) = mean of `(1/r) sum_i i / rank_i`.

    Similarities are compared in float64 and **ties count against the model**: a reference of another label that is as
    similar as a match ranks before it, so a collapsed model scores about 0. A zero embedding has similarity 0 to
    everything. Without a gallery the embeddings are compared with each other, excluding self-matches. A recall at K
    beyond the gallery's size is 1, since every query that is scored has a match.

    The cost is half a float32 matrix product of the two sets in self-retrieval, and one between two sets. It falls to
    half of that on processors with bfloat16 products (AVX512-BF16) when positives are well separated. The memory is a
    copy of the embeddings and one tile. It runs on the embeddings' device (on the CPU for devices without float64).

    Args:
        embeddings: `(N, D)` queries, any norm; in self-retrieval the gallery too.
        labels: `(N,)` integers.
        gallery_embeddings: `(M, D)`, or None for self-retrieval.
        gallery_labels: `(M,)`.
        k: Recall levels.
        indices: `(N,)` index of each image, -1 where unknown. Repeats, with which a distributed sampler pads, count
            once.
        gallery_indices: `(M,)` indices of the gallery. If both are given, a query does not find its own index.
        groups: `(N,)` group, such as the camera, of each query: references of the same label **and** group are left
            out, as in re-identification.
        gallery_groups: `(M,)`, needed with `groups` when there is a gallery.
        mean_average_precision: Also compute the rank of every match, however deep; several times slower.

    Returns:
        The scores, in [0, 1]; `queries`, how many were scored; `excluded`, how many had no match and were left out of
        every mean. Without any query to score the means are NaN.

    Raises:
        TypeError: If an argument is not a tensor or has the wrong dtype.
        ValueError: If shapes disagree, values are not finite (the rows are named), or one index has two labels.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.6, 0.8], [0.5, 0.5]])
        >>> labels = torch.tensor([0, 0, 1, 1, 2])
        >>> scores = retrieval_scores(embeddings, labels, k=(1, 2))
        >>> scores["recall_at_1"], scores["recall_at_2"], scores["queries"], scores["excluded"]
        (0.75, 1.0, 4, 1)
    """
    k = check_recall_levels(k)
    ranks = rank_queries(
        embeddings,
        labels,
        gallery_embeddings,
        gallery_labels,
        depth=max(k),
        indices=indices,
        gallery_indices=gallery_indices,
        groups=groups,
        gallery_groups=gallery_groups,
        mean_average_precision=mean_average_precision,
    )
    return ranks.scores(k)


@torch.no_grad()
def rank_queries(
    embeddings: Tensor,
    labels: Tensor,
    gallery_embeddings: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    depth: int = 1000,
    indices: Tensor | None = None,
    gallery_indices: Tensor | None = None,
    groups: Tensor | None = None,
    gallery_groups: Tensor | None = None,
    mean_average_precision: bool = False,
    tile_size: int | None = None,
    progress: Progress | None = None,
) -> QueryRanks:
    """Count the ranks of every query, from which `retrieval_scores` takes the means.

    Args:
        embeddings: See `retrieval_scores`, as for every argument without a description here.
        labels: `(N,)`.
        gallery_embeddings: `(M, D)`.
        gallery_labels: `(M,)`.
        depth: Largest exact rank of the best match.
        indices: `(N,)`.
        gallery_indices: `(M,)`.
        groups: `(N,)`.
        gallery_groups: `(M,)`.
        mean_average_precision: Fill `average_precision` as well.
        tile_size: Side of the similarity tiles; by default 1024 on a CPU (4 MB), 2048 with several threads (16 MB), and
            4096 on a GPU (64 MB).
        progress: Called now and then with the number of similarities computed so far and the number of all: for a bar.

    Raises:
        TypeError: As `retrieval_scores`.
        ValueError: As `retrieval_scores`.

    Example:
        >>> ranks = rank_queries(torch.eye(3)[[0, 0, 1, 2]], torch.tensor([0, 0, 1, 1]))
        >>> ranks.best_rank.tolist()
        [1, 1, 3, 3]
        >>> ranks.per_class()["recall_at_1"].tolist()
        [1.0, 0.0]
    """
    check_types(rank_queries, locals())
    (depth,) = check_recall_levels((depth,), name="depth")
    queries, gallery = check_sets(
        *(embeddings, labels, indices, groups),
        *(gallery_embeddings, gallery_labels, gallery_indices, gallery_groups),
    )
    return _rank(queries, gallery, depth, mean_average_precision, tile_size, progress)


def _rank(
    queries: RetrievalSet,
    gallery: RetrievalSet | None,
    depth: int,
    every_positive: bool,
    tile_size: int | None,
    progress: Progress | None = None,
) -> QueryRanks:
    searched = queries if gallery is None else gallery
    if len(queries.rows) == 0 or len(searched.rows) == 0:
        return _without_matches(queries, depth, every_positive)
    # In self-retrieval the position identifies a row, since repeats of an image are removed already.
    own = ClassSortedEmbeddings(
        queries.embeddings,
        queries.labels,
        queries.rows if gallery is None else queries.indices,
        queries.groups,
    )
    other = (
        own
        if gallery is None
        else ClassSortedEmbeddings(gallery.embeddings, gallery.labels, gallery.indices, gallery.groups)
    )
    counted = count_ranks(
        own, other, depth=depth, every_positive=every_positive, tile_size=tile_size, progress=progress
    )
    relevant, best, r_precision, at_r, full = (_unsorted(column, own.order) for column in counted)
    average_precision = full if every_positive else None
    return QueryRanks(queries.rows, queries.labels, relevant, best, r_precision, at_r, average_precision, depth)


def _without_matches(queries: RetrievalSet, depth: int, every_positive: bool) -> QueryRanks:
    none = torch.zeros_like(queries.labels)
    unknown = none.double() * torch.nan
    return QueryRanks(
        queries.rows, queries.labels, none, none, unknown, unknown, unknown if every_positive else None, depth
    )


def _unsorted(column: Tensor, order: Tensor) -> Tensor:
    result = torch.empty_like(column)
    result[order] = column
    return result


def _class_sums(values: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the classes `(C,)`, sums of each value `(values, C)`, and queries per class `(C,)`."""
    classes, place = labels.unique(return_inverse=True)
    stacked = torch.stack(list(values.values()))
    sums = stacked.new_zeros(len(values), len(classes)).index_add_(1, place, stacked)
    return classes, sums, torch.bincount(place, minlength=len(classes)).double()
