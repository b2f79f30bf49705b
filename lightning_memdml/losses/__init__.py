"""Pair losses, weight functions, and their evaluation against a memory of any size. Pure torch."""

from lightning_memdml.losses.binomial_deviance import BinomialDevianceLoss
from lightning_memdml.losses.circle import CircleLoss
from lightning_memdml.losses.contrastive import ContrastiveLoss
from lightning_memdml.losses.direct_weight import DirectWeightLoss
from lightning_memdml.losses.hybrid import HybridLoss
from lightning_memdml.losses.lifted_structure import LiftedStructureLoss
from lightning_memdml.losses.margin import MarginLoss
from lightning_memdml.losses.multi_similarity import MultiSimilarityLoss
from lightning_memdml.losses.pair_loss import PairLoss
from lightning_memdml.losses.softmax import InfoNCELoss, NCALoss, SupConLoss
from lightning_memdml.losses.triplet import TripletLoss
from lightning_memdml.losses.weights import (
    Band,
    Constant,
    Exponential,
    InverseDistance,
    Linear,
    Piecewise,
    Power,
    Sigmoid,
    Threshold,
    WeightFunction,
)

__all__ = [
    "Band",
    "BinomialDevianceLoss",
    "CircleLoss",
    "Constant",
    "ContrastiveLoss",
    "DirectWeightLoss",
    "Exponential",
    "HybridLoss",
    "InfoNCELoss",
    "InverseDistance",
    "LiftedStructureLoss",
    "Linear",
    "MarginLoss",
    "MultiSimilarityLoss",
    "NCALoss",
    "PairLoss",
    "Piecewise",
    "Power",
    "Sigmoid",
    "SupConLoss",
    "Threshold",
    "TripletLoss",
    "WeightFunction",
]
