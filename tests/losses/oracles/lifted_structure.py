"""The formula of lifted structure."""

import torch

from lightning_memdml import LiftedStructureLoss


def lifted_structure(margin):
    def row(p, n):
        if len(p) == 0 or len(n) == 0:
            return (p.sum() + n.sum()) * 0
        return (margin + torch.logsumexp(-p, 0) + torch.logsumexp(n, 0)).clamp_min(0)

    return row


LOSSES = {"lifted structure": (LiftedStructureLoss(margin=0.2), lifted_structure(0.2))}
