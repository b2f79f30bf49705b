"""MemoryCallback through the real Trainer, in one process on the CPU."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from support.memory_training import Manual, Plain, fit, loader, pair_loss
from torch import Tensor
from torch.nn.functional import normalize

from lightning_memdml.callbacks.memory import MemoryCallback
from lightning_memdml.losses import ContrastiveLoss, HybridLoss, SupConLoss
from lightning_memdml.memory_term import against_memory


class Watch(Callback):
    """What each training step found in the memory, and after the fit nothing is forgotten."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[int], list[int]]] = []
        self.rows: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Plain, *_: Any) -> None:
        embeddings, _, indices = pl_module.memory.read()
        self.seen.append((indices.tolist(), pl_module.memory.steps.tolist()))
        self.rows.append(embeddings.clone())


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k] for k in a)


def test_each_step_reads_the_batches_before_it_and_not_its_own() -> None:
    watch = Watch()
    fit(Plain(), MemoryCallback(size=10), watch)
    for step, (indices, steps) in enumerate(watch.seen):
        expected = list(range(4 * step))[-10:]
        assert indices == expected
        assert steps == [index // 4 for index in expected], "the step whose weights made the row"


def test_stored_rows_are_the_embeddings_the_step_was_trained_on() -> None:
    module, made = Plain(), []
    module.net.register_forward_hook(lambda *args: made.append(args[-1].detach()))
    callback = MemoryCallback(size=100)
    fit(module, callback)
    assert torch.equal(callback.memory.read()[0], normalize(normalize(torch.cat(made))))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_warm_up_counts_the_optimiser_steps_of_the_weights_that_made_a_row(accumulate: int) -> None:
    """With 8 batches of 4 and 2 batches a step, the weights of step 3 first see batch 6."""
    watch = Watch()
    fit(Plain(), MemoryCallback(size=100, start_step=3), watch, accumulate_grad_batches=accumulate)
    first = 3 * accumulate
    for batch, (indices, steps) in enumerate(watch.seen):
        assert indices == list(range(4 * first, 4 * batch))
        assert steps == [index // 4 // accumulate for index in indices]


def test_manual_optimisation_with_two_optimisers_counts_the_steps_of_both() -> None:
    watch = Watch()
    fit(Manual(), MemoryCallback(size=100, start_step=4), watch)
    assert watch.seen[2][0] == []
    assert watch.seen[4][0] == list(range(8, 16))
    assert watch.seen[4][1] == [4] * 4 + [6] * 4


def test_only_training_batches_are_stored() -> None:
    """Not those of sanity check, validation in mid-epoch, test and prediction, which return the same."""
    watch = Watch()
    callback = MemoryCallback(size=100)
    trainer = fit(Plain(), callback, watch, val=loader(), num_sanity_val_steps=2, val_check_interval=2)
    assert watch.seen[0][0] == []
    assert [len(indices) for indices, _ in watch.seen] == list(range(0, 32, 4))
    before = callback.state_dict()["memory"]
    for loop in (trainer.validate, trainer.test, trainer.predict):
        loop(Plain(), loader(), **({} if loop == trainer.predict else {"verbose": False}))
    assert same_state(before, callback.state_dict()["memory"])


@pytest.mark.parametrize(
    ("flags", "batches"),
    [
        ({"fast_dev_run": 3}, 3),
        ({"overfit_batches": 2, "max_epochs": 2}, 4),
        ({"limit_train_batches": 5}, 5),
        ({"max_steps": 3}, 3),
    ],
    ids=str,
)
def test_the_trainers_short_runs_store_what_they_train(flags: dict[str, Any], batches: int) -> None:
    callback = MemoryCallback(size=100)
    fit(Plain(), callback, **flags)
    assert callback.memory.batches == batches


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_the_memory_stays_float32_and_unit_norm_under_bf16(precision: str) -> None:
    class Low(Plain):
        def embed(self, images: Tensor) -> Tensor:
            self.dtype_seen = (embeddings := normalize(self.net(images))).dtype
            return embeddings

    module, watch = Low(), Watch()
    callback = MemoryCallback(size=100)
    fit(module, callback, watch, precision=precision)
    stored = callback.memory.read()[0]
    assert module.dtype_seen is torch.bfloat16
    assert stored.dtype is watch.rows[-1].dtype is torch.float32
    torch.testing.assert_close(stored.norm(dim=1), torch.ones(len(stored)), atol=2e-7, rtol=0)


def test_the_memory_is_no_part_of_the_module() -> None:
    found: dict[str, Any] = {}

    class Look(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Plain) -> None:
            found["state"] = [name for name in pl_module.state_dict() if "memory" in name]
            found["buffers"] = [name for name, _ in pl_module.named_buffers()]
            found["copied"] = copy.deepcopy(pl_module).memory is pl_module.memory
            found["hparams"] = dict(pl_module.hparams)

    module = Plain()
    fit(module, MemoryCallback(size=8), Look())
    assert found == {"state": [], "buffers": [], "copied": True, "hparams": {}}
    assert not hasattr(module, "memory"), "detached after the fit"


def test_a_checkpoint_has_no_memory_among_the_weights_and_loads_without_the_callback(tmp_path: Path) -> None:
    fit(Plain(), MemoryCallback(size=8), ModelCheckpoint(tmp_path, "last"))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(Plain().state_dict())
    assert len(checkpoint["callbacks"]["MemoryCallback"]["memory"]["labels"]) == 8
    assert not hasattr(Plain.load_from_checkpoint(tmp_path / "last.ckpt"), "memory")
    with pytest.warns(UserWarning, match="MemoryCallback"):
        Trainer(logger=False, enable_checkpointing=False).validate(
            Plain(), loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False
        )


@pytest.mark.parametrize("size", [20, 7, 50])
def test_resuming_restores_rows_at_their_end_of_the_queue(tmp_path: Path, size: int) -> None:
    """With the same size exactly; with another, the newest rows."""
    first, watch = MemoryCallback(size=20), Watch()
    fit(Plain(), first, ModelCheckpoint(tmp_path, "last"))
    fit(Plain(), MemoryCallback(size=size), watch, ckpt=tmp_path / "last.ckpt", max_epochs=2)
    assert watch.seen[0][0] == list(range(12, 32))[-size:]
    assert torch.equal(watch.rows[0], first.memory.read()[0][-size:])


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    """From an epoch's end, accumulating; the data order is fixed."""
    whole, parts = Plain(), Plain()
    through, resumed = MemoryCallback(size=11, start_step=1), MemoryCallback(size=11, start_step=1)
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    fit(whole, through, saver, max_epochs=2, accumulate_grad_batches=2)
    fit(parts, resumed, ckpt=tmp_path / "step=4.ckpt", max_epochs=2, accumulate_grad_batches=2)
    assert parts.losses == whole.losses[8:]
    assert same_state(through.memory.state_dict(), resumed.memory.state_dict())
    assert same_state(whole.state_dict(), parts.state_dict())


def test_memory_can_be_switched_on_and_off_between_checkpoints(tmp_path: Path) -> None:
    class Optional(Plain):
        memory = None

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            x, y, _ = batch
            z = self.embed(x)
            loss = pair_loss(z, y)
            if self.memory is not None:
                loss = loss + pair_loss(z, y, *self.memory.read()[:2])
            return {"loss": loss, "embeddings": z, "labels": y}

    fit(Optional(), ModelCheckpoint(tmp_path, "without"))
    fit(Optional(), MemoryCallback(size=8), ModelCheckpoint(tmp_path, "with"))
    watch = Watch()
    fit(Optional(), MemoryCallback(size=8), watch, ckpt=tmp_path / "without.ckpt", max_epochs=2)
    assert [len(indices) for indices, _ in watch.seen] == [0, 4, 8, 8, 8, 8, 8, 8]
    with pytest.warns(UserWarning, match="MemoryCallback"):
        fit(Optional(), ckpt=tmp_path / "with.ckpt", max_epochs=2)


@pytest.mark.filterwarnings("ignore:MemoryCallback stores rows")
def test_resuming_with_another_dimension_is_refused(tmp_path: Path) -> None:
    class Wider(Plain):
        def embed(self, images: Tensor) -> Tensor:
            return normalize(torch.cat([super().embed(images)] * 2, dim=1))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            z = self.embed(batch[0])
            return {"loss": pair_loss(z, batch[1]), "embeddings": z, "labels": batch[1]}

    fit(Plain(), MemoryCallback(size=8), ModelCheckpoint(tmp_path, "last"))
    with pytest.raises(ValueError, match=r"holds embeddings of D=8, but the batch has D=16.*checkpoint"):
        fit(Wider(), MemoryCallback(size=8), ckpt=tmp_path / "last.ckpt", max_epochs=2)


def test_a_new_fit_forgets_and_the_same_trainer_goes_on() -> None:
    callback, watch = MemoryCallback(size=100), Watch()
    fit(Plain(), callback)
    trainer = fit(Plain(), callback, watch)
    assert watch.seen[0][0] == []
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Plain(), loader())
    assert [len(indices) for indices, _ in watch.seen][8:] == list(range(32, 64, 4))


def test_after_an_exception_the_module_is_as_before() -> None:
    class Breaks(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            if batch_idx == 2:
                raise ArithmeticError("broken")
            return super().training_step(batch, batch_idx)

    module = Breaks()
    with pytest.raises(ArithmeticError, match="broken"):
        fit(module, MemoryCallback(size=8))
    assert not hasattr(module, "memory")


@pytest.mark.parametrize("memory_first", [True, False])
@pytest.mark.parametrize("average", [EMAWeightAveraging, StochasticWeightAveraging])
def test_weight_averaging_leaves_the_memory_alone(average: type[Callback], memory_first: bool) -> None:
    """The network trains as without averaging until the end, so the memory must be that of a plain run."""
    alone, beside = MemoryCallback(size=10), MemoryCallback(size=10)
    fit(Plain(), alone, max_epochs=3)
    averaging = average() if average is EMAWeightAveraging else average(swa_lrs=0.05, swa_epoch_start=1)
    averaged = Plain()
    callbacks = [beside, averaging] if memory_first else [averaging, beside]
    fit(averaged, *callbacks, val=loader(), max_epochs=3)
    assert same_state(alone.memory.state_dict(), beside.memory.state_dict())


def test_nan_rows_never_enter_are_counted_and_warned_about_once() -> None:
    class Sick(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            outputs = super().training_step(batch, batch_idx)
            sick = outputs["embeddings"].detach().clone()
            sick[1:3, 0] = torch.nan
            return {**outputs, "embeddings": sick}

    callback = MemoryCallback(size=100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Sick(), callback)
    assert callback.memory.read()[2].tolist() == [i for i in range(32) if i % 4 in (0, 3)]
    assert callback.memory.dropped == 16
    said = [str(w.message) for w in caught if "did not enter the memory" in str(w.message)]
    assert len(said) == 1
    assert "2 of 4 embeddings" in said[0]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_skipped_batch_is_not_stored() -> None:
    class Skips(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    callback = MemoryCallback(size=100)
    fit(Skips(), callback)
    assert callback.memory.read()[2].tolist() == [i for i in range(32) if i // 4 % 2 == 0]


def test_size_and_age_are_reported_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(Plain(), MemoryCallback(size=16, start_step=1), accumulate_grad_batches=2)
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Memory:")]
    assert len(said) == 2
    assert "0 of 16 rows filled; rows are stored from optimiser step 1 on" in said[0]
    assert "16 rows x 8, 0.0 MB on cpu; at 4 rows per batch" in said[1]
    assert said[1].endswith("full memory is 2 steps old.")


def test_the_log_names_the_backend_of_the_losses(caplog: pytest.LogCaptureFixture) -> None:
    module = Plain()
    module.loss = HybridLoss(ContrastiveLoss(), SupConLoss(), backend="triton")
    module.memory_loss = ContrastiveLoss()
    with caplog.at_level("INFO"):
        fit(module, MemoryCallback(size=16))
    expected = "; backend of the losses: auto (blocks) and triton."
    assert any(record.getMessage().endswith(expected) for record in caplog.records)


def test_a_compiled_module_trains_as_an_eager_one_and_compiles_a_fixed_number_of_times() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    class Compiled(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.compiled = torch.compile(self.step, backend=counter)

        def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            z = self.embed(x)
            return z, pair_loss(z, y) + pair_loss(z, y, *self.memory.read()[:2])

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            z, loss = self.compiled(*batch[:2])
            self.losses.append(float(loss.detach()))
            return {"loss": loss, "embeddings": z, "labels": batch[1]}

    eager, compiled = Plain(), Compiled()
    fit(eager, MemoryCallback(size=10), max_epochs=2)
    fit(compiled, MemoryCallback(size=10), max_epochs=2)
    torch.testing.assert_close(compiled.losses, eager.losses, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


def test_the_short_way_trains_as_the_four_lines() -> None:
    class Short(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x, y, indices = batch
            z = self.embed(x)
            loss = pair_loss(z, y) + against_memory(self, with_indices, z, y, indices)
            self.losses.append(float(loss.detach()))
            return loss

    def with_indices(z: Tensor, y: Tensor, ref_z: Tensor, ref_y: Tensor, *, indices: Tensor, ref_indices: Tensor):
        assert not set(indices.tolist()) & set(ref_indices.tolist())
        return pair_loss(z, y, ref_z, ref_y)

    four, short = Plain(), Short()
    first, second = MemoryCallback(size=10), MemoryCallback(size=10)
    fit(four, first)
    fit(short, second, val=loader())
    assert short.losses == four.losses
    assert same_state(first.memory.state_dict(), second.memory.state_dict())
    assert set(vars(short)) == set(vars(four)), "nothing is left on the module"
    assert second.memory.given == {}
