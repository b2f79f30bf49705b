"""The lifted structure loss."""

from __future__ import annotations

from torch import Tensor

from lightning_memdml.checks import check_finite, check_types
from lightning_memdml.losses.pair_loss import AnchorTerms, Backend, Context, NegativeTerms, NegativeTotals, PairLoss
from lightning_memdml.losses.row_ops import masked_logsumexp, masked_softmax


class LiftedStructureLoss(PairLoss):
    r"""Compares the soft minimum of the positives with the soft maximum of the negatives.

    $$
    l_i = \Big[\text{margin} + \log \sum_{j \in P_i} e^{-s_{ij}} + \log \sum_{j \in N_i} e^{s_{ij}}\Big]_+
    $$

    $$
    w^+ = \mathbb{1}[l_i > 0]\, \mathrm{softmax}_{P_i}(-s), \qquad
    w^- = \mathbb{1}[l_i > 0]\, \mathrm{softmax}_{N_i}(s)
    $$

    This is the form of the multi-similarity paper, whose $\lambda$ cancels. An anchor without positives or without
    negatives gives 0.

    Denominator: averaged over the B anchors. The weights of each side sum to at most 1.

    Args:
        margin: Number added inside the hinge.
        backend: How the loss is computed against a memory, see `PairLoss`.

    Raises:
        ValueError: If `margin` is not finite.

    References:
        Song et al. 2016, arXiv 1511.06452; similarity form of Wang et al. 2019, arXiv 1904.06627.

    Example:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> x = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]), dim=1)
        >>> LiftedStructureLoss()(x, torch.tensor([0, 0, 1]))
        tensor(0.1867)
    """

    exponential = True

    def __init__(self, margin: float = 0.0, *, backend: Backend = "auto") -> None:
        check_types(LiftedStructureLoss.__init__, locals(), "backend")
        super().__init__(backend)
        self.margin = check_finite("margin", margin)

    def negative_terms(self, similarity: Tensor, context: Context) -> NegativeTerms:
        """Return the similarities as logits."""
        return NegativeTerms(similarity)

    def combine(self, similarity: Tensor, mask: Tensor, context: Context, negatives: NegativeTotals) -> AnchorTerms:
        """Combine both sides in one hinge."""
        value = (self.margin + masked_logsumexp(-similarity, mask) + negatives.total).clamp_min(0)
        active = (value > 0).to(similarity.dtype)
        return AnchorTerms(value, active[:, None] * masked_softmax(-similarity, mask), active)
