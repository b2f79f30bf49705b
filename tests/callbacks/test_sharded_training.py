"""Training on a memory in shares is training on the whole memory: two ranks, real DDP over gloo, through the Trainer.

This file is also the program of the ranks.
"""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from support.children import run_ranks
from torch.utils.data import DataLoader

import lightning_memdml as ml

SIZE, STEPS = 40, 6  # steps of an epoch


class Learner(LightningModule):
    def __init__(self, told=True, loss=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(6, 8)
        self.loss = loss or ml.MultiSimilarityLoss()
        self.told = told
        self.losses = []

    def training_step(self, batch, batch_idx):
        z, y = F.normalize(self.net(batch[0]), dim=1), batch[1]
        if self.told:
            loss = self.loss(z, y) + ml.against_memory(self, self.loss, z, y)
        else:
            loss = self.loss(z, y) + self.loss(z, y, *self.memory.read()[:2])
        self.losses.append(loss.item())
        return {"loss": loss, "embeddings": z, "labels": y}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(rank, ranks):
    """Two of three rows for rank 0, so that ranks differ; all of them for one rank."""
    whole = [(torch.sin(torch.arange(54.0).view(9, 6) * (k + 1)), torch.arange(9) // 2 + k % 3) for k in range(STEPS)]
    part = slice(None) if ranks == 1 else (slice(0, 6), slice(6, 9))[rank]
    return DataLoader([(x[part], y[part]) for x, y in whole], batch_size=None)


def fit(memory, epochs, ranks=2, rank=0, learner=None, callbacks=(), **options):
    learner = learner or Learner()
    callback = ml.MemoryCallback(memory=memory)
    trainer = Trainer(
        accelerator="cpu", devices=1, num_nodes=ranks, strategy="ddp" if ranks > 1 else "auto", max_epochs=epochs,
        callbacks=[callback, *callbacks], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(learner, batches(rank, ranks), **options)
    return learner, callback, trainer


def program(folder):
    rank = dist.get_rank()
    whole, _, _ = fit(ml.EmbeddingMemory(SIZE), 2, rank=rank)
    report = ml.MemoryReport(every_n_steps=STEPS, sample=0, dirpath=str(folder / "report"))
    shared, callback, _ = fit(ml.ShardedMemory(SIZE), 2, rank=rank, callbacks=[report])
    assert [found["rows"] for found in report.reports] == [SIZE, SIZE]  # of all ranks
    torch.testing.assert_close(shared.losses, whole.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shared.net.weight, whole.net.weight, rtol=1e-5, atol=1e-6)
    assert len(callback.memory) == SIZE
    assert len(callback.memory.share) == SIZE // 2

    _, _, trainer = fit(ml.ShardedMemory(SIZE), 1, rank=rank)
    trainer.save_checkpoint(folder / "half.ckpt")
    dist.barrier()
    resumed, _, _ = fit(ml.ShardedMemory(SIZE), 2, rank=rank, ckpt_path=folder / "half.ckpt")
    assert resumed.losses == shared.losses[STEPS:]  # bit for bit

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(ml.ShardedMemory(SIZE), 1, rank=rank, learner=Learner(told=False))
    assert any("the loss saw this rank's share only" in str(warning.message) for warning in caught)


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(2, program, folder, nodes=True)
    return folder


def test_two_ranks_train_alike_resume_bit_for_bit_and_warn_if_the_loss_has_no_ranks(folder):
    """All of it is asserted in the ranks."""
    assert (folder / "half.ckpt").exists()
    assert (folder / "report/report.png").exists()


@pytest.mark.parametrize("memory", [ml.EmbeddingMemory, ml.ShardedMemory])
def test_one_rank_goes_on_with_the_checkpoint_of_two(folder, memory):
    learner, callback, _ = fit(memory(SIZE), 2, ranks=1, ckpt_path=folder / "half.ckpt")
    assert len(learner.losses) == STEPS
    assert len(callback.memory) == SIZE


def test_a_loss_that_cannot_reach_other_ranks_is_refused():
    learner = Learner(loss=lambda z, y, *references: (z * 0).sum())
    with pytest.raises(ValueError, match="Expected a PairLoss against a ShardedMemory"):
        fit(ml.ShardedMemory(SIZE), 1, ranks=1, learner=learner)
