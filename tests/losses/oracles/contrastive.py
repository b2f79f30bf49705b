"""The formula of contrastive."""

from lightning_memdml import ContrastiveLoss


def contrastive(margin):
    return lambda p, n: (1 - p).sum() + n[n > margin].sum()


LOSSES = {"contrastive": (ContrastiveLoss(0.3), contrastive(0.3))}
