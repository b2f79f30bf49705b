"""The formula of a hybrid: the weights of two formulas, each held constant."""

import torch

from lightning_memdml import CircleLoss, ContrastiveLoss, DirectWeightLoss, Exponential, HybridLoss, SupConLoss


def contrastive(p, n):
    return (1 - p).sum() + n[n > 0.3].sum()


def supcon(p, n):
    return (torch.logsumexp(torch.cat([p, n]) / 0.1, 0) - p / 0.1).mean() if len(p) else n.sum() * 0


def circle(p, n):
    """Margin 0.4 and scale 4; the factors of the similarities are held constant."""
    positive = -4 * (1.4 - p).detach().clamp_min(0) * (p - 0.6)
    negative = 4 * (n + 0.4).detach().clamp_min(0) * (n - 0.4)
    if not len(p) or not len(n):
        return (p.sum() + n.sum()) * 0
    return torch.nn.functional.softplus(torch.logsumexp(positive, 0) + torch.logsumexp(negative, 0))


def three_hardest(p, n):
    n = n[(-n).argsort()[:3]]
    return (torch.exp(5 * (n.detach() - 1)) * n).sum() + p.sum() * 0


def hybrid(positive_loss, negative_loss, normalize=None, scales=(1, 1)):
    def mass(weights):
        total = {None: 1, "sum": float(weights.sum()), "mean": len(weights)}[normalize]
        return weights / total if total > 1e-12 else weights * 0

    def weights(row, p, n, side):
        with torch.enable_grad():
            p, n = p.detach().requires_grad_(), n.detach().requires_grad_()
            value = row(p, n) + (p.sum() + n.sum()) * 0
            return torch.autograd.grad(value, (p, n))[side]

    def row(p, n):
        positive, negative = -weights(positive_loss, p, n, 0), weights(negative_loss, p, n, 1)
        positive, negative = scales[0] * mass(positive), scales[1] * mass(negative)
        return (positive * (1 - p)).sum() + (negative * n).sum()

    return row


LOSSES = {
    "hybrid": (HybridLoss(ContrastiveLoss(0.3), SupConLoss()), hybrid(contrastive, supcon)),
    "hybrid of two parts": (HybridLoss(SupConLoss(), ContrastiveLoss(0.3)), hybrid(supcon, contrastive)),
    "hybrid at equal sums": (
        HybridLoss(ContrastiveLoss(0.3), SupConLoss(), "sum"),
        hybrid(contrastive, supcon, "sum"),
    ),
    "hybrid at equal sums, of two parts": (
        HybridLoss(SupConLoss(), ContrastiveLoss(0.3), "sum", negative_scale=0.5),
        hybrid(supcon, contrastive, "sum", (1, 0.5)),
    ),
    "hybrid at equal sums, with factors of a softmax": (
        HybridLoss(ContrastiveLoss(0.3), CircleLoss(0.4, 4), "sum"),
        hybrid(contrastive, circle, "sum"),
    ),
    "hybrid at equal sums, of the hardest": (
        HybridLoss(ContrastiveLoss(0.3), DirectWeightLoss(negative=Exponential(5), hardest_negatives=3), "sum"),
        hybrid(contrastive, three_hardest, "sum"),
    ),
    "hybrid of means": (
        HybridLoss(SupConLoss(), ContrastiveLoss(0.3), "mean", positive_scale=2),
        hybrid(supcon, contrastive, "mean", (2, 1)),
    ),
}
