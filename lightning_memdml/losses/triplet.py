"""The triplet loss over all triplets of an anchor."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_memdml.losses.pair_loss import AnchorTerms, Context, NegativeTerms, NegativeTotals, PairLoss
from lightning_memdml.losses.polynomials import DifferencePolynomial, polynomial, power_sums

# Up to so many positives per anchor, comparing block and positive in three plain passes beats bisection.
FEW_POSITIVES = 24
# The soft form's terms of a triplet and their derivative, in the powers of s_in and of s_ip.
SOFTPLUS = DifferencePolynomial(lambda difference: np.logaddexp(0, difference))
SIGMOID = DifferencePolynomial(lambda difference: 1 / (1 + np.exp(-difference)))


class TripletLoss(PairLoss):
    r"""Asks every positive to be closer than every negative, over all triplets of an anchor.

    $$
    l_i = \sum_{p \in P_i} \sum_{n \in N_i} [s_{in} - s_{ip} + m]_+ \quad\text{(hinge)}, \qquad
    \sum_{p \in P_i} \sum_{n \in N_i} \log(1 + e^{s_{in} - s_{ip}}) \quad\text{(soft)}
    $$

    $$
    w^+_{ip} = |\{n : s_{in} > s_{ip} - m\}|, \qquad w^-_{in} = |\{p : s_{ip} < s_{in} + m\}|
    $$

    (soft: counts become sums of $\sigma(s_{in} - s_{ip})$). No triplet is ever stored.
    The hinge form compares the positives of an anchor with its negatives one after the other, so their number has a
    price; for it the host waits for a GPU. The soft form costs the same for any number: its terms are taken as
    polynomials of the two similarities, exact up to rounding for embeddings of unit length and for no others.

    Denominator: summed over triplets, averaged over the B anchors; it grows with the memory.

    Args:
        margin: Distance in similarity that a positive must be ahead, hinge only.
        soft: Take the soft form; `margin` is then not used.

    References:
        Schroff et al. 2015, arXiv 1503.03832; batch-all and soft form of Hermans et al. 2017, arXiv 1703.07737.

    Example:
        >>> import torch.nn.functional as F
        >>> x = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]), dim=1)
        >>> TripletLoss(margin=0.1)(x, torch.tensor([0, 0, 1]))  # (0.8 - 0.6 + 0.1 + 0.96 - 0.6 + 0.1) / 3
        tensor(0.2533)
    """

    def __init__(self, margin: float = 0.1, soft: bool = False) -> None:
        super().__init__()
        self.margin, self.soft = margin, soft
        self.fill_value = 0.0 if soft else -torch.inf  # adds nothing to the sums of powers, or to the counts

    def context(self, similarity: Tensor, mask: Tensor) -> Context:
        """State the positives' similarities, ascending and padded with `inf`, and where they stood, `(B, K)`.

        The soft form states the sums of their powers, and the coefficients of the negatives' weights, both of shape
        `(B, degree + 1)`.
        """
        if self.soft:
            sums = _with_number(mask.sum(dim=1), power_sums(similarity.masked_fill(~mask, 0.0)))
            return sums, sums @ SIGMOID.like(sums).T
        most = int(mask.sum(dim=1).max()) if mask.numel() else 0
        ordered, order = similarity.masked_fill(~mask, torch.inf).sort(dim=1)
        return ordered[:, :most].contiguous(), order[:, :most]

    def negative_threshold(self, context: Context) -> Tensor | float:
        """Return the similarity below which a negative trails every positive by the margin."""
        if self.soft:
            return -torch.inf
        positives = context[0]
        return positives[:, 0] - self.margin if positives.shape[1] else torch.inf

    def negative_terms(self, similarity: Tensor, context: Context) -> NegativeTerms:
        """Return how many positives each negative offends, and how many negatives each positive."""
        if self.soft:
            return NegativeTerms(polynomial(similarity, context[1]), sums=power_sums(similarity))
        edges = context[0] - self.margin
        if edges.shape[1] <= FEW_POSITIVES:
            return _counted_one_by_one(similarity, edges)
        return _counted_by_bisection(similarity, edges)

    def combine(self, similarity: Tensor, mask: Tensor, context: Context, negatives: NegativeTotals) -> AnchorTerms:
        """Give each positive the number of negatives that offend it."""
        if self.soft:
            sums = _with_number(negatives.number, negatives.sums)
            weights = polynomial(similarity, sums @ SIGMOID.like(sums))
            value = (sums @ SOFTPLUS.like(sums) * context[0]).sum(dim=1)
        else:
            positives, columns = context
            offences = negatives.sums[:, : positives.shape[1]]
            weights = torch.zeros_like(similarity).scatter(1, columns, offences)
            edges = (positives - self.margin).masked_fill(positives.isinf(), 0.0)
            value = negatives.weighted - (offences * edges).sum(dim=1)  # sum of (s - edge) over the offences
        return AnchorTerms(value, weights, torch.ones_like(value))


def _with_number(number: Tensor, sums: Tensor) -> Tensor:
    return torch.cat([number[:, None].to(sums.dtype), sums], dim=1)  # the sums of powers 0, 1, 2, ...


def _rows_with_positive(positives: Tensor) -> list[int]:
    """Return for each place in the sorted rows the number of leading rows that reach so far.

    The streamed evaluation orders anchors by their number of positives: the padding of the shorter rows costs nothing.
    """
    row_number = torch.arange(1, positives.shape[0] + 1, device=positives.device)
    return ((positives < torch.inf) * row_number[:, None]).amax(dim=0).tolist()


def _counted_one_by_one(similarity: Tensor, edges: Tensor) -> NegativeTerms:
    weights, scratch = torch.zeros_like(similarity), torch.empty_like(similarity)
    counts = torch.zeros_like(edges.T)
    for k, rows in enumerate(_rows_with_positive(edges)):
        above = torch.gt(similarity[:rows], edges[:rows, k, None], out=(scratch if k else weights)[:rows])
        torch.sum(above, dim=1, out=counts[k, :rows])
        if k:
            weights[:rows].add_(above)
    return NegativeTerms(weights, sums=counts.T)


def _counted_by_bisection(similarity: Tensor, edges: Tensor) -> NegativeTerms:
    offended = torch.searchsorted(edges, similarity.contiguous())  # of the ascending edges, those below s
    bins = edges.shape[1] + 1
    rows = torch.arange(edges.shape[0], device=edges.device)[:, None] * bins
    histogram = torch.bincount((offended + rows).flatten(), minlength=edges.shape[0] * bins)
    at_most = histogram.view(-1, bins).cumsum(dim=1)  # negatives that offend at most so many positives
    counts = at_most[:, -1:] - at_most[:, :-1]
    return NegativeTerms(offended.to(similarity.dtype), sums=counts.to(similarity.dtype))
