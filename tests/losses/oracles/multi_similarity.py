"""The formula of multi similarity."""

import torch

from lightning_memdml import MultiSimilarityLoss


def multi_similarity(alpha, beta, base, epsilon):
    def row(p, n):
        if epsilon is not None:
            if len(p) == 0 or len(n) == 0:
                return (p.sum() + n.sum()) * 0
            kept_n = n[n.detach() + epsilon > p.detach().min()]
            kept_p = p[p.detach() - epsilon < n.detach().max()]
            p, n = kept_p, kept_n
        positives = torch.logsumexp(torch.cat([p.new_zeros(1), -alpha * (p - base)]), 0) / alpha
        negatives = torch.logsumexp(torch.cat([n.new_zeros(1), beta * (n - base)]), 0) / beta
        return positives + negatives

    return row


LOSSES = {
    "multi-similarity": (MultiSimilarityLoss(), multi_similarity(2, 50, 0.5, 0.1)),
    "multi-similarity unmined": (MultiSimilarityLoss(epsilon=None), multi_similarity(2, 50, 0.5, None)),
    "multi-similarity beta 200": (MultiSimilarityLoss(beta=200), multi_similarity(2, 200, 0.5, 0.1)),
}
