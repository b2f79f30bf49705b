"""The formula of margin."""

from lightning_memdml import MarginLoss


def margin(m, beta):
    def distance(s):
        return (2 - 2 * s).clamp_min(1e-6).sqrt()

    return lambda p, n: (distance(p) - beta + m).clamp_min(0).sum() + (beta + m - distance(n)).clamp_min(0).sum()


LOSSES = {"margin": (MarginLoss(), margin(0.2, 1.2))}
