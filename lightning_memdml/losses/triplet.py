"""The triplet loss over all triplets of an anchor."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memdml.losses.pair_loss import AnchorTerms, Context, NegativeTerms, NegativeTotals, PairLoss
from lightning_memdml.losses.rows import exp_

# Up to so many positives per anchor, comparing block and positive in three plain passes beats bisection.
FEW_POSITIVES = 24
# The product of so many terms `1 + exp(s - s')`, each at most 8.4, fits in float32.
FACTORS = 40


class TripletLoss(PairLoss):
    r"""Asks every positive to be closer than every negative, over all triplets of an anchor.

    .. math:: l_i = \sum_{p \in P_i} \sum_{n \in N_i} [s_{in} - s_{ip} + m]_+ \quad\text{(hinge)}, \qquad
              \sum_{p \in P_i} \sum_{n \in N_i} \log(1 + e^{s_{in} - s_{ip}}) \quad\text{(soft)}

    .. math:: w^+_{ip} = |\{n : s_{in} > s_{ip} - m\}|, \qquad w^-_{in} = |\{p : s_{ip} < s_{in} + m\}|

    (soft: counts become sums of :math:`\sigma(s_{in} - s_{ip})`). No triplet is ever stored.
    The positives of an anchor are compared with its negatives one after the other, so their number has a price; for it
    the host waits for a GPU.

    Denominator: summed over triplets, averaged over the B anchors; it grows with the memory.

    Args:
        margin: Distance in similarity that a positive must be ahead, hinge only.
        soft: Take the soft form; ``margin`` is then not used.

    References:
        Schroff et al. 2015, arXiv 1503.03832; batch-all and soft form of Hermans et al. 2017, arXiv 1703.07737.

    Example:
        >>> import torch.nn.functional as F
        >>> x = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]), dim=1)
        >>> TripletLoss(margin=0.1)(x, torch.tensor([0, 0, 1]))  # (0.8 - 0.6 + 0.1 + 0.96 - 0.6 + 0.1) / 3
        tensor(0.2533)
    """

    compares_positives = True

    def __init__(self, margin: float = 0.1, soft: bool = False) -> None:
        super().__init__()
        self.margin, self.soft = margin, soft

    def context(self, similarity: Tensor, mask: Tensor) -> Context:
        """State the positives' similarities, ascending and padded with ``inf``, and where they stood, ``(B, K)``."""
        most = int(mask.sum(dim=1).max()) if mask.numel() else 0
        ordered, order = similarity.masked_fill(~mask, torch.inf).sort(dim=1)
        return ordered[:, :most].contiguous(), order[:, :most]

    def negative_cut(self, context: Context) -> Tensor | float:
        """Return the similarity below which a negative trails every positive by the margin."""
        positives = context[0]
        if self.soft or positives.shape[1] == 0:
            return -torch.inf if self.soft else torch.inf
        return positives[:, 0] - self.margin

    def negative_terms(self, similarity: Tensor, context: Context) -> NegativeTerms:
        """Return how many positives each negative offends, and how many negatives each positive."""
        positives = context[0]
        if self.soft:
            return _soft_offences(similarity, positives)
        edges = positives - self.margin
        if positives.shape[1] <= FEW_POSITIVES:
            return _counted_one_by_one(similarity, edges)
        return _counted_by_bisection(similarity, edges)

    def combine(self, similarity: Tensor, mask: Tensor, context: Context, negatives: NegativeTotals) -> AnchorTerms:
        """Give each positive the number of negatives that offend it."""
        positives, columns = context
        offences = negatives.per_positive[:, : positives.shape[1]]
        weights = torch.zeros_like(similarity).scatter(1, columns, offences)
        if self.soft:
            value = negatives.per_positive[:, -1]
        else:  # sum of (s - edge) over the offences
            edges = (positives - self.margin).masked_fill(positives.isinf(), 0.0)
            value = negatives.weighted - (offences * edges).sum(dim=1)
        return AnchorTerms(value, weights, torch.ones_like(value))


