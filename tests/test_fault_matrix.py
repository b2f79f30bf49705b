"""What a run with a memory and a momentum encoder promises when it is stopped, cut, shortened or resumed otherwise.

One process. Two ranks: `test_fault_matrix_ddp.py`; SIGKILL at a random step: `test_resume.py`; what needs no momentum
encoder, and compilation, precision, manual optimisation and weight averaging with one: `tests/callbacks`.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_memdml.callbacks.memory import MemoryCallback
from lightning_memdml.cli import main
from lightning_memdml.data.glyphs import GlyphDataModule
from lightning_memdml.losses.contrastive import ContrastiveLoss
from lightning_memdml.memory.instance_memory import InstanceMemory

BATCHES, EPOCHS = 6, 2
MEMORIES = {
    "fifo": lambda **options: MemoryCallback(size=30, encoder_momentum=0.9, **options),
    "instances": lambda **options: MemoryCallback(memory=InstanceMemory(), encoder_momentum=0.9, **options),
    "filled first": lambda **options: MemoryCallback(size=0.3, start_step=2, prefill=True, **options),
}


class Learner(LightningModule):
    """A small network with batch statistics, and its losses written down."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9 * 9, 8)
        )
        self.loss = ContrastiveLoss(margin=0.3)
        self.losses: dict[int, float] = {}

    def forward(self, images: Tensor) -> Tensor:
        return normalize(self.net(images))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        images, labels, indices = batch
        z = self(images)
        references = self.memory.read()
        loss = self.loss(z, labels) + self.loss(z, labels, *references[:2], indices=indices, ref_indices=references[2])
        self.losses[self.global_step] = loss.item()
        return {"loss": loss, "embeddings": z, "labels": labels, "indices": indices}

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        z = self(batch[0])
        return {"loss": self.loss(z, batch[1]), "embeddings": z, "labels": batch[1]}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class Signal(Callback):
    """Sends a signal to this process in the middle of a step, after its last backward pass."""

    def __init__(self, step: int, which: signal.Signals) -> None:
        self.step, self.which = step, which

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            signal.raise_signal(self.which)  # `os.kill` would end the process on Windows


@pytest.fixture
def glyphs(glyph_cache: str) -> GlyphDataModule:
    return GlyphDataModule(
        num_classes=20, image_size=20, cache_dir=glyph_cache, num_workers=0, batch_size=8, images_per_class=2,
        batches_per_epoch=BATCHES, val_fraction=0.3, eval_batch_size=16,
    )  # fmt: skip


