"""The formulas of the softmax losses."""

import torch

from lightning_memdml import InfoNCELoss, NCALoss, SupConLoss


def info_nce(t):
    def row(p, n):
        if len(n) == 0:
            return p.sum() * 0
        return sum((torch.logsumexp(torch.cat([q[None], n]) / t, 0) - q / t for q in p), n.sum() * 0)

    return row


def supcon(t):
    def row(p, n):
        if len(p) == 0:
            return n.sum() * 0
        return (torch.logsumexp(torch.cat([p, n]) / t, 0) - p / t).mean()

    return row


def nca(t):
    def row(p, n):
        if len(p) == 0:
            return n.sum() * 0
        return torch.logsumexp(torch.cat([p, n]) / t, 0) - torch.logsumexp(p / t, 0)

    return row


LOSSES = {
    "InfoNCE": (InfoNCELoss(), info_nce(0.07)),
    "SupCon": (SupConLoss(), supcon(0.1)),
    "NCA": (NCALoss(), nca(0.1)),
}