def _rows_with_positive(positives: Tensor) -> list[int]:
    """Return for each place in the sorted rows the number of leading rows that reach so far.

    The streamed evaluation orders anchors by their number of positives: the padding of the shorter rows costs nothing.
    """
    row_number = torch.arange(1, positives.shape[0] + 1, device=positives.device)
    return (positives.isfinite() * row_number[:, None]).amax(dim=0).tolist()


def _counted_one_by_one(similarity: Tensor, edges: Tensor) -> NegativeTerms:
    weights, scratch = torch.zeros_like(similarity), torch.empty_like(similarity)
    counts = torch.zeros_like(edges)
    for k, rows in enumerate(_rows_with_positive(edges)):
        above = torch.gt(similarity[:rows], edges[:rows, k, None], out=scratch[:rows])
        weights[:rows] += above
        counts[:rows, k] = above.sum(dim=1)
    return NegativeTerms(weights, per_positive=counts)


def _counted_by_bisection(similarity: Tensor, edges: Tensor) -> NegativeTerms:
    offended = torch.searchsorted(edges, similarity.contiguous())  # of the ascending edges, those below s
    bins = edges.shape[1] + 1
    rows = torch.arange(edges.shape[0], device=edges.device)[:, None] * bins
    histogram = torch.bincount((offended + rows).flatten(), minlength=edges.shape[0] * bins)
    at_most = histogram.view(-1, bins).cumsum(dim=1)  # negatives that offend at most so many positives
    counts = at_most[:, -1:] - at_most[:, :-1]
    return NegativeTerms(offended.to(similarity.dtype), per_positive=counts.to(similarity.dtype))


def _soft_offences(similarity: Tensor, positives: Tensor) -> NegativeTerms:
    reach = positives.isfinite().sum(dim=1)
    if not (reach.diff() > 0).any():
        weights, per_positive = _soft_sums(similarity, positives)
    else:
        order = reach.argsort(descending=True)
        weights, per_positive = (block[order.argsort()] for block in _soft_sums(similarity[order], positives[order]))
    return NegativeTerms(weights, per_positive=per_positive)


def _soft_sums(similarity: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """Sum ``a / (a + q)`` with ``a = exp(s)``, ``q = exp(s')`` over the positives s' and over the negatives s.

    Written as products and sums over ``a + q``, a positive costs five plain passes and no exponential. A last column
    beside the sums over the negatives has those of ``log(1 + a / q)`` over both. Rows come in falling order of length.
    """
    negative, positive = exp_(similarity), positives.exp()
    weights, factors, scratch = torch.zeros_like(similarity), torch.empty_like(similarity), torch.empty_like(similarity)
    inverse_sums, logs = torch.zeros_like(positives), similarity.new_zeros(similarity.shape[0], 1)
    ends = _rows_with_positive(positives)
    for first in range(0, len(ends), FACTORS):
        chunk = positives[:, first : first + FACTORS]
        factors.copy_(chunk.masked_fill(chunk.isinf(), 0.0).sum(dim=1, keepdim=True).neg().exp())
        for k, rows in enumerate(ends[first : first + FACTORS], start=first):
            term = torch.add(negative[:rows], positive[:rows, k, None], out=scratch[:rows])
            factors[:rows] *= term
            weights[:rows] += term.reciprocal_()
            inverse_sums[:rows, k] = term.sum(dim=1)
        logs += _sum_of_logs(factors, chunk.shape[1])
    offences = torch.where(positives.isfinite(), similarity.shape[1] - positive * inverse_sums, 0.0)
    return weights.mul_(negative), torch.cat([offences, logs], dim=1)


def _sum_of_logs(factors: Tensor, terms: int) -> Tensor:
    """Return each row's sum of logarithms, ``(B, 1)``, of products of so many terms; ``factors`` is overwritten.

    A logarithm costs ten times a product, so as many columns as float32 holds are multiplied first.
    """
    logs = factors.new_zeros(factors.shape[0], 1)
    while 2 * terms <= FACTORS:
        half = factors.shape[1] // 2
        logs += factors[:, 2 * half :].log().sum(dim=1, keepdim=True)
        factors = factors[:, :half].mul_(factors[:, half : 2 * half])
        terms *= 2
    return logs + factors.log_().sum(dim=1, keepdim=True)
