"""Finds the references that share a class or an image with the batch, and compares the anchors with them.

They are few, and among them are the positives, other negatives, and pairs of an image with itself.

- A CPU computes the positive pairs here, one by one. The blocks of all references then leave out the pairs that are
  not negatives. To compare all anchors with all shared references takes a sixth of a step where an anchor has a hundred
  positives.
- A GPU compares all anchors with all shared references under masks, since the host would have to wait for the number of
  pairs. The blocks then leave out these references.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_memdml import compat
from lightning_memdml.losses.definition import Context, LossDefinition, Pairs, pair_masks
from lightning_memdml.losses.listed_pairs import ListedPairs, flatnonzero, list_pairs
from lightning_memdml.losses.row_ops import HOST_DEVICES

GPU_BLOCK_ELEMENTS = 1 << 24  # similarities of a block on a GPU, where a block costs a dozen kernel launches
MAX_PAIRS_PER_CHUNK = 1 << 19  # pairs of anchors and shared references that are held at once; on a GPU a block of them
HASH_SIZE = 1 << 16


class SharedReferences(NamedTuple):
    """The references that share a class or an image with the batch.

    Attributes:
        mask: Which they are, `(M,)`. With a few others, whose hash is the same.
        columns: Their numbers, ascending, `(Q,)`. For the kernels of Triton the last ones may be -1, for none.
        valid: False where `columns` is padding, `(Q,)`; `None` where there is no padding other than -1.
    """

    mask: Tensor
    columns: Tensor
    valid: Tensor | None


class LeftOut:
    """What the blocks of references have to leave out.

    Args:
        is_shared: Which references are shared, `(M,)`.
        pairs: The pairs to leave out, of anchors and all references. `None`: every pair with a shared reference.
    """

    def __init__(self, is_shared: Tensor, pairs: ListedPairs | None) -> None:
        self.is_shared, self._pairs = is_shared, None
        if pairs is not None:
            columns, order = pairs.columns.sort(stable=True)
            self._pairs = pairs.rows.index_select(0, order), columns, columns.numpy()

    def in_block(self, block: slice, kept: Tensor | None = None) -> Tensor | None:
        """Return what to leave out of a block of n references, in the form that `fill` takes.

        Args:
            block: Which references.
            kept: Those of them that make up the n references, ascending, all shared ones included. `None` for all.

        Returns:
            The numbers of the pairs, `row * n + column`; or the mask of whole columns `(n,)`; or `None` for nothing.
        """
        is_shared = self.is_shared[block]
        if self._pairs is None:
            return is_shared if kept is None else is_shared[kept]
        rows, columns, in_order = self._pairs
        first, last = in_order.searchsorted((block.start, block.stop))
        if first == last:
            return None
        columns, width = columns[first:last] - block.start, len(is_shared)
        if kept is not None:
            columns, width = torch.searchsorted(kept, columns), len(kept)
        return columns.add_(rows[first:last], alpha=width)


class SharedBlock(NamedTuple):
    """Anchors beside their shared references.

    Attributes:
        rows: The number of each anchor in the batch, `(B,)`, or all of them as a slice.
        anchors: `(B, D)`.
        shared: Which references are shared, Q of them.
        references: These, `(Q, D)`; on a CPU all references, `(M, D)`, where that saves to copy them.
        similarity: Similarities to P candidates for positives, `(B, P)`: to the Q shared references, or on a CPU to the
            positives alone.
        positive: Mask of the positive pairs, `(B, P)`.
        negative: Mask of the negative pairs, `(B, Q)`.
        number: How many negatives each anchor has among all references, `(B,)`.
        contexts: The statistics of the positives, one entry for each part of the loss.
        listed: On a CPU, the positive pairs.
        left_out: What is not to be added as a negative after this block.
    """

    rows: Tensor | slice
    anchors: Tensor
    shared: SharedReferences
    references: Tensor
    similarity: Tensor
    positive: Tensor
    negative: Tensor
    number: Tensor
    contexts: list[Context]
    listed: ListedPairs | None
    left_out: LeftOut


def shared_blocks(loss: LossDefinition, pairs: Pairs, by_triton: bool = False) -> Iterator[SharedBlock]:
    """Compare the anchors with the references that share a class or an image with them, or on a CPU with the positives.

    Usually all anchors at once. Where these are too many pairs, the anchors are compared in halves, ordered by class so
    that each half has fewer classes: with few classes, a large share of a memory has a class of the batch.
    """
    shared = find_shared(pairs, by_triton)
    anchors, labels = pairs.anchors, pairs.labels
    most = MAX_PAIRS_PER_CHUNK if anchors.device.type in HOST_DEVICES else GPU_BLOCK_ELEMENTS
    if anchors.shape[0] > 1 and anchors.shape[0] * shared.columns.shape[0] > most:
        for half in labels.argsort().tensor_split(2):
            of_half = shared_blocks(loss, pairs.select(half), by_triton)
            yield from (block._replace(rows=half[block.rows]) for block in of_half)
        return
    on_host = anchors.device.type in HOST_DEVICES and not by_triton  # Triton's interpreter runs on a CPU too
    references = pairs.references
    is_gathered = not on_host or references.dtype != anchors.dtype or not references.is_contiguous()
    if by_triton:
        from lightning_memdml.losses.backends.triton.shared import compare

        references, positive, negative, number = compare(pairs, shared.columns)
    else:
        positive, negative, number = _masks(pairs, shared)
        if is_gathered:
            references = references.index_select(0, shared.columns).to(anchors.dtype)
    parts = loss.parts or (loss,)
    rows: Tensor | slice = slice(None)
    if any(part.wants_most_positives_first for part in parts):
        rows = positive.sum(dim=1).argsort(descending=True)
        anchors, positive, negative, number = (tensor[rows] for tensor in (anchors, positive, negative, number))
    if on_host:
        excluded = list_pairs(~negative)
        left_out = LeftOut(shared.mask, excluded._replace(columns=shared.columns.index_select(0, excluded.columns)))
        # The others are pairs of an image with itself.
        all_positive = np.count_nonzero(positive.numpy()) == len(excluded.columns)
        listed = excluded if all_positive else list_pairs(positive)
        if not is_gathered:
            listed = listed._replace(columns=shared.columns.index_select(0, listed.columns))
        similarity = listed.pad(compat.products_of_pairs(listed.starts, listed.columns, anchors, references))
        positive = listed.exists
    else:
        listed, left_out, similarity = None, LeftOut(shared.mask, None), anchors @ references.T
    contexts = [part.context(similarity, positive) for part in parts]
    yield SharedBlock(
        rows, anchors, shared, references, similarity, positive, negative, number, contexts, listed, left_out
    )


def _masks(pairs: Pairs, shared: SharedReferences) -> tuple[Tensor, Tensor, Tensor]:
    """Return the masks of positive and of negative pairs, `(B, Q)`, and how many negatives each anchor has, `(B,)`."""
    indices, ref_indices = pairs.indices, pairs.ref_indices
    if indices is not None and ref_indices is not None:
        ref_indices = ref_indices[shared.columns]
    positive, negative = pair_masks(pairs.labels, pairs.ref_labels[shared.columns], indices, ref_indices)
    total: Tensor | int = len(shared.columns)
    if shared.valid is not None:
        positive, negative, total = positive & shared.valid, negative & shared.valid, shared.valid.sum()
    return positive, negative, negative.sum(dim=1) + (pairs.references.shape[0] - total)


def find_shared(pairs: Pairs, by_triton: bool = False) -> SharedReferences:
    """Find the references that share a class or an image with the batch.

    With `pairs.max_shared` on a GPU, the columns are padded to this number and the host does not wait for it.

    Args:
        pairs: The anchors and the references.
        by_triton: Whether the kernels of the Triton backend find them. The padding is then -1.
    """
    bound = None
    if pairs.max_shared is not None:  # the bound for this number of anchors
        level = min((len(pairs.labels) - 1).bit_length(), len(pairs.max_shared) - 1)
        bound = min(pairs.max_shared[level], len(pairs.ref_labels))
    if by_triton:
        from lightning_memdml.losses.backends.triton import shared

        is_shared = shared.find_shared(pairs)
        if bound is None:
            return SharedReferences(is_shared, is_shared.nonzero().squeeze(1), None)
        columns = torch.nonzero_static(is_shared, size=bound + 1).squeeze(1)  # one more, to see whether there are more
        _check_bound(columns[-1] < 0, bound)
        return SharedReferences(is_shared, columns[:bound], None)
    on_host = pairs.labels.device.type in HOST_DEVICES
    mask = None
    for ids, members, may_be_negative in (
        (pairs.ref_labels, pairs.labels, True),
        (pairs.ref_indices, pairs.indices, False),  # a negative index is unknown and equals none
    ):
        if ids is None or members is None:
            continue
        if on_host:
            # A wrong hit only means that a reference is compared in vain, so hashes are exact enough, for one gather.
            # Brackets cost 4 times as much, `torch.isin` 20 times, comparing with every member 60 times.
            table = torch.zeros(HASH_SIZE, dtype=torch.bool, device=ids.device)
            table[members.long() & (HASH_SIZE - 1)] = True
            found = table.index_select(0, ids.long() & (HASH_SIZE - 1))
        else:
            ordered = members.long().sort().values
            found = ordered[torch.searchsorted(ordered, ids.long()).clamp_max_(len(ordered) - 1)] == ids
        found = found if may_be_negative else found & (ids >= 0)
        mask = found if mask is None else mask | found
    assert mask is not None
    if on_host or bound is None:
        return SharedReferences(mask, flatnonzero(mask) if on_host else mask.nonzero().squeeze(1), None)
    return _padded_columns(mask, bound)


def _check_bound(holds: Tensor, most: int) -> None:
    compat.assert_async(
        holds,
        f"Expected at most `max_shared={most}` references that share a class or an image with the batch but got more. "
        "Pass a higher bound, or leave `max_shared` out.",
    )


def _padded_columns(mask: Tensor, most: int) -> SharedReferences:
    """Find the columns without asking the device how many there are."""
    places = mask.cumsum(dim=0)
    _check_bound(places[-1] <= most, most)
    # The first column is where the number of those so far rises to 1, the second where it rises to 2, and so on.
    columns = torch.searchsorted(places, torch.arange(1, most + 1, device=mask.device))
    valid = columns < len(mask)
    return SharedReferences(mask, columns.clamp_max_(len(mask) - 1), valid)
