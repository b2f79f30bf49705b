"""The binomial deviance loss."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_memdml.checks import check_finite, check_positive, check_types
from lightning_memdml.losses.pair_loss import AnchorTerms, Backend, Context, NegativeTerms, NegativeTotals, PairLoss
from lightning_memdml.losses.row_ops import softplus, sum_negative_logs


class BinomialDevianceLoss(PairLoss):
    r"""A soft contrastive loss: a logistic loss of each pair's similarity against a base.

    $$
    l_i = \frac{1}{|P_i|} \sum_{j \in P_i} \log(1 + e^{\alpha (\lambda - s_{ij})})
    + \frac{1}{|N_i|} \sum_{j \in N_i} \log(1 + e^{\beta (s_{ij} - \lambda)})
    $$

    $$
    w^+ = \frac{\alpha}{|P_i|} \sigma(\alpha (\lambda - s)), \qquad
    w^- = \frac{\beta}{|N_i|} \sigma(\beta (s - \lambda))
    $$

    Denominator: averaged over each side's pairs, then over the B anchors.

    Args:
        alpha: Scale of the positives, above 0.
        beta: Scale of the negatives, above 0.
        base: The similarity $\lambda$ that separates the sides.
        backend: How the loss is computed against a memory, see `PairLoss`.

    Raises:
        ValueError: If `alpha` or `beta` is not above 0, or a number is not finite.

    References:
        Yi et al. 2014, arXiv 1407.4979.

    Example:
        >>> import torch.nn.functional as F
        >>> x = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]), dim=1)
        >>> BinomialDevianceLoss()(x, torch.tensor([0, 0, 1]))
        tensor(19.3988)
    """

    needs_negatives = False
    fill_value = -torch.inf  # adds 0 to the sums

    def __init__(self, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5, *, backend: Backend = "auto") -> None:
        check_types(BinomialDevianceLoss.__init__, locals(), "backend")
        super().__init__(backend)
        self.alpha, self.beta = check_positive("alpha", alpha), check_positive("beta", beta)
        self.base = check_finite("base", base)

    def negative_terms(self, similarity: Tensor, context: Context) -> NegativeTerms:
        """Return logistic weights, and as sums the two parts of the values that they are derivatives of."""
        logits = similarity.sub_(self.base).mul_(self.beta)
        weights = torch.sigmoid(logits)
        # The values: log(1 + exp(x)) = max(x, 0) - log(sigmoid(|x|)), where sigmoid(|x|) = 1/2 + |sigmoid(x) - 1/2|.
        above = logits.clamp_min_(0).sum(dim=1)
        rest = sum_negative_logs((weights - 0.5).abs_().add_(0.5))
        return NegativeTerms(weights, sums=torch.stack([above, rest], dim=1))

    def combine(self, similarity: Tensor, mask: Tensor, context: Context, negatives: NegativeTotals) -> AnchorTerms:
        """Add the positives, and divide each side by its number of pairs."""
        logits = self.alpha * (self.base - similarity)
        per_positive = 1 / mask.sum(dim=1, keepdim=True).clamp_min(1).to(similarity.dtype)
        per_negative = 1 / negatives.number.clamp_min(1).to(similarity.dtype)
        positives = torch.where(mask, softplus(logits), 0.0).sum(dim=1) * per_positive[:, 0]
        weights = self.alpha * torch.sigmoid(logits) * per_positive
        return AnchorTerms(positives + per_negative * negatives.sums.sum(dim=1), weights, per_negative * self.beta)
