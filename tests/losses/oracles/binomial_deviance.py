"""The formula of binomial deviance."""

import torch

from lightning_memdml import BinomialDevianceLoss


def binomial_deviance(alpha, beta, base):
    def mean(x):
        return x.mean() if len(x) else x.sum()

    def log1pexp(x):
        return torch.logaddexp(x, torch.zeros_like(x))

    return lambda p, n: mean(log1pexp(alpha * (base - p))) + mean(log1pexp(beta * (n - base)))


LOSSES = {"binomial deviance": (BinomialDevianceLoss(), binomial_deviance(2, 50, 0.5))}
