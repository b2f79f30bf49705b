"""Evaluates any pair loss against many references, block by block, and forms the gradient on the way.

For each block of references one matrix product gives the similarities, the loss turns them into weights in place,
and a second product adds ``weights @ block`` to the gradient. Only ``B x D`` numbers outlive a block.

Two observations make this as fast as the two bare products:

- Everything irregular is in few columns. The references that share a class (or an image) with the batch are found
  through a table of hashed labels and taken out: there, positives, negatives and left-out pairs are told apart by
  masks. Every other column holds negatives only, so the stream needs no mask at all.
- A loss that says below which similarity a negative has no weight (:meth:`PairLoss.negative_cut`) lets the columns
  that no anchor reaches skip the second product and all element-wise work. With a trained network that is nearly
  all of them. Which columns those are can be told in bfloat16, at half the price of the product where the processor
  has instructions for it; what comes near a cut is then computed in float32, so nothing is lost.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_memdml.losses.masks import pair_masks
from lightning_memdml.losses.sieve import Sieve
from lightning_memdml.losses.totals import Negatives, negatives

if TYPE_CHECKING:
    from lightning_memdml.losses.pair_loss import Context, PairLoss


BLOCK_ELEMENTS = 1 << 19  # of a block and of its similarities on a CPU; 2 MiB each in fp32 stay near the core
GPU_BLOCK_ELEMENTS = 1 << 24  # similarities per block on a GPU, where a block costs a dozen kernel launches
NEAR_ELEMENTS = 1 << 19  # pairs of the batch with the references of its classes that are held at once
HASH_SIZE = 1 << 16
SAMPLE = 256  # columns that tell, mostly, whether many are hit
SPARSE_SHARE = 0.5  # above this share of hit columns, gathering them costs more than it saves
SIEVE_SHARE = 0.25  # up to this share the sieve is tried, which lets some more pass


class Pairs(NamedTuple):
    """Anchors, and the references they are compared with.

    Attributes:
        anchors: ``(B, D)``.
        labels: ``(B,)``.
        references: ``(M, D)``.
        ref_labels: ``(M,)``.
        indices: Which image each anchor is of, ``(B,)``; below 0 is unknown.
        ref_indices: Which image each reference is of, ``(M,)``.
        max_shared: Upper bound of the references that share a class or an image with the anchors.
    """

    anchors: Tensor
    labels: Tensor
    references: Tensor
    ref_labels: Tensor
    indices: Tensor | None
    ref_indices: Tensor | None
    max_shared: int | None = None

    def of(self, rows: Tensor) -> Pairs:
        """Return the pairs of some of the anchors."""
        indices = None if self.indices is None else self.indices[rows]
        return self._replace(anchors=self.anchors[rows], labels=self.labels[rows], indices=indices)


def evaluate(loss: PairLoss, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Return each anchor's value ``(B,)`` and its gradient ``dl_i/dx_i`` ``(B, D)``."""
    anchors, labels, references, ref_labels, indices, ref_indices, _ = pairs
    special = special_columns(pairs)
    if anchors.shape[0] > 1 and anchors.shape[0] * special.columns.shape[0] > most_near_elements(anchors):
        return in_halves(partial(evaluate, loss), pairs)
    near = references.index_select(0, special.columns).to(anchors.dtype)  # (Q, D): all that may be no plain negatives
    near_indices = ref_indices[special.columns] if indices is not None and ref_indices is not None else None
    masks = pair_masks(labels, ref_labels[special.columns], indices, near_indices)
    positive, negative = (mask & special.valid for mask in masks)
    order = positive.sum(dim=1).argsort(descending=True)  # for the losses that go through the positives one by one
    anchors, positive, negative = anchors[order], positive[order], negative[order]
    similarity = anchors @ near.T  # (B, Q)

    contexts = [part.context(similarity, positive) for part in loss.parts]
    parts = negatives(loss, contexts, anchors, references)
    for part in parts:
        part.add(similarity.clone(), near, special.columns, partial(fill_masked, ~negative))
    stream_plain_negatives(parts, references, special.shared)
    number = negative.sum(dim=1) + (references.shape[0] - special.valid.sum())
    value, gradient = finish(loss, similarity, positive, contexts, parts, number, near)
    back = order.argsort()
    return value[back], gradient[back]


def finish(
    loss: PairLoss,
    similarity: Tensor,
    positive: Tensor,
    contexts: list[Context],
    parts: list[Negatives],
    number: Tensor,
    near: Tensor,
) -> tuple[Tensor, Tensor]:
    """Add the positives, which are among the ``near`` references, to the totals of the negatives."""
    terms = loss.finish(similarity, positive, contexts, [part.totals(number) for part in parts])
    positive_weights = torch.where(positive, terms.positive_weights, 0.0)
    gradient = parts[0].gradient
    assert gradient is not None
    gradient.mul_(terms.negative_scale[:, None]).addmm_(positive_weights, near, alpha=-1.0)
    return terms.value, gradient


