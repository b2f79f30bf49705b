"""The formula of triplet."""

import torch

from lightning_memdml import TripletLoss


def triplet(margin):
    return lambda p, n: (n[None, :] - p[:, None] + margin).clamp_min(0).sum()


def soft_triplet():
    return lambda p, n: torch.log1p(torch.exp(n[None, :] - p[:, None])).sum()


LOSSES = {
    "triplet": (TripletLoss(0.15), triplet(0.15)),
    "soft triplet": (TripletLoss(soft=True), soft_triplet()),
}
