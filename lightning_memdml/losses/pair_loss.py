"""The one interface of every loss: a value and the pair weights behind it.

Letters: B anchors (the batch of one rank), M references (the batch, or the memory), D embedding dimension,
P positives of an anchor. A loss is ``L = (1/B) sum_i l_i``; to the network it is nothing but its pair weights
``w+_ij = -dl_i/ds_ij`` and ``w-_ij = dl_i/ds_ij`` (Zhang et al. 2021, arXiv 2103.14003).

A subclass states its mathematics once, on an anchor's row of similarities, in up to three small functions:

1. :meth:`PairLoss.context`: what the negatives need to know of the positives (nothing, for most losses);
2. :meth:`PairLoss.negative_terms`: the negatives, pair by pair;
3. :meth:`PairLoss.combine`: given totals over the negatives, the value, the positives' weights, and one factor for
   the negatives' weights.

That is enough to train in the batch, to stream against a memory of any size without a ``B x M`` tensor, to read
the weights, and to join the halves of two losses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_memdml.checks import check_pairs
from lightning_memdml.losses.masks import pair_masks
from lightning_memdml.losses.rows import hardest, row_max
from lightning_memdml.losses.sharding import Ranks, evaluate_sharded
from lightning_memdml.losses.streaming import Assigned, Pairs, register_loss, stream
from lightning_memdml.losses.totals import NegativeTotals

Context = tuple[Tensor, ...]


class NegativeTerms(NamedTuple):
    """What a loss says of a block of negatives.

    Attributes:
        weights: Weight of each negative up to the anchor's factor, ``(B, n)``; of an exponential loss the logits.
        values: Value of each negative, ``(B, n)``, or ``None`` where ``combine`` does not read ``negatives.total``. Of
            an exponential loss ``None``, or a factor that multiplies the softmax.
        sums: Further sums over these negatives that ``combine`` reads, ``(B, S)``; a pair that is none adds 0.
    """

    weights: Tensor
    values: Tensor | None = None
    sums: Tensor | None = None


class AnchorTerms(NamedTuple):
    """What a loss says of each anchor once everything is known.

    Attributes:
        value: The anchor's loss ``l_i``, shape ``(B,)``.
        positive_weights: ``w+``, shape ``(B, P)``; read only where there is a positive.
        negative_scale: Factor of the negatives' weights, shape ``(B,)``.
    """

    value: Tensor
    positive_weights: Tensor
    negative_scale: Tensor


class PairLoss(nn.Module, ABC):
    r"""A loss over pairs, defined once by its value and its pair weights.

    .. math:: L = \frac{1}{B} \sum_i l_i, \qquad
              \frac{\partial L}{\partial x_i} = \frac{1}{B}\Big(\sum_{j \in N_i} w^-_{ij} r_j
              - \sum_{j \in P_i} w^+_{ij} r_j\Big)

    Called with the batch alone, it compares the batch with itself, leaves out each anchor's own row by position,
    and gives gradient to both sides. Called with references, it compares the batch with those; references that
    carry no gradient (a memory) are streamed block by block and no ``B x M`` tensor exists.

    Denominator: summed over pairs, averaged over the B anchors. An anchor without positives or negatives adds
    what remains of its terms; no pair at all, or references of zero rows, give a differentiable 0.
    """

    #: The negatives' weights are ``scale * softmax(logits)``, and ``negative_terms`` returns these logits.
    exponential: bool = False
    #: ``combine`` reads ``negatives.hardest``.
    needs_hardest: bool = False
    #: The similarity that ``negative_terms`` meets where there is no negative.
    stand_in: float = -1.0
    #: The positives' weights depend on the negatives.
    coupled: bool = True
    #: Number of the most similar negatives of each anchor that are kept; ``None`` keeps all.
    hardest_negatives: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.loss_id = register_loss(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.loss_id = register_loss(self)  # a copy is another loss

    # ---------------------------------------------------------------- what a loss defines
    def context(self, similarity: Tensor, mask: Tensor) -> Context:
        """Return what the negatives need to know of the positives, as tensors of shape ``(B, ...)``.

        Args:
            similarity: Similarities of the anchors to candidate positives, ``(B, P)``.
            mask: True where the candidate is a positive, ``(B, P)``.
        """
        return ()

    def negative_cut(self, context: Context) -> Tensor | float:
        """Return the similarity, ``(B,)`` or one number, at or below which a negative certainly has no weight."""
        return -torch.inf

    @abstractmethod
    def negative_terms(self, similarity: Tensor, context: Context) -> NegativeTerms:
        """Return what each negative weighs and adds; ``similarity (B, n)`` is scratch and may be overwritten."""

    @abstractmethod
    def combine(self, similarity: Tensor, mask: Tensor, context: Context, negatives: NegativeTotals) -> AnchorTerms:
        """Return each anchor's value, its positives' weights and the factor of its negatives' weights.

        Args:
            similarity: Similarities of the anchors to candidate positives, ``(B, P)``.
            mask: True where the candidate is a positive, ``(B, P)``.
            context: What :meth:`context` returned.
            negatives: Totals over all negatives of each anchor.
        """

    # ---------------------------------------------------------------- what follows from it
    @property
    def parts(self) -> tuple[PairLoss, ...]:
        """The losses whose negatives are totalled; the first one gives the negatives' weights."""
        return (self,)

    def finish(
        self, similarity: Tensor, mask: Tensor, contexts: list[Context], totals: list[NegativeTotals]
    ) -> AnchorTerms:
        """Combine the totals of :attr:`parts`; one part for every loss but a hybrid."""
        return self.combine(similarity, mask, contexts[0], totals[0])

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_embeddings: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        indices: Tensor | None = None,
        ref_indices: Tensor | None = None,
        max_shared: int | None = None,
        ranks: Ranks | None = None,
    ) -> Tensor:
        """Return the scalar loss of a batch against itself or against references.

        Args:
            embeddings: Unit-length anchors, ``(B, D)``.
            labels: Integer class of each anchor, ``(B,)``.
            ref_embeddings: Unit-length references, ``(M, D)``; ``None`` compares the batch with itself.
            ref_labels: Integer class of each reference, ``(M,)``.
            indices: Data-set index of each anchor's image, ``(B,)``; pairs of equal indices are left out. A negative
                index is unknown and equals none.
            ref_indices: Data-set index of each reference's image, ``(M,)``.
            max_shared: An upper bound of the references that share a class or an image with the batch, such as
                ``EmbeddingMemory.loss_options(B)``. With it the host never waits for a GPU here, except in the hinge
                form of :class:`TripletLoss`; without, it waits once, for their number. A CPU does not need it.
            ranks: How to reach the other ranks, if these references are only this rank's share of all, such as a
                ``ShardedMemory``. Every rank then has to call the loss in the same step, a rank without rows too.

        Raises:
            ValueError: If shapes do not fit, or embeddings are longer than unit length.
            TypeError: If labels or indices are not integers, or embeddings not floating point.
        """
        check_pairs(embeddings, labels, ref_embeddings, ref_labels, indices, ref_indices)
        with torch.autocast(embeddings.device.type, enabled=False):
            anchors = _at_least_float32(embeddings)
            if ref_embeddings is None or ref_labels is None:
                if anchors.shape[0] == 0:
                    return anchors.sum() * 0.0
                return self._dense(anchors, anchors, *pair_masks(labels, labels, indices, indices, in_batch=True))
            pairs = Pairs(anchors, labels, ref_embeddings, ref_labels, indices, ref_indices, max_shared)
            if ranks is not None:
                return self._sharded(pairs, ranks)
            if ref_embeddings.shape[0] == 0 or anchors.shape[0] == 0:
                return anchors.sum() * 0.0
            if ref_embeddings.requires_grad:
                masks = pair_masks(labels, ref_labels, indices, ref_indices)
                return self._dense(anchors, ref_embeddings.to(anchors.dtype), *masks)
            return stream(self, pairs)

    @torch.no_grad()
    def pair_weights(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_embeddings: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        indices: Tensor | None = None,
        ref_indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Return the weights :math:`w^+` and :math:`w^-` of every pair, both ``(B, M)`` and 0 where no such pair is.

        They are per anchor, before the division by B. This is for reading: it does build ``B x M`` tensors.

        Example:
            >>> import torch, torch.nn.functional as F
            >>> from lightning_memdml import ContrastiveLoss
            >>> x = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.9, 0.3]]), dim=1)
            >>> positive, negative = ContrastiveLoss(margin=0.5).pair_weights(x, torch.tensor([0, 0, 1]))
            >>> negative
            tensor([[0., 0., 1.],
                    [0., 0., 1.],
                    [1., 1., 0.]])
        """
        check_pairs(embeddings, labels, ref_embeddings, ref_labels, indices, ref_indices)
        anchors = _at_least_float32(embeddings)
        if ref_embeddings is None or ref_labels is None:
            positive, negative = pair_masks(labels, labels, indices, indices, in_batch=True)
            references = anchors
        else:
            positive, negative = pair_masks(labels, ref_labels, indices, ref_indices)
            references = ref_embeddings.to(anchors.dtype)
        _, positive_weights, negative_weights = self.rows(anchors @ references.T, positive, negative)
        return positive_weights, negative_weights

    def rows(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return every anchor's value ``(B,)`` and its weights on positives and on negatives, both ``(B, M)``."""
        contexts = [part.context(similarity, positive) for part in self.parts]
        results = [
            part.negative_row(similarity, negative, context) for part, context in zip(self.parts, contexts, strict=True)
        ]
        terms = self.finish(similarity, positive, contexts, [totals for _, totals in results])
        negative_weights = results[0][0] * terms.negative_scale[:, None]
        return terms.value, torch.where(positive, terms.positive_weights, 0.0), negative_weights

    def negative_row(self, similarity: Tensor, mask: Tensor, context: Context) -> tuple[Tensor, NegativeTotals]:
        """Return the negatives' weights, up to the anchor's factor, and their totals; both from the whole row."""
        if self.hardest_negatives is not None:
            mask = hardest(similarity, mask, self.hardest_negatives)
        hidden = similarity.masked_fill(~mask, -torch.inf)
        weights, values, sums = self.negative_terms(similarity.masked_fill(~mask, self.stand_in), context)
        if self.exponential:
            logits = weights.masked_fill(~mask, -torch.inf)
            total = torch.logsumexp(logits, dim=1)
            weights = torch.exp(logits - total.clamp_min(torch.finfo(total.dtype).min)[:, None])
            weights = weights if values is None else weights * values
        else:
            weights = torch.where(mask, weights, 0.0)
            total = torch.zeros_like(similarity[:, 0]) if values is None else torch.where(mask, values, 0.0).sum(dim=1)
        weighted = torch.where(mask, weights * similarity, 0.0).sum(dim=1)
        if sums is None:
            sums = similarity.new_zeros(similarity.shape[0], 0)
        return weights, NegativeTotals(mask.sum(dim=1), total, weighted, row_max(hidden), sums)

    def _dense(self, anchors: Tensor, references: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """Return the loss with gradient to anchors and references, through the whole similarity matrix."""
        similarity = anchors @ references.T  # (B, M)
        with torch.no_grad():
            value, positive_weights, negative_weights = self.rows(similarity.detach(), positive, negative)
            gradient = (negative_weights - positive_weights) / anchors.shape[0]
        return Assigned.apply(similarity, value.mean(), gradient)

    @torch.compiler.disable
    def _sharded(self, pairs: Pairs, ranks: Ranks) -> Tensor:
        """Return the loss against references that are spread over the ranks."""
        with torch.no_grad():
            value, gradient = evaluate_sharded(self, pairs, ranks)
        rows = max(1, pairs.anchors.shape[0])
        return Assigned.apply(pairs.anchors, value.sum() / rows, gradient / rows)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