def fit(glyphs: GlyphDataModule, memory: MemoryCallback, *others: Callback, ckpt: Any = None, **flags: Any) -> Learner:
    learner = Learner()
    trainer = Trainer(
        **{
            "accelerator": "cpu", "max_epochs": EPOCHS, "logger": False, "enable_progress_bar": False,
            "enable_model_summary": False, "callbacks": [memory, *others], "num_sanity_val_steps": 1, **flags,
            "enable_checkpointing": any(isinstance(other, Checkpoint) for other in others),
        }
    )  # fmt: skip
    trainer.fit(learner, glyphs, ckpt_path=ckpt)
    return learner


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.skipif(os.name == "nt", reason="Lightning handles SIGTERM on other systems")
@pytest.mark.parametrize("kind", list(MEMORIES))
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings("ignore:`?.fit.ckpt_path")
def test_sigterm_finishes_the_step_and_the_run_resumes_exactly(
    kind: str, accumulate: int, glyphs: GlyphDataModule, tmp_path: Path
) -> None:
    """As a cluster stops a job: the batch in hand is finished, `OnExceptionCheckpoint` saves, the module has no memory
    left, and the resumed run equals the uninterrupted one bit for bit: losses, weights, rows, momentum encoder. Nothing
    is computed twice."""
    make, flags = MEMORIES[kind], {"accumulate_grad_batches": accumulate}
    through, stopped, resumed = make(), make(), make()
    whole = fit(glyphs, through, **flags)
    at = 4 // accumulate
    with pytest.raises(SIGTERMException):
        fit(glyphs, stopped, Signal(at, signal.SIGTERM), OnExceptionCheckpoint(tmp_path, "stopped"), **flags)
    saved = torch.load(tmp_path / "stopped.ckpt", weights_only=True)
    assert saved["global_step"] == at + 1
    rest = fit(glyphs, resumed, ckpt=tmp_path / "stopped.ckpt", **flags)
    assert list(rest.losses) == list(range(at + 1, BATCHES * EPOCHS // accumulate))
    assert rest.losses.items() <= whole.losses.items()
    assert same(dict(whole.state_dict()), dict(rest.state_dict()))
    assert same(through.state_dict(), resumed.state_dict())


def test_ctrl_c_leaves_a_module_without_memory(glyphs: GlyphDataModule) -> None:
    """And the callback keeps what it had, for a look at it."""
    callback, seen = MEMORIES["fifo"](), []

    class Look(Callback):
        def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
            seen.append((type(exception), hasattr(pl_module, "memory")))

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(SystemExit):
            fit(glyphs, callback, Look(), Signal(3, signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert seen == [(KeyboardInterrupt, False)]
    assert len(callback.memory) == 24


def test_a_truncated_checkpoint_is_named_and_the_one_before_it_still_resumes(
    glyphs: GlyphDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that dies while it writes leaves half a file. It is never taken for a run without a memory: the
    command line says what is wrong with which file, Python raises before the first step."""
    saver = ModelCheckpoint(tmp_path, "{step:02d}", every_n_train_steps=3, save_top_k=-1)
    whole = fit(glyphs, MEMORIES["fifo"](), saver)
    good, cut = tmp_path / "step=06.ckpt", tmp_path / "step=09.ckpt"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    callback = MEMORIES["fifo"]()
    with pytest.raises((RuntimeError, OSError)):
        fit(glyphs, callback, ckpt=cut)
    assert len(callback.memory) == 0
    monkeypatch.setattr("sys.argv", ["memdml"])
    with pytest.raises(SystemExit, match=r"error: Expected a checkpoint that can be read but got .*09.ckpt: it is dam"):
        main(["fit", "--ckpt_path", str(cut)])
    rest = fit(glyphs, MEMORIES["fifo"](), ckpt=good)
    assert rest.losses.items() <= whole.losses.items()
    assert list(rest.losses) == list(range(6, BATCHES * EPOCHS))


@pytest.mark.parametrize("which", ["memory", "keys"])
def test_a_checkpoint_with_a_damaged_memory_is_refused_before_the_first_step(
    which: str, glyphs: GlyphDataModule, tmp_path: Path
) -> None:
    """A file that can be read, but whose rows or weights do not fit each other."""
    fit(glyphs, MEMORIES["fifo"](), ModelCheckpoint(tmp_path, "last"), max_epochs=1)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    state = saved["callbacks"]["MemoryCallback"]
    if which == "memory":
        state["memory"]["labels"] = state["memory"]["labels"][:-1]
    else:
        state["keys"]["weights"]["net.4.weight"] = torch.zeros(8, 3)
    torch.save(saved, tmp_path / "damaged.ckpt")
    learner_losses: dict[int, float] = {}
    with pytest.raises(ValueError, match="checkpoint is damaged" if which == "memory" else r"`net.4.weight` of shape"):
        learner_losses = fit(glyphs, MEMORIES["fifo"](), ckpt=tmp_path / "damaged.ckpt").losses
    assert not learner_losses


@pytest.mark.parametrize("kind", list(MEMORIES))
@pytest.mark.parametrize(
    ("flags", "batches"),
    [
        ({"fast_dev_run": 3}, 3),
        ({"overfit_batches": 2}, 4),
        ({"limit_train_batches": 4}, 8),
        ({"limit_train_batches": 0.5, "limit_val_batches": 1}, 6),
        ({"limit_val_batches": 0}, 12),
        ({"val_check_interval": 2}, 12),
        ({"max_steps": 5}, 5),
        ({"check_val_every_n_epoch": None, "val_check_interval": 5}, 12),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_short_runs_and_validation_in_between_store_each_training_batch_and_nothing_else(
    kind: str, flags: dict[str, Any], batches: int, glyphs: GlyphDataModule
) -> None:
    """One `enqueue` and one update of the momentum encoder per training batch; the pass that fills first is another."""
    callback, passes = MEMORIES[kind](), 0
    learner = fit(glyphs, callback, **flags)
    if kind == "filled first":
        batches, passes = batches - 2, 1
        assert callback.memory.size == round(0.3 * len(glyphs.train_set))
    assert callback.memory.batches == batches + passes
    if callback.encoder_momentum is not None:
        assert callback.state_dict()["keys"]["updates"] == batches
    assert all(loss == loss for loss in learner.losses.values())


@pytest.mark.parametrize("kind", ["fifo", "instances"])
def test_validation_changes_nothing_in_the_training(kind: str, glyphs: GlyphDataModule) -> None:
    """With it in mid-epoch or never: the same losses, rows and momentum encoder, bit for bit."""
    ends = []
    for flags in ({"limit_val_batches": 0}, {"val_check_interval": 2}):
        callback = MEMORIES[kind]()
        ends.append((fit(glyphs, callback, **flags).losses, callback.state_dict()))
    assert ends[0][0] == ends[1][0]
    assert same(ends[0][1], ends[1][1])


@pytest.mark.parametrize("size", [12, 90])
def test_a_momentum_run_resumes_with_another_memory_size(size: int, glyphs: GlyphDataModule, tmp_path: Path) -> None:
    """The newest rows are there; the momentum encoder is the same."""
    first = MEMORIES["fifo"]()
    fit(glyphs, first, ModelCheckpoint(tmp_path, "last"), max_epochs=1)
    resumed, found = MemoryCallback(size=size, encoder_momentum=0.9), {}

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Learner) -> None:
            found.update(rows=pl_module.memory.read()[0].clone(), keys=resumed.state_dict()["keys"])

    fit(glyphs, resumed, Look(), ckpt=tmp_path / "last.ckpt")
    assert torch.equal(found["rows"], first.memory.read()[0][-size:])
    assert same(found["keys"], first.state_dict()["keys"])
