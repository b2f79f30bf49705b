"""`RetrievalMetrics`: the exact scores as a torchmetrics metric, equal on one rank and on many."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed
from torchmetrics import Metric

from lightning_memdml.checks import check_rows, check_types
from lightning_memdml.retrieval.ranking import QueryRanks, rank_queries
from lightning_memdml.retrieval.retrieval_sets import (
    UNKNOWN,
    as_integers,
    check_finite,
    check_recall_levels,
    first_of_each,
)

Role = Literal["both", "query", "gallery"]
Column = TypeVar("Column", Tensor, Tensor | None)
_ROLES: tuple[Role, ...] = ("both", "query", "gallery")
_NOT_GIVEN = -2  # in place of an index, a group or a gallery that was not given; -1 is an unknown index


class Samples(NamedTuple):
    """The rows that a metric was given, each image once.

    Attributes:
        embeddings: `(N, D)` float32, as they were given.
        labels: `(N,)`.
        indices: `(N,)` index of each image, -1 where unknown; None if no index is known.
        groups: `(N,)`, or None.
        query: Positions of the queries among the rows.
        gallery: Positions of the references.
        gallery_numbers: `(N,)` which of several galleries a reference belongs to; -2 for all.
    """

    embeddings: Tensor
    labels: Tensor
    indices: Tensor | None
    groups: Tensor | None
    query: Tensor
    gallery: Tensor
    gallery_numbers: Tensor


class RetrievalMetrics(Metric):
    """Exact recall at K, MAP@R and R-precision of a whole evaluation set; formulas: see `retrieval_scores`.

    Each rank keeps its own rows. At `compute` the ranks exchange them, each scores its share of the queries against the
    whole gallery, and they exchange the ranks found. So all return the values that one process would return. Embeddings
    are kept in float32 under any precision.

    Args:
        k: Recall levels, distinct positive integers.
        shared_indices: Whether queries and gallery are numbered together, so that a query does not find the reference
            of the same index. By default each role has its own numbers.
        mean_average_precision: Also compute the rank of every match, however deep; several times slower.
        galleries: Names of several galleries that the same queries search one by one: nested galleries of growing
            size, or repeated draws of one image per class. Scores are then called `<name>/recall_at_1` and so on.
        **kwargs: Of `torchmetrics.Metric`. `compute_on_cpu=True` keeps the rows, and does the scoring, on the
            CPU: it frees `4 * N * D` bytes of GPU memory between updates.

    Raises:
        TypeError: If `k` holds anything but integers.
        ValueError: If `k` is empty, repeats or is below 1, or two galleries have the same name.

    Example:
        >>> metrics = RetrievalMetrics(k=(1,))
        >>> metrics.update(torch.eye(3)[[0, 0]], torch.tensor([4, 4]), torch.tensor([0, 1]))
        >>> metrics.update(torch.eye(3)[[1, 2]], torch.tensor([5, 5]), torch.tensor([2, 3]))
        >>> metrics.compute()["recall_at_1"]
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    embeddings: list[Tensor]
    labels: list[Tensor]
    indices: list[Tensor]
    groups: list[Tensor]
    roles: list[Tensor]
    gallery_numbers: list[Tensor]

    def __init__(
        self,
        k: Sequence[int] = (1, 10, 100, 1000),
        shared_indices: bool = False,
        mean_average_precision: bool = False,
        galleries: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        check_types(RetrievalMetrics.__init__, locals(), "k")
        super().__init__(**{"dist_sync_fn": gather_rows, **kwargs})
        self.k = check_recall_levels(k)
        self.shared_indices = shared_indices
        self.mean_average_precision = mean_average_precision
        self.galleries = tuple(galleries or ())
        if len(set(self.galleries)) < len(self.galleries):
            raise ValueError(f"Expected `galleries` of distinct names but got {self.galleries}. Rename one.")
        for state in ("embeddings", "labels", "indices", "groups", "roles", "gallery_numbers"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices: Tensor | None = None,
        *,
        role: Role = "both",
        groups: Tensor | None = None,
        gallery: str | None = None,
    ) -> None:
        """Add a batch.

        Args:
            embeddings: `(B, D)`, any norm.
            labels: `(B,)` integers.
            indices: `(B,)` index of each image in its data set. With them, images that a distributed sampler repeated
                to pad count once; without, such a copy finds itself and inflates the scores. -1 means unknown: such an
                image equals no other.
            role: `"both"` for self-retrieval; `"query"` or `"gallery"` for two sets. Roles may be mixed: a query that
                is in the gallery too is `"both"`.
            groups: `(B,)` non-negative group, such as the camera: references of the query's label **and** group are
                left out.
            gallery: With `role="gallery"`, which of the `galleries` the batch belongs to; an image of two galleries
                is given to both. Images that are `"both"` are in every gallery.

        Raises:
            TypeError: If something is not a tensor or has the wrong dtype.
            ValueError: If shapes disagree, `role` or `gallery` is unknown, or `groups` are negative.
        """
        if role not in _ROLES:
            raise ValueError(
                f"Expected `role` to be one of {', '.join(map(repr, _ROLES))} but got {role!r}. Pass one of these."
            )
        number = self._gallery_number(role, gallery)
        check_rows("embeddings", embeddings)
        labels = as_integers("labels", labels, embeddings)
        indices = _or_not_given("indices", indices, embeddings).clamp_min(_NOT_GIVEN if indices is None else UNKNOWN)
        groups = _or_not_given("groups", groups, embeddings)
        if len(groups) and _NOT_GIVEN < int(groups.min()) < 0:
            raise ValueError(f"Expected `groups` of at least 0 but got {int(groups.min())}. Number them from 0.")
        self.embeddings.append(embeddings.detach().float())
        self.labels.append(labels)
        self.indices.append(indices)
        self.groups.append(groups)
        self.roles.append(torch.full_like(labels, _ROLES.index(role)))
        self.gallery_numbers.append(torch.full_like(labels, number))

    def _gallery_number(self, role: Role, gallery: str | None) -> int:
        if role == "gallery" and self.galleries:
            if gallery not in self.galleries:
                raise ValueError(
                    f"Expected `gallery` to be one of {', '.join(map(repr, self.galleries))} but got {gallery!r}. "
                    "Name the one that these images are in."
                )
            return self.galleries.index(gallery)
        if gallery is not None:
            raise ValueError(
                f'Expected `gallery` only with `role="gallery"` and `RetrievalMetrics(galleries=...)` but got '
                f"`gallery={gallery!r}` with the role {role!r} and the galleries {self.galleries}. Leave it out."
            )
        return _NOT_GIVEN

    def compute(self) -> dict[str, Tensor]:
        """Return each score as a float32 scalar; NaN if no query has a match, as in a short sanity check.

        Raises:
            ValueError: If embeddings are not finite (the images are named), or `indices` or `groups` were given in some
                updates and not in others.
        """
        return {
            f"{gallery}/{name}" if gallery else name: torch.tensor(float(value), device=self.device)
            for gallery in self.galleries or (None,)
            for name, value in self._rank(gallery).scores(self.k).items()
        }

    def ranks(self, gallery: str | None = None) -> QueryRanks:
        """Return the ranks counted for each query of all processes, for scores per class and confidence intervals.

        Every process has to call it. Its `rows` count the queries in the order of the updates.

        Args:
            gallery: Which of the `galleries`, if there are several.

        Raises:
            ValueError: As `compute`, or if `gallery` is none of them.

        Example:
            >>> metrics = RetrievalMetrics(k=(1,))
            >>> metrics.update(torch.eye(3)[[0, 0, 1, 2]], torch.tensor([4, 4, 5, 5]))
            >>> metrics.ranks().per_class()["recall_at_1"].tolist()
            [1.0, 0.0]
        """
        self._gallery_number("gallery", gallery)
        with self._exchanged():
            return self._rank(gallery)

    def samples(self) -> Samples:
        """Return the rows of all ranks, each image once. Every rank has to call it.

        Raises:
            ValueError: As `compute`.
        """
        with self._exchanged():
            return self._samples()

    def _exchanged(self) -> AbstractContextManager[None]:
        """Return a context in which the rows of this process are those of all."""
        return self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        )

    def _samples(self) -> Samples:
        labels, roles, numbers = _rows(self.labels), _rows(self.roles), _rows(self.gallery_numbers)
        indices, groups = _all_or_none(_rows(self.indices), "indices"), _all_or_none(_rows(self.groups), "groups")
        embeddings = _rows(self.embeddings) if len(labels) else torch.zeros(0, 1, device=labels.device)
        check_finite("embeddings", embeddings, indices)
        kept = torch.arange(len(labels), device=labels.device)
        if indices is not None:
            kept = _first_of_each_within_role(indices, labels, roles + len(_ROLES) * (numbers - _NOT_GIVEN))
        embeddings, labels, roles, numbers = (_at(column, kept) for column in (embeddings, labels, roles, numbers))
        query = (roles != _ROLES.index("gallery")).nonzero().squeeze(1)
        gallery = (roles != _ROLES.index("query")).nonzero().squeeze(1)
        return Samples(embeddings, labels, _at(indices, kept), _at(groups, kept), query, gallery, numbers)

    def _rank(self, searched: str | None) -> QueryRanks:
        embeddings, labels, indices, groups, query, gallery, numbers = self._samples()
        if searched is not None:
            part = numbers[gallery]
            gallery = gallery[(part == self.galleries.index(searched)) | (part == _NOT_GIVEN)]
        ranked = partial(rank_queries, depth=max(self.k), mean_average_precision=self.mean_average_precision)
        if not self._is_synced and len(query) == len(gallery) == len(labels):
            # Compared with itself, one set costs half of what two sets cost.
            return ranked(embeddings, labels, groups=groups)
        rank, world = 0, 1
        if self._is_synced:
            rank, world = distributed.get_rank(self.process_group), distributed.get_world_size(self.process_group)
        share = query[rank::world]
        # Repeats are gone, so the position identifies an image, unless a row of the other set may be the same image.
        identity = torch.arange(len(labels)).to(labels)
        if self.shared_indices and indices is not None:
            identity = _identities(indices)
        ranks = ranked(
            _at(embeddings, share),
            _at(labels, share),
            _at(embeddings, gallery),
            _at(labels, gallery),
            indices=_at(identity, share),
            gallery_indices=_at(identity, gallery),
            groups=_at(groups, share),
            gallery_groups=_at(groups, gallery),
        )
        return _joined(ranks, labels[query], self.process_group) if self._is_synced else ranks


