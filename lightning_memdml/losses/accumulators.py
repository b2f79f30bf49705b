"""Running totals over the negatives of each anchor, block by block, backend by backend, or rank by rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memdml.losses.definition import Context, LossDefinition, NegativeTotals
from lightning_memdml.losses.listed_pairs import ListedPairs, list_pairs
from lightning_memdml.losses.row_ops import HOST_DEVICES, WIDENING_DEVICES, exp_, row_max
from lightning_memdml.losses.shared_references import LeftOut

SAMPLE = 256  # columns that are looked at first
# Above this share of pairs with a weight, to list them costs more than it saves. Products use all threads and lists use
# one, so this is divided by their number.
LISTED_SHARE = 0.1

Columns = slice | Tensor


class NegativeAccumulator:
    """Running totals of one loss over blocks of negatives, and the running gradient `weights @ references`.

    Args:
        loss: A loss of one part.
        context: What its `context` returned for these anchors.
        anchors: `(B, D)`, float32 or float64.
        with_gradient: Whether the negatives' weights become a gradient.

    Attributes:
        threshold: Similarity at or below which a negative has no weight, a number or `(B,)`.
        gradient: Sum of weight times reference, `(B, D)`, or `None`.
    """

    def __init__(self, loss: LossDefinition, context: Context, anchors: Tensor, with_gradient: bool = True) -> None:
        self.loss, self.context, self.anchors = loss, context, anchors
        self.threshold = loss.negative_threshold(context)
        rows = anchors.shape[0]
        self.total = anchors.new_zeros(rows)
        self.shift = anchors.new_full((rows,), torch.finfo(anchors.dtype).min)  # largest logit so far
        self.gradient = torch.zeros_like(anchors) if with_gradient else None
        self.hardest = anchors.new_full((rows,), -torch.inf)
        self.sums = anchors.new_zeros(rows, 0)

    def add(
        self,
        similarity: Tensor,
        references: Tensor,
        columns: Columns,
        excluded: Tensor | None = None,
        pairs: ListedPairs | None = None,
    ) -> None:
        """Add a block, or only some of its pairs: all that have a weight, and any others.

        Args:
            similarity: Similarities of all anchors to the block, `(B, n)`, or those of `pairs`, padded, `(B, P)`. It is
                overwritten.
            references: The block, `(n, D)`.
            columns: Where the block is among all references.
            excluded: The pairs that are not negatives, or padding, see `fill`.
            pairs: The pairs to add, on a CPU. `None` for all.
        """
        if self.loss.needs_hardest:
            similarity = fill(similarity, excluded, -torch.inf)
            torch.maximum(self.hardest, row_max(similarity), out=self.hardest)
        # Finite for most losses, whose functions may not take -inf.
        similarity = fill(similarity, excluded, self.loss.fill_value)
        weights, values, sums = self.loss.negative_terms(similarity, self.context)
        if sums is not None:
            self.sums = sums if self.sums.shape[1] == 0 else self.sums + sums
        if self.loss.exponential:
            weights = self._softmax_numerators(fill(weights, excluded, -torch.inf), values)
        else:
            weights = fill(weights, excluded, 0.0)
            if values is not None:
                self.total.add_(fill(values, excluded, 0.0).sum(dim=1))
        if self.gradient is None:
            return
        if pairs is not None:
            self.gradient.add_(pairs.weigh(weights, references))
        elif references.dtype == weights.dtype:
            self.gradient.addmm_(weights, references)
        else:
            add_product_in_16_bits(self.gradient, weights, references)

    def _softmax_numerators(self, logits: Tensor, factor: Tensor | None) -> Tensor:
        """Return `exp(logits - shift)` times the factor. The shift rises with the logits; earlier sums are rescaled."""
        shift = torch.maximum(self.shift, row_max(logits))
        rescale = torch.exp(self.shift - shift)
        self.shift = shift
        weights = exp_(logits.sub_(shift[:, None]))
        self.total.mul_(rescale).add_(weights.sum(dim=1))
        if self.gradient is not None:
            self.gradient.mul_(rescale[:, None])
        return weights if factor is None else weights.mul_(factor)

    def state(self) -> Tensor:
        """Return all totals as one row per anchor, `(B, 3 + D + S)`, or without D where there is no gradient."""
        gradient = self.anchors[:, :0] if self.gradient is None else self.gradient
        each = torch.stack([self.total, self.shift, self.hardest], dim=1)
        return torch.cat([each, gradient, self.sums], dim=1)

    def merge(self, states: Tensor) -> None:
        """Add the totals over other references, one state from each of W places, `(W, B, 3 + D + S)`."""
        width = 0 if self.gradient is None else self.anchors.shape[1]
        each, gradients, sums = states.split([3, width, states.shape[2] - 3 - width], dim=2)
        totals, shifts, hardest = each.unbind(dim=2)
        if self.loss.exponential:
            shift = torch.maximum(self.shift, shifts.amax(dim=0))
            own_scale, scales = torch.exp(self.shift - shift), torch.exp(shifts - shift)
            self.total, totals = self.total * own_scale, totals * scales
            if self.gradient is not None:
                self.gradient, gradients = self.gradient * own_scale[:, None], gradients * scales[:, :, None]
            self.shift = shift
        self.total = self.total + totals.sum(dim=0)
        if self.gradient is not None:
            self.gradient = self.gradient + gradients.sum(dim=0)
        if self.loss.needs_hardest:
            self.hardest = torch.maximum(self.hardest, hardest.amax(dim=0))
        if sums.shape[2]:
            self.sums = self.sums + sums.sum(dim=0) if self.sums.shape[1] else sums.sum(dim=0)

    def totals(self, number: Tensor) -> NegativeTotals:
        """Return the totals, after the last block. The gradient of an exponential loss is normalised here.

        Args:
            number: How many negatives each anchor has, `(B,)`.
        """
        total, weighted = self.total, torch.full_like(self.total, torch.nan)
        if self.loss.exponential:
            norm, total = total.clamp_min(torch.finfo(total.dtype).tiny), torch.log(total) + self.shift
        if self.gradient is not None:
            if self.loss.exponential:
                self.gradient.div_(norm[:, None])
            weighted = (self.anchors * self.gradient).sum(dim=1)
        return NegativeTotals(number, total, weighted, self.hardest, self.sums)


class HardestNegativeAccumulator(NegativeAccumulator):
    """The K most similar negatives of each anchor so far. Their weights are computed after the last block."""

    def __init__(self, loss: LossDefinition, context: Context, anchors: Tensor, references: Tensor) -> None:
        super().__init__(loss, context, anchors)
        assert loss.hardest_negatives is not None
        self.kept = loss.hardest_negatives
        self.references = references
        self.similarity = anchors.new_zeros(anchors.shape[0], 0)
        self.columns = torch.zeros(anchors.shape[0], 0, dtype=torch.int64, device=anchors.device)

    def add(
        self,
        similarity: Tensor,
        references: Tensor,
        columns: Columns,
        excluded: Tensor | None = None,
        pairs: ListedPairs | None = None,
    ) -> None:
        """Keep the hardest of those kept so far and of the block."""
        similarity = fill(similarity, excluded, -torch.inf)
        best, places = similarity.topk(min(self.kept, similarity.shape[1]), dim=1)
        if pairs is not None:
            places = pairs.pad(pairs.columns).gather(1, places)
        self._keep(best, places + columns.start if isinstance(columns, slice) else columns[places])

    def _keep(self, similarity: Tensor, columns: Tensor) -> None:
        best, places = torch.cat([self.similarity, similarity], dim=1), torch.cat([self.columns, columns], dim=1)
        self.similarity, order = best.topk(min(self.kept, best.shape[1]), dim=1)
        self.columns = places.gather(1, order)
        if self.similarity.shape[1] == self.kept:
            self.threshold = self.similarity[:, -1]

    def state(self) -> Tensor:
        """Return the similarities that are kept and their references, `(B, K + K * D)`."""
        missing = self.kept - self.similarity.shape[1]
        similarity = F.pad(self.similarity, (0, missing), value=-torch.inf)
        rows = F.pad(self.references[self.columns].to(similarity.dtype), (0, 0, 0, missing))
        return torch.cat([similarity, rows.flatten(1)], dim=1)

    def merge(self, states: Tensor) -> None:
        """Keep the hardest of those kept so far and of those kept in W other places, `(W, B, K + K * D)`."""
        dim = self.anchors.shape[1]
        similarity, rows = (part.transpose(0, 1).flatten(1) for part in states.tensor_split([self.kept], dim=2))
        columns = torch.arange(similarity.numel(), device=states.device).view_as(similarity) + self.references.shape[0]
        self.references = torch.cat([self.references, rows.reshape(-1, dim)])
        self._keep(similarity, columns)

    def totals(self, number: Tensor) -> NegativeTotals:
        """Weigh the negatives that were kept, as one row."""
        weights, totals = self.loss.negative_row(self.similarity, self.similarity > -torch.inf, self.context)
        self.gradient = torch.zeros_like(self.anchors)
        for weight, column in zip(weights.T, self.columns.T, strict=True):
            self.gradient.addcmul_(weight[:, None], self.references[column].to(weight.dtype))
        return totals


def make_accumulators(
    loss: LossDefinition, contexts: Sequence[Context], anchors: Tensor, references: Tensor
) -> list[NegativeAccumulator]:
    """Return an accumulator for each part of a loss. Only the weights of the first part become a gradient."""
    parts = loss.parts or (loss,)
    return [
        NegativeAccumulator(part, context, anchors, with_gradient=part is parts[0])
        if part.hardest_negatives is None
        else HardestNegativeAccumulator(part, context, anchors, references)
        for part, context in zip(parts, contexts, strict=True)
    ]


def add_block(
    accumulators: list[NegativeAccumulator], references: Tensor, left_out: LeftOut, columns: slice, scratch: Tensor
) -> float:
    """Add a block of negatives to all accumulators: one product for all, and a second one for each.

    On a CPU, a loss with a threshold (`LossDefinition.negative_threshold`) takes the pairs above it one by one, if they
    are few: the others take part in the first product only. With a trained network these are nearly all.

    Args:
        accumulators: Of the parts of one loss, with the same anchors.
        references: All references, `(M, D)`.
        left_out: The references or pairs to leave out.
        columns: The references of the block.
        scratch: At least `B * n` numbers, overwritten.

    Returns:
        The largest share of pairs above the threshold of a part; 1 where they are many. On a GPU, where they are not
        counted, always 1.
    """
    anchors, block = accumulators[0].anchors, references[columns]
    on_host = anchors.device.type in HOST_DEVICES
    # A CPU widens references in 16 bits, which costs it less than rounding the anchors. A CUDA GPU multiplies in 16
    # bits with sums in float32. A GPU gets indices as a mask: the host would wait for their number.
    if anchors.device.type not in WIDENING_DEVICES or anchors.dtype != torch.float32:
        block = block.to(anchors.dtype)
    similarity = scratch[: anchors.shape[0] * block.shape[0]].view(anchors.shape[0], block.shape[0])
    if block.dtype == anchors.dtype:
        torch.mm(anchors, block.T, out=similarity)
    else:
        torch.mm(anchors.to(block.dtype), block.T, out_dtype=anchors.dtype, out=similarity)
    excluded, share = left_out.in_block(columns), 0.0
    for accumulator in accumulators:
        own_share, listed = pairs_above(similarity, accumulator.threshold, excluded) if on_host else (1.0, None)
        share = max(share, own_share)
        if listed is None:
            own = similarity if accumulator is accumulators[-1] else similarity.clone()  # it is overwritten
            accumulator.add(own, block, columns, excluded)
        else:
            values = similarity.view(-1).index_select(0, listed.columns.add(listed.rows, alpha=block.shape[0]))
            accumulator.add(listed.pad(values), block.contiguous(), columns, ~listed.exists, listed)
    return share


def pairs_above(
    similarity: Tensor, threshold: Tensor | float, excluded: Tensor | None
) -> tuple[float, ListedPairs | None]:
    """Return the share of pairs that are above the threshold of their anchor, and these pairs. On a CPU.

    Args:
        similarity: `(B, n)`.
        threshold: One number, or one per anchor `(B,)`.
        excluded: The pairs that are not negatives, see `fill`.

    Returns:
        The share, 1 where many are above it already among the first references; and the pairs, or `None` where it pays
        to take all.
    """
    if not isinstance(threshold, Tensor) and threshold <= -1.0:
        return 1.0, None
    numbers, limit = similarity.numpy(), threshold[:, None].numpy() if isinstance(threshold, Tensor) else threshold
    first = numbers[:, :SAMPLE]
    if np.count_nonzero(first > limit) > LISTED_SHARE * first.size:
        return 1.0, None
    mask = fill(torch.from_numpy(numbers > limit), excluded, False)
    share = np.count_nonzero(mask.numpy()) / mask.numel()
    return share, list_pairs(mask) if share <= LISTED_SHARE / torch.get_num_threads() else None


def fill(block: Tensor, excluded: Tensor | None, value: float) -> Tensor:
    """Return a block `(B, n)` with a number in place of the excluded pairs. It is overwritten.

    Args:
        block: `(B, n)`.
        excluded: The numbers `row * n + column` of the pairs, int64; or a mask `(n,)` or `(B, n)`; or `None` for no
            pair. Numbers cost a tenth of a mask on a CPU. On a GPU the host would wait for them.
        value: The number.
    """
    if excluded is None:
        return block
    if excluded.dtype == torch.bool:
        return block.masked_fill_(excluded, value)
    block = block.contiguous()
    block.view(-1).index_fill_(0, excluded, value)
    return block


def add_product_in_16_bits(total: Tensor, weights: Tensor, references: Tensor) -> Tensor:
    """Add `weights @ references` to a total, in place. `weights` may be overwritten.

    A GPU multiplies references in 16 bits by weights in 16 bits, and adds up in float32. float16 ends at 65,504 and at
    6e-8, so each row of weights is divided by its largest absolute weight first, and the product is multiplied by it.
    """
    if references.shape[0] == 0:
        return total
    if references.dtype == torch.float16:
        peak = torch.linalg.vector_norm(weights, ord=torch.inf, dim=1, keepdim=True)  # of absolute values
        peak.clamp_min_(torch.finfo(weights.dtype).tiny)
        halves = weights.div_(peak).to(references.dtype)
        return total.add_(torch.mm(halves, references, out_dtype=weights.dtype).mul_(peak))
    return total.add_(torch.mm(weights.to(references.dtype), references, out_dtype=weights.dtype))
