"""The formula of direct weight."""

import torch

from lightning_memdml import Constant, DirectWeightLoss, Exponential, Linear, Power, Threshold


def direct(f, g, normalize=False, hardest_positives=None, hardest_negatives=None):
    def row(p, n):
        p, n = p[p.argsort()[:hardest_positives]], n[(-n).argsort()[:hardest_negatives]]
        wp, wn = f(p.detach()), g(n.detach())
        if normalize:
            wp = wp / wp.sum() if wp.sum() > 0 else wp
            wn = wn / wn.sum() if wn.sum() > 0 else wn
        return (wp * (1 - p)).sum() + (wn * n).sum()

    return row


def falling(s):
    return 1 - s


def rising(s):
    return torch.exp(5 * (s - 1))


LOSSES = {
    "direct": (DirectWeightLoss(Linear(-1, 1), Exponential(5)), direct(falling, rising)),
    "direct default": (DirectWeightLoss(), direct(torch.ones_like, lambda s: (s > 0.5).to(s.dtype))),
    "direct normalised": (
        DirectWeightLoss(Linear(-1, 1), Power(0.2, 2), normalize="sum"),
        direct(falling, lambda s: ((s - 0.2).clamp_min(0) / 0.8) ** 2, normalize=True),
    ),
    "direct hardest": (
        DirectWeightLoss(Linear(-1, 1), Exponential(5), "sum", hardest_positives=2, hardest_negatives=3),
        direct(falling, rising, True, 2, 3),
    ),
    "direct hardest above a threshold": (
        DirectWeightLoss(negative=Threshold(0.4), hardest_negatives=50),
        direct(torch.ones_like, lambda s: (s > 0.4).to(s.dtype), hardest_negatives=50),
    ),
    "direct with negative weights": (
        DirectWeightLoss(Constant(), lambda s: 0.3 - s),
        direct(torch.ones_like, lambda s: 0.3 - s),
    ),
}