def gather_rows(rows: Tensor, group: Any = None) -> list[Tensor]:
    """Gather the rows of every rank, in rank order; ranks may hold different numbers of them, or none.

    Unlike the default of torchmetrics it accepts a rank without rows, whose tensor has not the others' shape, and
    carries CPU tensors over a GPU-only backend by way of the GPU.
    """
    world = distributed.get_world_size(group)
    described: list[Any] = [None] * world
    distributed.all_gather_object(described, (tuple(rows.shape), rows.dtype), group=group)
    lengths = [shape[0] for shape, _ in described]
    shape, dtype = described[lengths.index(max(lengths))]
    device = torch.device("cuda") if distributed.get_backend(group) == "nccl" else rows.device
    sent = torch.zeros(shape, dtype=dtype, device=device)
    if len(rows):
        sent[: len(rows)] = rows
    received = [torch.empty_like(sent) for _ in range(world)]
    distributed.all_gather(received, sent, group=group)
    return [part[:length].to(rows.device) for part, length in zip(received, lengths, strict=True)]


def _joined(part: QueryRanks, labels: Tensor, group: Any) -> QueryRanks:
    """Return the counted ranks of all queries from the share of each process, which is `rank::world` of them."""
    full = part.r_precision if part.average_precision is None else part.average_precision
    columns = (part.relevant, part.best_rank, part.r_precision, part.average_precision_at_r, full)
    shares = gather_rows(torch.stack([column.double() for column in columns], dim=1), group)
    table = shares[0].new_empty(len(labels), len(columns))
    for rank, share in enumerate(shares):
        table[rank :: len(shares)] = share
    relevant, best, r_precision, at_r, full = table.unbind(1)
    average_precision = None if part.average_precision is None else full
    rows = torch.arange(len(labels), device=labels.device)
    return QueryRanks(rows, labels, relevant.long(), best.long(), r_precision, at_r, average_precision, part.depth)


