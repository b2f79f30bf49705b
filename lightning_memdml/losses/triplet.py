"""The triplet loss over all triplets of an anchor."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memdml.losses.pair_loss import AnchorTerms, Context, NegativeTotals, PairLoss
from lightning_memdml.losses.rows import block_softplus, step_


class TripletLoss(PairLoss):
    r"""Asks every positive to be closer than every negative, over all triplets of an anchor.

    .. math:: l_i = \sum_{p \in P_i} \sum_{n \in N_i} [s_{in} - s_{ip} + m]_+ \quad\text{(hinge)}, \qquad
              \sum_{p \in P_i} \sum_{n \in N_i} \log(1 + e^{s_{in} - s_{ip}}) \quad\text{(soft)}

    .. math:: w^+_{ip} = |\{n : s_{in} > s_{ip} - m\}|, \qquad w^-_{in} = |\{p : s_{ip} < s_{in} + m\}|

    (soft: counts become sums of :math:`\sigma(s_{in} - s_{ip})`). No triplet is ever stored: the positives of a row
    are sorted once, and each negative finds its count by bisection.

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

    def negative_terms(self, similarity: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Return how many positives each negative offends, and by how much."""
        positives = context[0]
        if self.soft:
            weights, values = torch.zeros_like(similarity), torch.zeros_like(similarity)
            for positive in positives.unbind(dim=1):
                gap = similarity - positive[:, None]
                values += block_softplus(gap)
                weights += gap.sigmoid_()
            return weights, values
        reach = similarity + self.margin
        offended = torch.searchsorted(positives, reach)
        below = torch.nn.functional.pad(positives.masked_fill(positives.isinf(), 0).cumsum(dim=1), (1, 0))
        weights = offended.to(similarity.dtype)
        return weights, weights * reach - below.gather(1, offended)

    def per_positive_terms(self, similarity: Tensor, context: Context) -> Tensor:
        """Return how many negatives offend each positive."""
        offences = torch.zeros_like(context[0])
        for k, positive in enumerate(context[0].unbind(dim=1)):
            offences[:, k] = self._offence(similarity, positive)
        return offences

    def _offence(self, similarity: Tensor, positive: Tensor) -> Tensor:
        if self.soft:
            return (similarity - positive[:, None]).sigmoid_().sum(dim=1)
        return step_(similarity.clone(), (positive - self.margin)[:, None]).sum(dim=1)

    def combine(self, similarity: Tensor, mask: Tensor, context: Context, negatives: NegativeTotals) -> AnchorTerms:
        """Give each positive the number of negatives that offend it."""
        weights = torch.zeros_like(similarity).scatter(1, context[1], negatives.per_positive)
        return AnchorTerms(negatives.total, weights, torch.ones_like(negatives.total))
