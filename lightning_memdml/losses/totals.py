"""Adds up what a loss is told of the negatives of each anchor, block by block or rank by rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memdml.losses.rows import exp_, row_max

if TYPE_CHECKING:
    from lightning_memdml.losses.pair_loss import Context, PairLoss

Drop = Callable[[Tensor, float], Tensor]
Columns = slice | Tensor


class NegativeTotals(NamedTuple):
    """What a loss is told about the negatives of each anchor, every field of shape ``(B,)`` unless said.

    Attributes:
        number: Number of negatives.
        total: Sum of the values of the terms; for an exponential loss the log-sum-exp of the logits (``-inf``
            without negatives).
        weighted: Sum of weight times similarity; for an exponential loss with the softmax as weights.
        hardest: Largest similarity among the negatives with weight (``-inf`` without any); only where the loss
            asks for it.
        sums: Further sums, ``(B, S)``; only where the loss defines them.
    """

    number: Tensor
    total: Tensor
    weighted: Tensor
    hardest: Tensor
    sums: Tensor


class Negatives:
    """Running totals, and the running gradient ``weights @ references``, of one loss over blocks of negatives."""

    def __init__(self, loss: PairLoss, context: Context, anchors: Tensor, with_gradient: bool = True) -> None:
        self.loss, self.context, self.anchors = loss, context, anchors
        self.cut = loss.negative_cut(context)
        rows = anchors.shape[0]
        self.total = anchors.new_zeros(rows)
        self.shift = anchors.new_full((rows,), torch.finfo(anchors.dtype).min)  # largest logit so far
        self.gradient = torch.zeros_like(anchors) if with_gradient else None
        self.hardest = anchors.new_full((rows,), -torch.inf)
        self.sums = anchors.new_zeros(rows, 0)

    def add(self, similarity: Tensor, references: Tensor, columns: Columns, drop: Drop | None = None) -> None:
        """Add a block; ``similarity`` is overwritten.

        Args:
            similarity: Of all anchors to the block, ``(B, n)``.
            references: The block, ``(n, D)``.
            columns: Where the block stands among all references.
            drop: Fills the pairs that are no negatives.
        """
        if self.loss.needs_hardest:
            if drop is not None:
                drop(similarity, -torch.inf)
            torch.maximum(self.hardest, row_max(similarity), out=self.hardest)
        if drop is not None:  # mostly a finite number: a weight function need not bear -inf
            drop(similarity, self.loss.stand_in)
        weights, values, sums = self.loss.negative_terms(similarity, self.context)
        if sums is not None:
            self.sums = sums if self.sums.shape[1] == 0 else self.sums + sums
        if self.loss.exponential:
            self._add_exponential(weights, values, references, drop)
        else:
            self._add_curve(weights, values, references, drop)

    def _add_curve(self, weights: Tensor, values: Tensor | None, references: Tensor, drop: Drop | None) -> None:
        if drop is not None:
            drop(weights, 0.0)
        if values is not None:
            if drop is not None:
                drop(values, 0.0)
            self.total.add_(values.sum(dim=1))
        if self.gradient is not None:
            _add_product(self.gradient, weights, references)

    def _add_exponential(self, logits: Tensor, factor: Tensor | None, references: Tensor, drop: Drop | None) -> None:
        if drop is not None:
            drop(logits, -torch.inf)
        shift = torch.maximum(self.shift, row_max(logits))
        rescale = torch.exp(self.shift - shift)
        weights = exp_(logits.sub_(shift[:, None]))
        self.total.mul_(rescale).add_(weights.sum(dim=1))
        if self.gradient is not None:
            weights = weights if factor is None else weights.mul_(factor)
            _add_product(self.gradient.mul_(rescale[:, None]), weights, references)
        self.shift = shift

    def state(self) -> Tensor:
        """Return all that was added up, as one row per anchor."""
        gradient = self.anchors[:, :0] if self.gradient is None else self.gradient
        each = torch.stack([self.total, self.shift, self.hardest], dim=1)
        return torch.cat([each, gradient, self.sums], dim=1)

    def merge(self, states: Tensor) -> None:
        """Add what was added up elsewhere, over other references, ``(W, B, S)``: a state from each place."""
        width = 0 if self.gradient is None else self.anchors.shape[1]
        each, gradients, sums = states.split([3, width, states.shape[2] - 3 - width], dim=2)
        totals, shifts, hardest = each.unbind(dim=2)
        shift = torch.maximum(self.shift, shifts.amax(dim=0))
        own_scale, scales = torch.exp(self.shift - shift), torch.exp(shifts - shift)
        self.total = self.total * own_scale + (totals * scales).sum(dim=0)
        if self.gradient is not None:
            self.gradient = self.gradient * own_scale[:, None] + (gradients * scales[:, :, None]).sum(dim=0)
        self.shift = shift
        self.hardest = torch.maximum(self.hardest, hardest.amax(dim=0))
        self.sums = self.sums + sums.sum(dim=0)

    def totals(self, number: Tensor) -> NegativeTotals:
        """Return the totals, after the last block; the gradient is normalised with them."""
        total, weighted = self.total, torch.full_like(self.total, torch.nan)
        if self.loss.exponential:
            norm, total = total.clamp_min(torch.finfo(total.dtype).tiny), torch.log(total) + self.shift
        if self.gradient is not None:
            if self.loss.exponential:
                self.gradient.div_(norm[:, None])
            weighted = (self.anchors * self.gradient).sum(dim=1)
        return NegativeTotals(number, total, weighted, self.hardest, self.sums)


class HardestNegatives(Negatives):
    """The few most similar negatives of each anchor; what they weigh is told when all blocks have passed."""

    def __init__(self, loss: PairLoss, context: Context, anchors: Tensor, references: Tensor) -> None:
        super().__init__(loss, context, anchors)
        self.references = references
        self.similarity = anchors.new_zeros(anchors.shape[0], 0)
        self.columns = torch.zeros(anchors.shape[0], 0, dtype=torch.int64, device=anchors.device)

    def add(self, similarity: Tensor, references: Tensor, columns: Columns, drop: Drop | None = None) -> None:
        """Keep the hardest of those kept so far and of the block."""
        if drop is not None:
            drop(similarity, -torch.inf)
        assert self.loss.hardest_negatives is not None
        best, places = similarity.topk(min(self.loss.hardest_negatives, similarity.shape[1]), dim=1)
        self._keep(best, places + columns.start if isinstance(columns, slice) else columns[places])

    def _keep(self, similarity: Tensor, columns: Tensor) -> None:
        assert self.loss.hardest_negatives is not None
        best, places = torch.cat([self.similarity, similarity], dim=1), torch.cat([self.columns, columns], dim=1)
        self.similarity, order = best.topk(min(self.loss.hardest_negatives, best.shape[1]), dim=1)
        self.columns = places.gather(1, order)
        if self.similarity.shape[1] == self.loss.hardest_negatives:
            self.cut = self.similarity[:, -1]

    def state(self) -> Tensor:
        """Return the similarities that were kept, and the references they are with."""
        assert self.loss.hardest_negatives is not None
        missing = self.loss.hardest_negatives - self.similarity.shape[1]
        similarity = F.pad(self.similarity, (0, missing), value=-torch.inf)
        rows = F.pad(self.references[self.columns].to(similarity.dtype), (0, 0, 0, missing))
        return torch.cat([similarity, rows.flatten(1)], dim=1)

    def merge(self, states: Tensor) -> None:
        """Keep the hardest of those kept so far and of those kept elsewhere, ``(W, B, S)``."""
        assert self.loss.hardest_negatives is not None
        number, dim = self.loss.hardest_negatives, self.anchors.shape[1]
        similarity, rows = (part.transpose(0, 1).flatten(1) for part in states.tensor_split([number], dim=2))
        columns = torch.arange(similarity.numel(), device=states.device).view_as(similarity) + self.references.shape[0]
        self.references = torch.cat([self.references, rows.reshape(-1, dim)])
        self._keep(similarity, columns)

    def totals(self, number: Tensor) -> NegativeTotals:
        """Weigh those that were kept, as one row."""
        weights, totals = self.loss.negative_row(self.similarity, self.similarity > -torch.inf, self.context)
        self.gradient = torch.zeros_like(self.anchors)
        for weight, column in zip(weights.T, self.columns.T, strict=True):
            self.gradient.addcmul_(weight[:, None], self.references[column].to(weight.dtype))
        return totals


def negatives(loss: PairLoss, contexts: list[Context], anchors: Tensor, references: Tensor) -> list[Negatives]:
    """Return what totals the negatives of each part of a loss; only the first part's weights become a gradient."""
    return [
        Negatives(part, context, anchors, with_gradient=part is loss.parts[0])
        if part.hardest_negatives is None
        else HardestNegatives(part, context, anchors, references)
        for part, context in zip(loss.parts, contexts, strict=True)
    ]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    # References in 16 bits meet weights in 16 bits, as anchors in `streaming._product`.
    if right.dtype == left.dtype:
        return total.addmm_(left, right)
    if right.dtype == torch.float16:  # which ends at 65,504 and at 6e-8
        peak = left.amax(dim=1, keepdim=True).clamp_min_(1e-30) if left.shape[1] else 1.0
        return total.add_(torch.mm(left.div_(peak).to(right.dtype), right, out_dtype=left.dtype).mul_(peak))
    return total.add_(torch.mm(left.to(right.dtype), right, out_dtype=left.dtype))
