"""The formula of a hybrid: the weights of two formulas, each held constant."""

import torch

from lightning_memdml import ContrastiveLoss, HybridLoss, SupConLoss


def contrastive(p, n):
    return (1 - p).sum() + n[n > 0.3].sum()


def supcon(p, n):
    return (torch.logsumexp(torch.cat([p, n]) / 0.1, 0) - p / 0.1).mean() if len(p) else n.sum() * 0


def hybrid(positive_loss, negative_loss):
    def weights(row, p, n, side):
        with torch.enable_grad():
            p, n = p.detach().requires_grad_(), n.detach().requires_grad_()
            value = row(p, n) + (p.sum() + n.sum()) * 0
            return torch.autograd.grad(value, (p, n))[side]

    def row(p, n):
        positive, negative = -weights(positive_loss, p, n, 0), weights(negative_loss, p, n, 1)
        return (positive * (1 - p)).sum() + (negative * n).sum()

    return row


LOSSES = {
    "hybrid": (HybridLoss(ContrastiveLoss(0.3), SupConLoss()), hybrid(contrastive, supcon)),
    "hybrid of two parts": (HybridLoss(SupConLoss(), ContrastiveLoss(0.3)), hybrid(supcon, contrastive)),
}
