r"""What a pair loss is: three small functions, and what they mean.

Letters: B anchors (the batch of one rank), M references (the batch or the memory), D embedding dimension, P candidate
positives of an anchor. A loss is the mean over anchors of $l_i$. To the network it is nothing but its pair weights
$w^+_{ij} = -\partial l_i / \partial s_{ij}$ and $w^-_{ij} = \partial l_i / \partial s_{ij}$ (Zhang et al. 2021, arXiv
2103.14003). It defines, on rows of similarities:

1. `context`: statistics of the positives on which the negatives depend (none, for most losses);
2. `negative_terms`: the weight of each negative, up to a factor per anchor;
3. `combine`: from totals over the negatives, the value, the positives' weights, and that factor.

`LossDefinition.rows` evaluates these on whole rows. Everything else in this folder computes the same numbers in less
time and memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_memdml.bfloat16_copy import RoundedRows
from lightning_memdml.checks import refuse_renamed
from lightning_memdml.losses.backends import Backend
from lightning_memdml.losses.row_ops import hardest, row_max

Context = tuple[Tensor, ...]
#: What a loss may define, by its name in earlier versions.
RENAMED = {"negative_cut": "negative_threshold", "stand_in": "fill_value", "coupled": "needs_negatives"}


class NegativeTerms(NamedTuple):
    """What a loss returns for a block of negatives.

    Attributes:
        weights: Weight of each negative up to the anchor's factor, `(B, n)`. For an exponential loss the logits.
        values: Value of each negative, `(B, n)`, or `None` where `combine` does not read `negatives.total`. For an
            exponential loss `None`, or a factor that multiplies the softmax.
        sums: Further sums over these negatives that `combine` reads, `(B, S)`. A pair that is not a negative adds 0.
    """

    weights: Tensor
    values: Tensor | None = None
    sums: Tensor | None = None


class NegativeTotals(NamedTuple):
    """Totals over all negatives of each anchor. Every field has shape `(B,)` unless stated otherwise.

    Attributes:
        number: Number of negatives.
        total: Sum of the values. For an exponential loss the log-sum-exp of the logits, `-inf` without negatives.
        weighted: Sum of weight times similarity. For an exponential loss the weights are the softmax.
        hardest: Largest similarity of a negative, `-inf` without negatives. Only for a loss with `needs_hardest`.
        sums: The further sums of `NegativeTerms`, `(B, S)`; S is 0 for a loss without any.
    """

    number: Tensor
    total: Tensor
    weighted: Tensor
    hardest: Tensor
    sums: Tensor


class AnchorTerms(NamedTuple):
    """What a loss returns for each anchor.

    Attributes:
        value: The anchor's loss $l_i$, `(B,)`.
        positive_weights: $w^+$, `(B, P)`. Read only where the mask is true.
        negative_weight_scale: Factor of the negatives' weights, `(B,)`.
    """

    value: Tensor
    positive_weights: Tensor
    negative_weight_scale: Tensor


class Pairs(NamedTuple):
    """Anchors, and the references they are compared with.

    Attributes:
        anchors: `(B, D)`.
        labels: `(B,)`.
        references: `(M, D)`.
        ref_labels: `(M,)`.
        indices: The image of each anchor, `(B,)`. A negative index is unknown.
        ref_indices: The image of each reference, `(M,)`.
        max_shared: Upper bounds of the number of references that share a class or an image with 1, 2, 4, ... anchors;
            the last one holds for any number.
        read_rounded: Returns the references in bfloat16, if a memory keeps them.
    """

    anchors: Tensor
    labels: Tensor
    references: Tensor
    ref_labels: Tensor
    indices: Tensor | None = None
    ref_indices: Tensor | None = None
    max_shared: Sequence[int] | None = None
    read_rounded: Callable[[], RoundedRows] | None = None

    def select(self, rows: Tensor) -> Pairs:
        """Return the pairs of some of the anchors."""
        indices = None if self.indices is None else self.indices[rows]
        return self._replace(anchors=self.anchors[rows], labels=self.labels[rows], indices=indices)


def pair_masks(
    labels: Tensor,
    ref_labels: Tensor,
    indices: Tensor | None = None,
    ref_indices: Tensor | None = None,
    *,
    in_batch: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the masks of positive and of negative pairs, both `(B, M)`.

    A pair of one image with itself is in neither mask: equal indices that are known (not negative), and with
    `in_batch` each row paired with itself.

    Args:
        labels: Class of each anchor, `(B,)`.
        ref_labels: Class of each reference, `(M,)`.
        indices: Image of each anchor, `(B,)`.
        ref_indices: Image of each reference, `(M,)`.
        in_batch: Whether the references are the anchors themselves.

    Example:
        >>> positive, negative = pair_masks(torch.tensor([0, 1]), torch.tensor([0, 0, 1]))
        >>> positive.int()
        tensor([[1, 1, 0],
                [0, 0, 1]], dtype=torch.int32)
    """
    positive = labels[:, None] == ref_labels[None, :]
    negative = ~positive
    if indices is not None and ref_indices is not None:
        kept = (indices[:, None] != ref_indices[None, :]) | (indices < 0)[:, None]
        positive, negative = positive & kept, negative & kept
    if in_batch:
        positive, negative = positive.fill_diagonal_(False), negative.fill_diagonal_(False)
    return positive, negative


