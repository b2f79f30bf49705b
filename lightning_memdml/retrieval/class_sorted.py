"""Embeddings ordered by class, so that the positives of a query are one run of the gallery."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memdml.retrieval.retrieval_sets import same_known_index
from lightning_memdml.retrieval.tiles import row_slices

FLOAT64_BUDGET = 2**20  # elements of a float64 temporary
PAIR_BUDGET = 2**16  # elements of a temporary that is read several times and should stay in the cache


class ClassSortedEmbeddings:
    """Embeddings ordered by label: unit rows in float32 for tiles, in float64 on demand.

    Args:
        embeddings: `(N, D)`, any floating type, any norm; kept by reference.
        labels: `(N,)` integers.
        keys: `(N,)` identity of the image of each row, -1 where unknown, or None where no row can meet itself.
        groups: `(N,)` group (camera) of each row, or None.
    """

    def __init__(
        self, embeddings: Tensor, labels: Tensor, keys: Tensor | None = None, groups: Tensor | None = None
    ) -> None:
        self.order = labels.argsort(stable=True)
        self.labels = labels[self.order]
        self.keys = None if keys is None else keys[self.order]
        self.groups = None if groups is None else groups[self.order]
        self._embeddings = embeddings
        self.unit = torch.empty(embeddings.shape, dtype=torch.float32, device=embeddings.device)
        for rows in row_slices(len(labels), max(1, FLOAT64_BUDGET // max(1, embeddings.shape[1]))):
            self.unit[rows] = self.exact(rows).float()

    def __len__(self) -> int:
        return len(self.labels)

    def exact(self, rows: Tensor | slice) -> Tensor:
        """Return unit rows in float64, divided by their float64 norm; a zero embedding stays zero."""
        raw = self._embeddings[self.order[rows]].double()
        return raw / raw.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def positive_similarities(
    queries: ClassSortedEmbeddings, gallery: ClassSortedEmbeddings, rows: slice
) -> tuple[Tensor, Tensor]:
    """Return the similarities of each query's positives, descending, padded with -inf to 2^m - 1, and their number."""
    labels = queries.labels[rows]
    start = torch.searchsorted(gallery.labels, labels)
    end = torch.searchsorted(gallery.labels, labels, right=True)
    largest = int((end - start).max())
    positives = start.new_full((len(labels), padded_width(largest)), -torch.inf, dtype=torch.float64)
    relevant = torch.zeros_like(start)
    chunks = list(row_slices(len(labels), max(1, min(128, FLOAT64_BUDGET // max(1, largest)))))
    lows = start[[chunk.start for chunk in chunks]].tolist()
    highs = end[[chunk.stop - 1 for chunk in chunks]].tolist()
    for chunk, low, high in zip(chunks, lows, highs, strict=True):
        if low == high:
            continue
        query = slice(rows.start + chunk.start, rows.start + chunk.stop)
        reference = start[chunk, None] + torch.arange(largest, device=start.device)
        inside = reference < end[chunk, None]
        reference = reference.clamp_(max=high - 1)
        similarity = exact_similarities(queries, query, gallery, slice(low, high)).gather(1, reference - low)
        counted = inside & ~_ignored(queries, query, gallery, reference)
        similarity.masked_fill_(~counted, -torch.inf)
        positives[chunk, :largest] = similarity.sort(dim=1, descending=True).values
        relevant[chunk] = counted.sum(1)
    return positives, relevant


def _ignored(queries: ClassSortedEmbeddings, rows: slice, gallery: ClassSortedEmbeddings, reference: Tensor) -> Tensor:
    """Return which same-class references of `rows` are the query's own image or of its group."""
    ignored = torch.zeros_like(reference, dtype=torch.bool)
    if queries.keys is not None and gallery.keys is not None:
        ignored |= same_known_index(queries.keys[rows, None], gallery.keys[reference])
    if queries.groups is not None and gallery.groups is not None:
        ignored |= queries.groups[rows, None] == gallery.groups[reference]
    return ignored


def exact_similarities(
    queries: ClassSortedEmbeddings, rows: slice, gallery: ClassSortedEmbeddings, columns: slice
) -> Tensor:
    """Return the float64 similarities of a block, without a float64 copy of a whole large class."""
    query = queries.exact(rows)
    size = max(1, FLOAT64_BUDGET // max(1, query.shape[1]))
    parts = row_slices(columns.stop - columns.start, size)
    references = (slice(columns.start + part.start, columns.start + part.stop) for part in parts)
    return torch.cat([query @ gallery.exact(part).T for part in references], dim=1)


def pair_similarities(
    queries: ClassSortedEmbeddings, query: Tensor, gallery: ClassSortedEmbeddings, reference: Tensor, *, exact: bool
) -> Tensor:
    """Return the similarity of each pair of positions, both `(P,)`, in float64 if `exact`, else in float32."""
    first, last, low, high = torch.stack([query.min(), query.max(), reference.min(), reference.max()]).tolist()
    last, high = last + 1, high + 1
    # A pair gathered and multiplied alone costs at least 32 times its share of a matrix product. A collapsed model or
    # binary codes, where all pairs are close, need the matrix product.
    if len(query) * 32 > (last - first) * (high - low):
        rows, columns = slice(first, last), slice(low, high)
        block = (
            exact_similarities(queries, rows, gallery, columns)
            if exact
            else queries.unit[rows] @ gallery.unit[columns].T
        )
        return block.flatten()[(query - first) * (high - low) + (reference - low)]

    def gathered(samples: ClassSortedEmbeddings, rows: Tensor) -> Tensor:
        return samples.exact(rows) if exact else samples.unit.index_select(0, rows)

    size = max(1, PAIR_BUDGET // max(1, queries.unit.shape[1]))
    parts = zip(query.split(size), reference.split(size), strict=True)
    return torch.cat([gathered(queries, q).mul_(gathered(gallery, r)).sum(1) for q, r in parts])


def largest_class(queries: ClassSortedEmbeddings, gallery: ClassSortedEmbeddings) -> int:
    """Return the largest number of references that share their label with one query."""
    start = torch.searchsorted(gallery.labels, queries.labels)
    return int((torch.searchsorted(gallery.labels, queries.labels, right=True) - start).max())


def padded_width(largest: int) -> int:
    """Return the next 2^m - 1, at least 1: with this row length the binary search needs no bounds check."""
    return 2 ** max(1, largest.bit_length()) - 1