def _rows(state: list[Tensor] | Tensor) -> Tensor:
    """Return a list state as one tensor: it is a list before processes have exchanged their rows, a tensor after."""
    if isinstance(state, Tensor):
        return state
    return torch.cat(state) if state else torch.zeros(0, dtype=torch.int64)


def _or_not_given(name: str, numbers: Tensor | None, embeddings: Tensor) -> Tensor:
    if numbers is None:
        return torch.full((len(embeddings),), _NOT_GIVEN, device=embeddings.device)
    return as_integers(name, numbers, embeddings)


def _all_or_none(numbers: Tensor, name: str) -> Tensor | None:
    absent = numbers == _NOT_GIVEN
    if absent.any() and not absent.all():
        raise ValueError(
            f"Expected `{name}` in every update or in none but got them for {int((~absent).sum())} of {len(numbers)} "
            "samples. Pass them in every `update`."
        )
    return None if (numbers < 0).all() else numbers


def _identities(indices: Tensor) -> Tensor:
    """Return numbers that are equal for rows of one known index, and of its own for each row of unknown index."""
    known, number = indices.unique(return_inverse=True)
    own = len(known) + torch.arange(len(indices), device=indices.device)
    return torch.where(indices < 0, own, number)


def _first_of_each_within_role(indices: Tensor, labels: Tensor, roles: Tensor) -> Tensor:
    """Return the positions to keep. An index counts within its role and gallery: query 5 and gallery 5 may differ."""
    kept = [labels[:0]]
    for role in roles.unique():
        rows = (roles == role).nonzero().squeeze(1)
        kept.append(rows[first_of_each(indices[rows], labels[rows])])
    return torch.cat(kept).sort().values


def _at(column: Column, rows: Tensor) -> Column:
    """Return the column at ascending, unique rows; without a copy, where these are all rows."""
    return column if column is None or len(rows) == len(column) else column[rows]
