"""The triplet loss over all triplets of an anchor."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_memdml.checks import check_finite, check_types
from lightning_memdml.losses.listed_pairs import flatnonzero
from lightning_memdml.losses.pair_loss import AnchorTerms, Backend, Context, NegativeTerms, NegativeTotals, PairLoss
from lightning_memdml.losses.polynomials import DifferencePolynomial, polynomial, power_sums, powers
from lightning_memdml.losses.row_ops import HOST_DEVICES

FEW_TRIPLETS = 1 << 17  # that are compared at once: beyond, a tensor of all of them costs more than calls of torch
# Up to this number of positives per anchor, comparing a block with each of them is faster than a table.
FEW_POSITIVES = 16
EDGE_BUCKETS = 512  # of that table, for each anchor. With twice as many it takes longer to make.
# The value of a triplet in the soft form and its derivative, as polynomials of s_in and s_ip.
SOFTPLUS = DifferencePolynomial(lambda difference: np.logaddexp(0, difference))
SIGMOID = DifferencePolynomial(lambda difference: 1 / (1 + np.exp(-difference)))


class TripletLoss(PairLoss):
    r"""Requires each positive to be more similar than each negative, over all triplets of an anchor.

    $$
    l_i = \sum_{p \in P_i} \sum_{n \in N_i} [s_{in} - s_{ip} + m]_+ \quad\text{(hinge)}, \qquad
    \sum_{p \in P_i} \sum_{n \in N_i} \log(1 + e^{s_{in} - s_{ip}}) \quad\text{(soft)}
    $$

    $$
    w^+_{ip} = |\{n : s_{in} > s_{ip} - m\}|, \qquad w^-_{in} = |\{p : s_{ip} < s_{in} + m\}|
    $$

    In the soft form the counts become sums of $\sigma(s_{in} - s_{ip})$. No triplet is ever stored.

    The cost of the hinge form grows with the number of positives of an anchor, and the host waits for a GPU to learn
    it. The cost of the soft form does not: its terms are computed as polynomials of the two similarities, which are
    exact up to rounding for embeddings of unit length only.

    Denominator: summed over triplets, averaged over the B anchors. The value grows with the memory.

    Args:
        margin: By how much a positive must be more similar than a negative. Hinge form only.
        soft: Use the soft form, which ignores `margin`.
        backend: How the loss is computed against a memory, see `PairLoss`.

    Raises:
        ValueError: If `margin` is not finite.

    References:
        Schroff et al. 2015, arXiv 1503.03832; batch-all and soft form of Hermans et al. 2017, arXiv 1703.07737.

    Example:
        >>> import torch.nn.functional as F
        >>> x = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]), dim=1)
        >>> TripletLoss(margin=0.1)(x, torch.tensor([0, 0, 1]))  # (0.8 - 0.6 + 0.1 + 0.96 - 0.6 + 0.1) / 3
        tensor(0.2533)
    """

    def __init__(self, margin: float = 0.1, soft: bool = False, *, backend: Backend = "auto") -> None:
        check_types(TripletLoss.__init__, locals(), "backend")
        super().__init__(backend)
        self.margin, self.soft = check_finite("margin", margin), soft
        self.wants_most_positives_first = not soft
        self.fill_value = 0.0 if soft else -torch.inf  # adds 0 to the sums of powers, or to the counts

    def context(self, similarity: Tensor, mask: Tensor) -> Context:
        """Return the positives' similarities, ascending and padded with `inf`, and their columns, `(B, K)`.

        In the soft form, return the sums of their powers and the coefficients of the negatives' weights, both of shape
        `(B, degree + 1)`.
        """
        if self.soft:
            if similarity.device.type in HOST_DEVICES:
                sums = _with_number(mask.sum(dim=1), power_sums(similarity.masked_fill(~mask, 0.0)))
            else:
                is_positive = mask.to(similarity.dtype)[:, None]
                sums = torch.cat([is_positive.sum(dim=2), (is_positive @ powers(similarity))[:, 0]], dim=1)
            return sums, sums @ SIGMOID.like(sums).T
        most = int(mask.sum(dim=1).max()) if mask.numel() else 0
        ordered, order = similarity.masked_fill(~mask, torch.inf).sort(dim=1)
        return ordered[:, :most].contiguous(), order[:, :most]

    def negative_threshold(self, context: Context) -> Tensor | float:
        """Return the similarity at or below which every positive is ahead of a negative by the margin."""
        if self.soft:
            return -torch.inf
        positives = context[0]
        return positives[:, 0] - self.margin if positives.shape[1] else torch.inf

    def negative_terms(self, similarity: Tensor, context: Context) -> NegativeTerms:
        """Return the number of violated triplets of each negative, and as further sums those of each positive."""
        if self.soft:
            return NegativeTerms(polynomial(similarity, context[1]), sums=power_sums(similarity))
        edges = context[0] - self.margin
        if similarity.numel() * edges.shape[1] <= FEW_TRIPLETS:
            return _count_at_once(similarity, edges)
        if edges.shape[1] <= FEW_POSITIVES:
            return _count_one_by_one(similarity, edges)
        if similarity.device.type in HOST_DEVICES:
            return _count_by_buckets(similarity, edges)
        return _count_by_bisection(similarity, edges)

    def combine(self, similarity: Tensor, mask: Tensor, context: Context, negatives: NegativeTotals) -> AnchorTerms:
        """Weigh each positive by the number of its violated triplets."""
        if self.soft:
            sums = _with_number(negatives.number, negatives.sums)
            coefficients = sums @ SIGMOID.like(sums)
            if similarity.device.type in HOST_DEVICES:
                weights = polynomial(similarity, coefficients)
            else:
                constant, others = coefficients[:, :1, None], coefficients[:, 1:, None]
                weights = torch.baddbmm(constant, powers(similarity), others).squeeze(2)
            value = (sums @ SOFTPLUS.like(sums) * context[0]).sum(dim=1)
        else:
            positives, columns = context
            violations = negatives.sums[:, : positives.shape[1]]
            weights = torch.zeros_like(similarity).scatter(1, columns, violations)
            edges = (positives - self.margin).masked_fill(positives.isinf(), 0.0)
            value = negatives.weighted - (violations * edges).sum(dim=1)  # sum of (s - edge) over the violated triplets
        return AnchorTerms(value, weights, torch.ones_like(value))


def _with_number(number: Tensor, sums: Tensor) -> Tensor:
    return torch.cat([number[:, None], sums], dim=1)  # the sums of powers 0, 1, 2, ...


def _rows_with_positive(positives: Tensor) -> list[int]:
    """Return for each column the number of leading rows up to the last one that has a positive there.

    The streamed evaluation orders anchors by their number of positives, so the padding of shorter rows is skipped.
    """
    row_number = torch.arange(1, positives.shape[0] + 1, device=positives.device)
    return ((positives < torch.inf) * row_number[:, None]).amax(dim=0).tolist()


def _count_at_once(similarity: Tensor, edges: Tensor) -> NegativeTerms:
    violated = (similarity[:, None] > edges[:, :, None]).to(similarity.dtype)  # (B, K, n)
    return NegativeTerms(violated.sum(dim=1), sums=violated.sum(dim=2))


def _count_one_by_one(similarity: Tensor, edges: Tensor) -> NegativeTerms:
    weights, scratch = torch.zeros_like(similarity), torch.empty_like(similarity)
    counts = torch.zeros_like(edges.T)
    for k, rows in enumerate(_rows_with_positive(edges)):
        above = torch.gt(similarity[:rows], edges[:rows, k, None], out=(scratch if k else weights)[:rows])
        torch.sum(above, dim=1, out=counts[k, :rows])
        if k:
            weights[:rows].add_(above)
    return NegativeTerms(weights, sums=counts.T)


def _count_by_bisection(similarity: Tensor, edges: Tensor) -> NegativeTerms:
    # Of the ascending edges, the number of those below s. In int32, whose histogram takes three quarters of the time.
    violated = torch.searchsorted(edges, similarity.contiguous(), out_int32=True)
    bins = edges.shape[1] + 1
    rows = torch.arange(edges.shape[0], dtype=torch.int32, device=edges.device)[:, None] * bins
    histogram = torch.bincount((violated + rows).flatten(), minlength=edges.shape[0] * bins)
    at_most = histogram.view(-1, bins).cumsum(dim=1)  # negatives with at most k violated triplets
    counts = at_most[:, -1:] - at_most[:, :-1]
    return NegativeTerms(violated.to(similarity.dtype), sums=counts.to(similarity.dtype))


def _count_by_buckets(similarity: Tensor, edges: Tensor) -> NegativeTerms:
    """Count the violated triplets of those negatives that violate any. On a CPU.

    Where an anchor has a hundred positives, this takes a fifth of the time of bisection for every negative.
    """
    (rows, width), most = similarity.shape, edges.shape[1]
    violating = flatnonzero(similarity > edges[:, :1])
    weights = torch.zeros_like(similarity, memory_format=torch.contiguous_format)
    if len(violating) == 0:
        return NegativeTerms(weights, sums=torch.zeros_like(edges))
    ends = np.searchsorted(violating.numpy(), np.arange(1, rows + 1) * width)
    number = torch.from_numpy(np.diff(ends, prepend=0))
    row = torch.arange(rows, dtype=torch.int32).repeat_interleave(number, output_size=len(violating))
    places = _edges_below(similarity.reshape(-1).index_select(0, violating), row, edges)
    counts = torch.bincount(places - 1, minlength=rows * most).view(rows, most)  # by the last violated triplet
    counts = counts.flip(1).cumsum(dim=1).flip(1)
    weights.view(-1).index_copy_(0, violating, places.sub_(row, alpha=most).to(weights.dtype))
    return NegativeTerms(weights, sums=counts.to(similarity.dtype))


def _edges_below(similarity: Tensor, row: Tensor, edges: Tensor) -> Tensor:
    """Return how many edges are below a similarity, and all K edges of each earlier anchor, `(N,)`.

    A table has the answer for each of 512 equal intervals, its buckets. Only the similarities that share a bucket with
    an edge are looked up by bisection, which takes 15 ns for each.

    Args:
        similarity: Above the lowest edge of its anchor, `(N,)`.
        row: The anchor of each, `(N,)`.
        edges: Ascending and padded with `inf`, `(B, K)`, one of them finite.
    """
    rows = torch.arange(len(edges), dtype=torch.int32)[:, None]
    lowest, largest = edges.min(), edges.masked_fill(edges.isinf(), -torch.inf).max()
    scale = (EDGE_BUCKETS - 2) / (largest - lowest).clamp_min(1e-6)

    def bucket(numbers: Tensor, row: Tensor) -> Tensor:
        # Rounding keeps order: what is in a higher bucket than an edge is above it. The last bucket has only padding.
        within = numbers.sub(lowest).mul_(scale).clamp_max_(EDGE_BUCKETS - 1).int()
        return within.add_(row, alpha=EDGE_BUCKETS)

    in_bucket = torch.bincount(bucket(edges, rows).flatten(), minlength=len(edges) * EDGE_BUCKETS)
    has_edge = in_bucket.view(-1, EDGE_BUCKETS) > 0
    has_edge[:, -1] = False
    buckets = bucket(similarity, row)
    places = in_bucket.cumsum(dim=0).sub_(in_bucket).index_select(0, buckets)
    unclear = flatnonzero(has_edge.view(-1).index_select(0, buckets))
    # The edges of all anchors as one ascending list, each anchor's in an interval of its own. In float64 they stay
    # 2^-44 apart, which is less than the error of a similarity.
    span = float(torch.maximum(largest.abs(), lowest.abs())) + 2.0
    listed = edges.double().clamp_max(span).add_(rows, alpha=2 * span).flatten()
    keys = similarity.index_select(0, unclear).double().add_(row.index_select(0, unclear), alpha=2 * span)
    return places.index_copy_(0, unclear, torch.searchsorted(listed, keys))
