"""A memory in shares is the whole memory: the same losses, the same checkpoints, with any number of ranks.

This file is also the program of the ranks.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.children import run_ranks

import lightning_memdml as ml
from lightning_memdml.memory.gather import RowGather

SIZE, DIM = 48, 8
LOSSES = [
    ml.ContrastiveLoss(0.3),
    ml.MultiSimilarityLoss(),
    ml.TripletLoss(),
    ml.DirectWeightLoss(negative=ml.Exponential(5), normalize="sum", hardest_negatives=5),
]


def batch(number, rows=10):
    generator = torch.Generator().manual_seed(number)
    z = torch.randn(rows, DIM, generator=generator)
    z[number % rows] *= float("nan") if number % 3 == 0 else 1.0
    return z, torch.arange(rows) % 5 + number % 4 * 5, torch.arange(rows) + 10 * number


def fill(memory, numbers):
    for number in numbers:
        memory.enqueue(*batch(number), step=number)


def anchors(rank):
    """Another number of rows on every rank, and none on the last of three."""
    rows = (6, 3, 0)[rank]
    z = F.normalize(torch.randn(rows, DIM, generator=torch.Generator().manual_seed(99 + rank)), dim=1)
    return z.requires_grad_(), torch.arange(rows) % 5, torch.arange(rows)


def check_losses(sharded, whole, rank):
    z, y, indices = anchors(rank)
    for loss in LOSSES:
        results = []
        for memory, ranks in ((sharded, {"ranks": sharded}), (whole, {})):
            references, labels, ref_indices = memory.read()
            value = loss(z, y, references, labels, indices=indices, ref_indices=ref_indices, **ranks)
            results.append((value.detach(), *torch.autograd.grad(value, z)))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def check_rows(state, whole):
    wanted = whole.state_dict()
    for name in ("labels", "indices", "steps"):
        assert torch.equal(state[name], wanted[name]), name
    torch.testing.assert_close(state["embeddings"], wanted["embeddings"])
    assert (state["batches"], state["dropped"]) == (wanted["batches"], wanted["dropped"])


def program(folder, start):
    """Fill, compare, save; with `start` above 0 from what another number of ranks saved."""
    rank = dist.get_rank()
    sharded, whole = ml.ShardedMemory(SIZE), ml.EmbeddingMemory(SIZE)
    if start:
        sharded.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    fill(whole, range(start))
    for number in range(start, start + 8):  # from an empty memory to one that has gone round
        check_losses(sharded, whole, rank)
        fill(sharded, [number])
        fill(whole, [number])
        assert len(sharded) == len(whole)
        assert len(sharded.share) <= -(-SIZE // dist.get_world_size())
    check_losses(sharded, whole, rank)
    state = sharded.state_dict()
    if rank == 0:
        check_rows(state, whole)
        torch.save(state, folder / "state.pt")
    else:
        assert state == {}


def test_shares_equal_the_whole_on_two_ranks_and_go_on_with_three_and_with_one(tmp_path):
    run_ranks(2, program, tmp_path, 0)
    run_ranks(3, program, tmp_path, 8)
    one, whole = ml.ShardedMemory(SIZE), ml.EmbeddingMemory(SIZE)
    one.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    fill(whole, range(16))
    check_rows(one.state_dict(), whole)
    check_losses(one, whole, rank=0)


def test_a_sharded_and_a_whole_memory_read_each_others_checkpoints():
    sharded, whole = ml.ShardedMemory(SIZE), ml.EmbeddingMemory(SIZE)
    fill(sharded, range(7))
    fill(whole, range(7))
    other_whole, other_sharded = ml.EmbeddingMemory(SIZE), ml.ShardedMemory(SIZE)
    other_whole.load_state_dict(sharded.state_dict())
    other_sharded.load_state_dict(whole.state_dict())
    check_rows(other_whole.state_dict(), whole)
    check_rows(other_sharded.state_dict(), whole)


def test_a_smaller_memory_keeps_the_newest_rows_of_a_checkpoint():
    whole, small = ml.EmbeddingMemory(SIZE), ml.ShardedMemory(12)
    fill(whole, range(7))
    small.load_state_dict(whole.state_dict())
    assert torch.equal(small.read()[1], whole.read()[1][-12:])
    assert len(small) == 12


def test_a_reset_memory_is_empty_and_a_damaged_state_refused():
    memory = ml.ShardedMemory(SIZE)
    fill(memory, range(3))
    memory.reset()
    assert (len(memory), memory.batches, memory.dropped, len(memory.read()[1])) == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="labels"):
        memory.load_state_dict({"embeddings": torch.zeros(1, 2)})


def test_counts_of_ranks_are_known_without_ranks():
    gather = RowGather()
    gather(torch.ones(3, 2), torch.arange(3), torch.arange(3))
    assert gather.counts == [3]