class LossDefinition(ABC):
    """The three functions of a loss, the flags that describe them, and their evaluation on whole rows."""

    #: The negatives' weights are `scale * softmax(logits)`, and `negative_terms` returns these logits.
    exponential: bool = False
    #: `combine` reads `negatives.hardest`.
    needs_hardest: bool = False
    #: The similarity that `negative_terms` gets in place of a pair that is not a negative.
    fill_value: float = -1.0
    #: The positives' weights depend on the negatives.
    needs_negatives: bool = True
    #: The negatives take less time if the anchors stand in descending order of their number of positives.
    wants_most_positives_first: bool = False
    #: How many of the most similar negatives of each anchor are kept; `None` keeps all.
    hardest_negatives: int | None = None
    #: For a loss that takes its sides from other losses: those whose totals over negatives it needs. The first one
    #: gives the negatives' weights. The context and the totals that `combine` gets are then lists, one entry per part.
    parts: tuple[LossDefinition, ...] = ()
    #: How the negatives in a memory are added, see `lightning_memdml.losses.backends`.
    backend: Backend = "auto"

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse names of earlier versions."""
        super().__init_subclass__(**options)
        refuse_renamed(cls, RENAMED)

    # ---------------------------------------------------------------- what a loss defines
    def context(self, similarity: Tensor, mask: Tensor) -> Context:
        """Return the statistics of the positives on which the negatives depend, as tensors of shape `(B, ...)`.

        Args:
            similarity: Similarities of the anchors to candidate positives, `(B, P)`.
            mask: True where the candidate is a positive, `(B, P)`.
        """
        return ()

    def negative_threshold(self, context: Context) -> Tensor | float:
        """Return the similarity at or below which the weight of a negative is 0: one number, or one per anchor `(B,)`.

        A threshold lets the streamed evaluation skip most references of a trained network. `-inf` skips none.
        """
        return -torch.inf

    @abstractmethod
    def negative_terms(self, similarity: Tensor, context: Context) -> NegativeTerms:
        """Return weights and values of a block of negatives.

        Args:
            similarity: Similarities of the anchors to a block of references, `(B, n)`. It may be overwritten.
            context: What `context` returned.
        """

    @abstractmethod
    def combine(self, similarity: Tensor, mask: Tensor, context: Context, negatives: NegativeTotals) -> AnchorTerms:
        """Return each anchor's value, its positives' weights, and the factor of its negatives' weights.

        Args:
            similarity: Similarities of the anchors to candidate positives, `(B, P)`.
            mask: True where the candidate is a positive, `(B, P)`.
            context: What `context` returned.
            negatives: Totals over all negatives of each anchor.
        """

    # ---------------------------------------------------------------- evaluation on whole rows
    def rows(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the value of each anchor `(B,)`, and the weights of all positives and of all negatives.

        Args:
            similarity: `(B, M)`.
            positive: Mask of the positive pairs, `(B, M)`.
            negative: Mask of the negative pairs, `(B, M)`.

        Returns:
            The values `(B,)`, and two tensors of weights `(B, M)` that are 0 where there is no such pair.
        """
        parts = self.parts or (self,)
        contexts = [part.context(similarity, positive) for part in parts]
        results = [
            part.negative_row(similarity, negative, context) for part, context in zip(parts, contexts, strict=True)
        ]
        totals = [totals for _, totals in results]
        given: Any = (contexts, totals) if self.parts else (contexts[0], totals[0])
        terms = self.combine(similarity, positive, *given)
        negative_weights = results[0][0] * terms.negative_weight_scale[:, None]
        return terms.value, torch.where(positive, terms.positive_weights, 0.0), negative_weights

    def negative_row(self, similarity: Tensor, mask: Tensor, context: Context) -> tuple[Tensor, NegativeTotals]:
        """Return the weights of the negatives up to the anchor's factor, `(B, M)`, and their totals."""
        if self.hardest_negatives is not None:
            mask = hardest(similarity, mask, self.hardest_negatives)
        number, largest = mask.sum(dim=1), similarity.new_full(mask.shape[:1], -torch.inf)
        if self.needs_hardest:
            largest = row_max(similarity.masked_fill(~mask, -torch.inf))
        weights, values, sums = self.negative_terms(similarity.masked_fill(~mask, self.fill_value), context)
        if self.exponential:
            logits = weights.masked_fill(~mask, -torch.inf)
            total = torch.logsumexp(logits, dim=1)
            weights = torch.exp(logits - total.clamp_min(torch.finfo(total.dtype).min)[:, None])
            weights = weights if values is None else weights * values
        else:
            weights = torch.where(mask, weights, 0.0)
            total = torch.zeros_like(largest) if values is None else torch.where(mask, values, 0.0).sum(dim=1)
        weighted = torch.where(mask, weights * similarity, 0.0).sum(dim=1)
        if sums is None:
            sums = similarity.new_zeros(similarity.shape[0], 0)
        return weights, NegativeTotals(number, total, weighted, largest, sums)