def in_halves(evaluate_part: Callable[[Pairs], tuple[Tensor, Tensor]], pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Evaluate the anchors in two parts, ordered by class so that each part has fewer classes.

    With few classes a large share of the memory has a class of the batch. Anchors do not depend on each other.
    """
    value, gradient = torch.empty_like(pairs.anchors[:, 0]), torch.empty_like(pairs.anchors)
    for half in pairs.labels.argsort().tensor_split(2):
        value[half], gradient[half] = evaluate_part(pairs.of(half))
    return value, gradient


def _on_host(tensor: Tensor) -> bool:
    """Tell whether numbers can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def most_near_elements(tensor: Tensor) -> int:
    """Return how many pairs with near references are held at once."""
    return NEAR_ELEMENTS if _on_host(tensor) else GPU_BLOCK_ELEMENTS


class _Special(NamedTuple):
    """The references that share a class or an image with the batch.

    Attributes:
        shared: Which they are, ``(M,)``; some others too, by hash.
        columns: Their places, ascending, ``(Q,)``.
        valid: False where ``columns`` is padding, ``(Q,)``.
    """

    shared: Tensor
    columns: Tensor
    valid: Tensor


def special_columns(pairs: Pairs) -> _Special:
    """Return which references are no plain negatives of the batch."""
    on_host = _on_host(pairs.labels)
    members = _hashed_members if on_host else _members
    shared = members(pairs.ref_labels, pairs.labels)
    if pairs.indices is not None and pairs.ref_indices is not None:
        # An index below 0 is unknown and equals none.
        shared |= members(pairs.ref_indices, pairs.indices) & (pairs.ref_indices >= 0)
    if on_host or pairs.max_shared is None:
        columns = shared.nonzero().squeeze(1)
        return _Special(shared, columns, torch.ones_like(columns, dtype=torch.bool))
    return _padded_columns(shared, min(pairs.max_shared, len(shared)))


def _padded_columns(shared: Tensor, most: int) -> _Special:
    """Find the columns without asking the device how many there are."""
    number = shared.sum()
    torch._assert_async(number <= most, f"More than `max_shared={most}` references share a class with the batch.")
    place = torch.where(shared, shared.cumsum(dim=0) - 1, most)
    columns = torch.zeros(most + 1, dtype=torch.int64, device=shared.device)
    columns = columns.scatter_(0, place, torch.arange(len(shared), device=shared.device))[:most]
    return _Special(shared, columns, torch.arange(most, device=shared.device) < number)


def _hashed_members(ids: Tensor, members: Tensor) -> Tensor:
    # A wrong hit only moves a column to the masked part, so a table of hashes is exact enough, and costs 1 gather;
    # indexing by brackets costs 4 times as much, torch.isin 20 times, comparing with every member 60 times.
    table = torch.zeros(HASH_SIZE, dtype=torch.bool, device=ids.device)
    table[members.long() & (HASH_SIZE - 1)] = True
    return table.index_select(0, ids.long() & (HASH_SIZE - 1))


def _members(ids: Tensor, members: Tensor) -> Tensor:
    ordered = members.long().sort().values
    place = torch.searchsorted(ordered, ids.long()).clamp_max_(len(ordered) - 1)
    return ordered[place] == ids


def stream_plain_negatives(parts: list[Negatives], references: Tensor, shared: Tensor) -> None:
    """Add every column that is not ``shared``, block by block; all parts read the same similarities."""
    if _fuses(references):
        from lightning_memdml.losses import fused  # Triton is not everywhere

        parts = fused.add_plain_negatives(parts, references, shared)
        if not parts:
            return
    anchors = parts[0].anchors
    on_host = _on_host(anchors)
    width = max(256, BLOCK_ELEMENTS // max(anchors.shape) if on_host else GPU_BLOCK_ELEMENTS // anchors.shape[0])
    sieve, sieving, start = Sieve.of(anchors, references), False, 0
    # The first columns tell whether the sieve pays; what it keeps of a column is half as long, so it takes two blocks.
    size, widest = (width, width) if sieve is None else (SAMPLE, 2 * width)
    scratch = anchors.new_empty(anchors.shape[0] * min(widest, references.shape[0]))
    while start < references.shape[0]:
        columns = slice(start, start + size)
        block, irregular = references[columns], shared[columns]
        if sieve is None or not sieving or not _add_sieved(parts, sieve, block, irregular, start):
            if on_host or anchors.dtype != torch.float32:
                block = block.to(anchors.dtype)
            similarity = scratch[: anchors.shape[0] * block.shape[0]].view(anchors.shape[0], block.shape[0])
            _product(anchors, block.T, out=similarity)
            few = _add_block(parts, similarity, block, irregular, columns)
            sieving = few and not sieving and sieve is not None  # not again at once where the sieve let many pass
        start, size = columns.stop, widest if sieving else width


def _add_sieved(parts: list[Negatives], sieve: Sieve, block: Tensor, irregular: Tensor, start: int) -> bool:
    """Add the columns that may be above a cut of any part, unless they are many; return whether it was done."""
    hits = _columns(sieve.reached(block, [part.cut for part in parts]), irregular)
    if hits.shape[0] > SPARSE_SHARE * block.shape[0]:
        return False
    near = block.index_select(0, hits)
    similarity = parts[0].anchors @ near.T
    for part in parts:
        part.add(similarity.clone(), near, hits + start)
    return True


def _add_block(parts: list[Negatives], similarity: Tensor, block: Tensor, irregular: Tensor, columns: slice) -> bool:
    """Add a block, and return whether few columns are above a cut."""
    on_host, few = _on_host(similarity), True
    # On a GPU, counting columns would stall it at every block.
    drop = partial(_fill_columns, irregular.nonzero().squeeze(1)) if on_host else partial(fill_masked, irregular)
    for part in parts:
        hits = _reached_columns(similarity, part.cut, irregular) if on_host else None
        few &= hits is not None and hits.shape[0] <= SIEVE_SHARE * block.shape[0]
        if hits is None:
            own = similarity if part is parts[-1] else similarity.clone()  # it is overwritten
            part.add(own, block, columns, drop)
        else:
            part.add(similarity.index_select(1, hits), block.index_select(0, hits), hits + columns.start)
    return few


def _fuses(references: Tensor) -> bool:
    """Tell whether one kernel was asked for in place of the blocks."""
    return references.is_cuda and os.environ.get("LIGHTNING_MEMDML_FUSED") == "1"


# References in 16 bits are multiplied in 16 bits on a GPU, whose tensor cores add up in float32 all the same. A CPU
# widens them instead, which costs it less than rounding the other factor.
def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    if right.dtype == left.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left.to(right.dtype), right, out_dtype=left.dtype, out=out)


def _fill_columns(columns: Tensor, block: Tensor, value: float) -> Tensor:
    return block.index_fill_(1, columns, value)  # a mask would cost 10 times as much


def fill_masked(mask: Tensor, block: Tensor, value: float) -> Tensor:
    """Fill a block, in place."""
    return block.masked_fill_(mask, value)


def _reached_columns(similarity: Tensor, cut: Tensor | float, irregular: Tensor) -> Tensor | None:
    """Return the columns with a similarity above the anchor's cut, or ``None`` where it pays to take them all."""
    if not isinstance(cut, Tensor) and cut <= -1.0:
        return None
    if _reached(similarity[:, :SAMPLE], cut).sum() > SPARSE_SHARE * SAMPLE:
        return None
    hits = _columns(_reached(similarity, cut), irregular)
    return None if hits.shape[0] > SPARSE_SHARE * similarity.shape[1] else hits


def _reached(similarity: Tensor, cut: Tensor | float) -> Tensor:
    if isinstance(cut, Tensor):
        return (similarity - cut[:, None]).amax(dim=0) > 0
    return similarity.amax(dim=0) > cut


def _columns(reached: Tensor, irregular: Tensor) -> Tensor:
    return (reached & ~irregular).nonzero().squeeze(1)


# ------------------------------------------------------------------------------------------------ autograd, compile
_LOSSES: weakref.WeakValueDictionary[int, PairLoss] = weakref.WeakValueDictionary()
_next_id = itertools.count()


def register_loss(loss: PairLoss) -> int:
    """Give a loss the number by which the operator below finds it again."""
    loss_id = next(_next_id)
    _LOSSES[loss_id] = loss
    return loss_id


# An operator of its own is opaque to torch.compile: the step around it stays one graph however the memory grows.
@torch.library.custom_op("lightning_memdml::stream", mutates_args=())
def _stream(
    loss_id: int,
    anchors: Tensor,
    labels: Tensor,
    references: Tensor,
    ref_labels: Tensor,
    indices: Tensor | None,
    ref_indices: Tensor | None,
    max_shared: int | None,
) -> tuple[Tensor, Tensor]:
    pairs = Pairs(anchors, labels, references, ref_labels, indices, ref_indices, max_shared)
    value, gradient = evaluate(_LOSSES[loss_id], pairs)
    return value.mean(), gradient.div_(anchors.shape[0])


@_stream.register_fake
def _(
    loss_id: int,
    anchors: Tensor,
    labels: Tensor,
    references: Tensor,
    ref_labels: Tensor,
    indices: Tensor | None,
    ref_indices: Tensor | None,
    max_shared: int | None,
) -> tuple[Tensor, Tensor]:
    return anchors.new_empty(()), torch.empty_like(anchors)


class Assigned(torch.autograd.Function):
    """A value with a gradient that is known already."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        """Return the value and keep the gradient."""
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        """Scale the gradient; a derivative of it is refused rather than given without the weights' own."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "A pair loss has no second derivative here: its weights are constants of the backward pass. "
                "Call `backward()` or `torch.autograd.grad` without `create_graph=True`."
            )
        (gradient,) = ctx.saved_tensors
        return grad_output * gradient, None, None


def stream(loss: PairLoss, pairs: Pairs) -> Tensor:
    """Return the scalar loss of the anchors against references that carry no gradient."""
    anchors, labels, references, *rest = pairs
    value, gradient = torch.ops.lightning_memdml.stream(
        loss.loss_id, anchors.detach(), labels, references.detach(), *rest
    )
    return Assigned.apply(anchors, value, gradient)
