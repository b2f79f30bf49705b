"""The formula of direct weight."""

import torch

from lightning_memdml import Constant, DirectWeightLoss, Exponential, Linear, Power, Threshold


def direct(f, g, normalize=None, hardest_positives=None, hardest_negatives=None, dropped=0, scales=(1, 1)):
    def mass(weights, pairs):
        total = {None: 1, "sum": float(weights.sum()), "mean": pairs}[normalize]
        return weights / total if total > 0 else weights

    def row(p, n):
        number = len(n)
        p, n = p[p.argsort()[dropped:][:hardest_positives]], n[(-n).argsort()[:hardest_negatives]]
        wp = scales[0] * mass(f(p.detach()), len(p))
        wn = scales[1] * mass(g(n.detach()), number)
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
        direct(falling, lambda s: ((s - 0.2).clamp_min(0) / 0.8) ** 2, "sum"),
    ),
    "direct hardest": (
        DirectWeightLoss(Linear(-1, 1), Exponential(5), "sum", hardest_positives=2, hardest_negatives=3),
        direct(falling, rising, "sum", 2, 3),
    ),
    "direct hardest above a threshold": (
        DirectWeightLoss(negative=Threshold(0.4), hardest_negatives=50),
        direct(torch.ones_like, lambda s: (s > 0.4).to(s.dtype), hardest_negatives=50),
    ),
    "direct mean": (
        DirectWeightLoss(Linear(-1, 1), Exponential(5), "mean", positive_scale=0.5, negative_scale=3),
        direct(falling, rising, "mean", scales=(0.5, 3)),
    ),
    "direct without the hardest positives": (
        DirectWeightLoss(Linear(-1, 1), Exponential(5), "sum", hardest_positives=2, dropped_positives=1),
        direct(falling, rising, "sum", 2, dropped=1),
    ),
    "direct without positives": (
        DirectWeightLoss(positive_scale=0),
        direct(torch.ones_like, lambda s: (s > 0.5).to(s.dtype), scales=(0, 1)),
    ),
    "direct with negative weights": (
        DirectWeightLoss(Constant(), lambda s: 0.3 - s),
        direct(torch.ones_like, lambda s: 0.3 - s),
    ),
}
