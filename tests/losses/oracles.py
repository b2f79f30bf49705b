"""Every loss written a second time, from its formula: one anchor at a time, plain loops, autograd for the weights."""

import math

import torch
from torch import Tensor


def value_of_rows(row_loss, similarity: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Mean over anchors of ``row_loss(positives, negatives)``, differentiable."""
    rows = [row_loss(s[p], s[n]) for s, p, n in zip(similarity, positive, negative, strict=True)]
    return sum(rows, similarity.sum() * 0) / len(rows)


def masks(labels, ref_labels, indices=None, ref_indices=None, in_batch=False):
    """Pairs as positive and negative masks, by two loops."""
    positive = torch.zeros(len(labels), len(ref_labels), dtype=torch.bool)
    negative = positive.clone()
    for i in range(len(labels)):
        for j in range(len(ref_labels)):
            if in_batch and i == j:
                continue
            if indices is not None and indices[i] >= 0 and indices[i] == ref_indices[j]:
                continue
            positive[i, j] = labels[i] == ref_labels[j]
            negative[i, j] = labels[i] != ref_labels[j]
    return positive, negative


def contrastive(margin):
    return lambda p, n: (1 - p).sum() + n[n > margin].sum()


def direct(f, g, normalize=False, hardest_positives=None, hardest_negatives=None):
    def row(p, n):
        p, n = p[p.argsort()[:hardest_positives]], n[(-n).argsort()[:hardest_negatives]]
        wp, wn = f(p.detach()), g(n.detach())
        if normalize:
            wp = wp / wp.sum() if wp.sum() > 0 else wp
            wn = wn / wn.sum() if wn.sum() > 0 else wn
        return (wp * (1 - p)).sum() + (wn * n).sum()

    return row


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


def binomial_deviance(alpha, beta, base):
    def mean(x):
        return x.mean() if len(x) else x.sum()

    def log1pexp(x):
        return torch.logaddexp(x, torch.zeros_like(x))

    return lambda p, n: mean(log1pexp(alpha * (base - p))) + mean(log1pexp(beta * (n - base)))


def lifted_structure(margin):
    def row(p, n):
        if len(p) == 0 or len(n) == 0:
            return (p.sum() + n.sum()) * 0
        return (margin + torch.logsumexp(-p, 0) + torch.logsumexp(n, 0)).clamp_min(0)

    return row


def triplet(margin):
    return lambda p, n: (n[None, :] - p[:, None] + margin).clamp_min(0).sum()


def soft_triplet():
    return lambda p, n: torch.log1p(torch.exp(n[None, :] - p[:, None])).sum()


def margin(m, beta):
    def distance(s):
        return (2 - 2 * s).clamp_min(1e-6).sqrt()

    return lambda p, n: (distance(p) - beta + m).clamp_min(0).sum() + (beta + m - distance(n)).clamp_min(0).sum()


def circle(m, gamma):
    def row(p, n):
        if len(p) == 0 or len(n) == 0:
            return (p.sum() + n.sum()) * 0
        a_p, a_n = (1 + m - p.detach()).clamp_min(0), (n.detach() + m).clamp_min(0)
        both = torch.logsumexp(gamma * a_n * (n - m), 0) + torch.logsumexp(-gamma * a_p * (p - 1 + m), 0)
        return torch.logaddexp(both, both.new_zeros(()))

    return row


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


def weights_of(row_loss, similarity, positive, negative):
    """Pair weights by autograd: ``w+ = -dl_i/ds``, ``w- = dl_i/ds``."""
    similarity = similarity.detach().clone().requires_grad_()
    (value_of_rows(row_loss, similarity, positive, negative) * len(similarity)).backward()
    gradient = similarity.grad
    assert not math.isnan(float(gradient.sum()))
    return -gradient * positive, gradient * negative
