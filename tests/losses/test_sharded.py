"""Every loss has the same value and gradient when its references are spread over ranks. Ranks are threads here."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from support.children import PATIENCE
from support.gpu import Count
from support.losses import loss_cases

import lightning_memdml as ml
from lightning_memdml.losses import shared_references

LOSSES = {name: case[0] for name, case in loss_cases().items()} | {
    "hybrid with hardest": ml.HybridLoss(ml.MultiSimilarityLoss(), ml.DirectWeightLoss(hardest_negatives=7)),
}


class Threads:
    """Ranks that are threads of this process, and exchange messages through a list."""

    def __init__(self, world):
        self.barrier = threading.Barrier(world, timeout=PATIENCE)
        self.sent = [None] * world

    def rank(self, number):
        return Rank(self, number)

    def exchange(self, number, message):
        self.sent[number] = message
        self.barrier.wait()
        received = list(self.sent)
        self.barrier.wait()
        return received


class Rank:
    def __init__(self, threads, number):
        self.threads, self.rank, self.world_size = threads, number, len(threads.sent)

    def gather(self, embeddings, labels, indices):
        received = self.threads.exchange(self.rank, (embeddings, labels, indices))
        rows = (torch.cat(column) for column in zip(*received, strict=True))
        return (*rows, [len(labels) for _, labels, _ in received])

    def gather_contexts(self, contexts):
        return torch.cat(self.threads.exchange(self.rank, contexts))

    def all_to_all(self, states, counts):
        received = self.threads.exchange(self.rank, states.split(counts))
        return torch.stack([message[self.rank] for message in received])


def on_ranks(world, run):
    """Call `run(rank)` on every rank at once."""
    threads = Threads(world)
    with ThreadPoolExecutor(world) as pool:
        futures = [pool.submit(run, threads.rank(number), number) for number in range(world)]
        return [future.result(timeout=PATIENCE) for future in futures]


def unit(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 8, generator=generator, dtype=torch.float64) + 0.3, dim=1)


def value_and_gradient(loss, x, *args, **kwargs):
    x = x.clone().requires_grad_()
    value = loss(x, *args, **kwargs)
    value.backward()
    return value.detach(), x.grad


@pytest.mark.parametrize("max_pairs", [1 << 21, 400, 1])
@pytest.mark.parametrize("name", LOSSES)
def test_shares_give_the_loss_of_the_whole(name, max_pairs, monkeypatch):
    """Three ranks with 5, 4 and no anchors, and shares of 300, no and 90 references."""
    monkeypatch.setattr(shared_references, "MAX_PAIRS_PER_CHUNK", max_pairs)
    loss = LOSSES[name]
    x, y = unit(9, 0), torch.arange(9) // 3
    r, ry = torch.cat([x[:6], unit(384, 1)]), torch.cat([y[:6], torch.arange(384) % 50])
    indices, ref_indices = torch.arange(9), torch.cat([torch.arange(6), torch.full((384,), -1)])
    anchors, shares = [slice(0, 5), slice(5, 9), slice(9, 9)], [slice(0, 300), slice(300, 300), slice(300, 390)]

    def run(rank, number):
        a, s = anchors[number], shares[number]
        return value_and_gradient(
            loss, x[a], y[a], r[s], ry[s], indices=indices[a], ref_indices=ref_indices[s], ranks=rank
        )

    for part, actual in zip(anchors, on_ranks(3, run), strict=True):
        if part.stop == part.start:
            assert actual[0] == 0
            continue
        wanted = value_and_gradient(loss, x[part], y[part], r, ry, indices=indices[part], ref_indices=ref_indices)
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_one_rank_and_a_share_that_has_no_row_yet(name):
    loss, x, y = LOSSES[name], unit(9, 0), torch.arange(9) // 3
    r, ry = unit(40, 1), torch.arange(40) % 10
    (actual,) = on_ranks(1, lambda rank, _: value_and_gradient(loss, x, y, r, ry, ranks=rank))
    torch.testing.assert_close(actual, value_and_gradient(loss, x, y, r, ry), rtol=1e-10, atol=1e-10)
    unallocated = (torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64))
    for value, gradient in on_ranks(2, lambda rank, _: value_and_gradient(loss, x, y, *unallocated, ranks=rank)):
        assert value.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", [ml.InfoNCELoss(), ml.MultiSimilarityLoss(), ml.TripletLoss(soft=True)])
def test_the_arithmetic_of_a_rank_does_not_grow_with_the_ranks(loss):
    """Each rank has 16 anchors; 8 references have the class of an anchor, of 8,192 on all ranks together."""
    ry = torch.arange(8192) // 8
    r, calls = unit(8192, 1), {}

    def run(rank, number):
        share = slice(number, None, rank.world_size)
        y = torch.randint(0, 1024, (16,), generator=torch.Generator().manual_seed(number))
        with Count() as count:
            loss(unit(16, 2 + number), y, r[share], ry[share], ranks=rank)
        calls.setdefault(rank.world_size, []).append(count.multiplications)

    for world in (1, 8, 32):
        on_ranks(world, run)
    assert max(calls[8]) <= 1.1 * calls[1][0]
    assert max(calls[32]) <= 1.1 * calls[1][0]
