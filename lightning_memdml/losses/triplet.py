"""The triplet loss over all triplets of an anchor."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memdml.losses.pair_loss import AnchorTerms, Context, NegativeTerms, NegativeTotals, PairLoss

# Up to so many positives per anchor, comparing block and positive in three plain passes beats bisection.
FEW_POSITIVES = 24
# The product of so many factors `1 + exp(s - s')`, each at most 8.4, fits in float32.
FACTORS = 32


class TripletLoss(PairLoss):
    r"""Asks every positive to be closer than every negative, over all triplets of an anchor.

    .. math:: l_i = \sum_{p \in P_i} \sum_{n \in N_i} [s_{in} - s_{ip} + m]_+ \quad\text{(hinge)}, \qquad
              \sum_{p \in P_i} \sum_{n \in N_i} \log(1 + e^{s_{in} - s_{ip}}) \quad\text{(soft)}

    .. math:: w^+_{ip} = |\{n : s_{in} > s_{ip} - m\}|, \qquad w^-_{in} = |\{p : s_{ip} < s_{in} + m\}|

    (soft: counts become sums of :math:`\sigma(s_{in} - s_{ip})`). No triplet is ever stored.

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
        weights = torch.zeros_like(similarity).scatter(1, columns, negatives.per_positive)
        if self.soft:
            value = negatives.total
        else:  # sum of (s - edge) over the offences
            edges = (positives - self.margin).masked_fill(positives.isinf(), 0.0)
            value = negatives.weighted - (negatives.per_positive * edges).sum(dim=1)
        return AnchorTerms(value, weights, torch.ones_like(value))


def _counted_one_by_one(similarity: Tensor, edges: Tensor) -> NegativeTerms:
    weights, above = torch.zeros_like(similarity), torch.empty_like(similarity)
    counts = torch.empty_like(edges)
    for k, edge in enumerate(edges.unbind(dim=1)):
        torch.gt(similarity, edge[:, None], out=above)
        weights += above
        torch.sum(above, dim=1, out=counts[:, k])
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
    """Sum ``log(1 + e)`` and ``e / (1 + e)``, ``e = exp(s) exp(-s')``, over the positives: one exponential for all."""
    negative, positive = similarity.exp_(), (-positives).exp()
    values, factors = torch.zeros_like(similarity), torch.ones_like(similarity)
    unoffended, term = torch.zeros_like(similarity), torch.empty_like(similarity)
    counts = torch.empty_like(positives)
    for k, scale in enumerate(positive.unbind(dim=1), start=1):
        torch.mul(negative, scale[:, None], out=term).add_(1.0)
        factors.mul_(term)
        if k % FACTORS == 0 or k == positives.shape[1]:
            values += factors.log_()
            factors.fill_(1.0)
        unoffended += term.reciprocal_()
        torch.sum(term, dim=1, out=counts[:, k - 1])
    weights = unoffended.neg_().add_(positives.shape[1])
    return NegativeTerms(weights, values, similarity.shape[1] - counts)
