"""Where the definitions agree, the losses are those of pytorch-metric-learning: in the batch and against references.

Its margin loss counts a pair once for each of its triplets, and it has no binomial deviance. These two are left out.
"""

import pytest
import torch
import torch.nn.functional as F

import lightning_memdml as ml

pml = pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
from pytorch_metric_learning import distances, losses, miners, reducers  # noqa: E402

COSINE = {"distance": distances.CosineSimilarity()}
SUMMED = {**COSINE, "reducer": reducers.SumReducer()}
ROWS, PER_CLASS, IN_MEMORY = 24, 4, 6

# Ours, theirs, and by what theirs is divided to be a mean over anchors of sums over pairs.
CASES = {
    # Theirs counts s - margin where ours counts s: the same gradient, another value.
    "contrastive": (ml.ContrastiveLoss(0.5), losses.ContrastiveLoss(1, 0.5, **SUMMED), ROWS),
    "multi-similarity": (ml.MultiSimilarityLoss(epsilon=None), losses.MultiSimilarityLoss(2, 50, 0.5), 1),
    "lifted structure": (
        ml.LiftedStructureLoss(margin=0.2),
        losses.GeneralizedLiftedStructureLoss(neg_margin=0.3, pos_margin=0.5, **COSINE),
        1,
    ),
    "triplet": (ml.TripletLoss(0.1), losses.TripletMarginLoss(0.1, **SUMMED), ROWS),
    "soft triplet": (ml.TripletLoss(soft=True), losses.TripletMarginLoss(0.0, smooth_loss=True, **SUMMED), ROWS),
    "circle": (ml.CircleLoss(0.4, 80), losses.CircleLoss(0.4, 80), 1),
    "InfoNCE": (ml.InfoNCELoss(0.1), losses.NTXentLoss(0.1, reducer=reducers.SumReducer()), ROWS),
    "SupCon": (ml.SupConLoss(0.1), losses.SupConLoss(0.1), 1),
    "NCA": (ml.NCALoss(0.1), losses.NCALoss(softmax_scale=10, **COSINE), 1),
}


@pytest.fixture(params=CASES, name="name")
def _name(request):
    return request.param


def batch(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(rows, 16, generator=generator, dtype=torch.float64) + 0.5, dim=1)
    return x, torch.arange(rows) // PER_CLASS if seed == 0 else torch.arange(rows) % (rows // IN_MEMORY)


def value_and_gradient(step, x):
    x = x.detach().clone().requires_grad_()
    value = step(x)
    value.backward()
    # Theirs normalises again, which takes the radial part of the gradient away.
    return value.detach(), x.grad - (x.grad * x).sum(dim=1, keepdim=True).detach() * x.detach()


def assert_equal(name, actual, wanted):
    torch.testing.assert_close(actual[1], wanted[1], rtol=1e-6, atol=1e-8)
    if name != "contrastive":
        torch.testing.assert_close(actual[0], wanted[0], rtol=1e-6, atol=1e-8)


def test_in_the_batch(name):
    ours, theirs, divisor = CASES[name]
    x, y = batch(ROWS, seed=0)
    assert_equal(
        name,
        value_and_gradient(lambda z: ours(z, y), x),
        value_and_gradient(lambda z: theirs(z, y) / divisor, x),
    )


def test_against_references(name):
    ours, theirs, divisor = CASES[name]
    (x, y), (r, ry) = batch(ROWS, seed=0), batch(300, seed=1)
    assert_equal(
        name,
        value_and_gradient(lambda z: ours(z, y, r, ry), x),
        value_and_gradient(lambda z: theirs(z, y, ref_emb=r, ref_labels=ry) / divisor, x),
    )


def test_mined_multi_similarity():
    """Their miner and their loss; every anchor keeps a pair, so that both are means over all anchors."""
    (x, y), (r, ry) = batch(ROWS, seed=0), batch(300, seed=1)
    miner, loss = miners.MultiSimilarityMiner(0.1), losses.MultiSimilarityLoss(2, 50, 0.5)
    actual = value_and_gradient(lambda z: ml.MultiSimilarityLoss()(z, y, r, ry), x)
    wanted = value_and_gradient(lambda z: loss(z, y, miner(z, y, r, ry), ref_emb=r, ref_labels=ry), x)
    assert_equal("mined", actual, wanted)
