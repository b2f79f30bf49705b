"""Rows written by a momentum encoder, through the real Trainer in one process."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy
from support.momentum_training import Learner, fit, loader, same
from torch import Tensor
from torch.nn.functional import normalize

from lightning_memdml.callbacks.memory import MemoryCallback
from lightning_memdml.memory_term import against_memory


class Manual(Learner):
    """Two optimisers, stepped by hand every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        outputs = super().training_step(batch, batch_idx)
        self.manual_backward(outputs["loss"])
        if batch_idx % 2:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
        return outputs

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[4])]


class Follow(Callback):
    """Averages the weights itself, step by step, and writes down the rows that average would make.

    It stands before the memory callback, and keeps what it finds at the start of each batch.
    """

    def __init__(self, momentum: float, ramp: float = 10) -> None:
        self.momentum, self.ramp, self.updates, self.rows, self.encoders = momentum, ramp, 0, [], []

    def on_fit_start(self, trainer: Trainer, pl_module: Learner) -> None:
        self.average = copy.deepcopy(pl_module.net)
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Learner, outputs: Any, batch: Any, *_: Any) -> None:
        with torch.no_grad():
            self.rows.append(normalize(self.average(batch[0])))  # in training mode: by the batch
            if trainer.global_step > self.step:
                now = min(self.momentum, (1 + self.updates) / (self.ramp + self.updates))
                for mine, new in zip(self.average.parameters(), pl_module.net.parameters(), strict=True):
                    mine.copy_(now * mine + (1 - now) * new)
                self.updates, self.step = self.updates + 1, trainer.global_step


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("ramp", [1, 10])
def test_rows_are_those_of_the_average_updated_once_per_optimiser_step(accumulate: int, ramp: int) -> None:
    """Every micro-batch is stored; the average moves only with the weights (24 images: 6 batches an epoch)."""
    follow, callback = Follow(0.7, ramp), MemoryCallback(size=100, encoder_momentum=0.7, encoder_ramp=ramp)
    fit(Learner(), follow, callback, accumulate_grad_batches=accumulate)
    torch.testing.assert_close(callback.memory.read()[0], torch.cat(follow.rows), rtol=1e-4, atol=1e-5)
    assert follow.updates == {1: 12, 2: 6, 4: 4}[accumulate]
    assert callback.state_dict()["keys"]["updates"] == follow.updates


def test_manual_optimisation_updates_once_for_all_optimisers_of_a_step() -> None:
    follow, callback = Follow(0.7), MemoryCallback(size=100, encoder_momentum=0.7)
    fit(Manual(), follow, callback)
    torch.testing.assert_close(callback.memory.read()[0], torch.cat(follow.rows), rtol=1e-4, atol=1e-5)
    assert callback.state_dict()["keys"]["updates"] == 6


def test_momentum_zero_trains_bit_for_bit_as_no_momentum() -> None:
    """The copy is then the network that made the step's embeddings; it uses the batch's statistics as that does."""
    plain, zero = Learner(), Learner()
    fit(plain, MemoryCallback(size=10))
    fit(zero, MemoryCallback(size=10, encoder_momentum=0, encoder_ramp=1))
    assert zero.losses == plain.losses
    assert same(dict(plain.state_dict()), dict(zero.state_dict()))


@pytest.mark.parametrize("batch_norm", ["batch", "running"])
def test_the_extra_forward_disturbs_neither_dropout_nor_batch_norm(batch_norm: Any) -> None:
    """A network whose loss reads no memory trains with a momentum encoder bit for bit as without."""

    class IgnoresMemory(Learner):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            z = self(batch[0])
            self.memory.read()
            return {"loss": self.loss(z, batch[1]), "embeddings": z, "labels": batch[1], "indices": batch[2]}

    ends = []
    for options in ({}, {"encoder_momentum": 0.9, "encoder_batch_norm": batch_norm}):
        module = IgnoresMemory(dropout=0.5)
        torch.manual_seed(3)
        fit(module, MemoryCallback(size=10, **options))
        ends.append((dict(module.state_dict()), torch.get_rng_state()))
    assert same(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("batch_norm", ["batch", "running"])
@pytest.mark.parametrize(
    "flags",
    [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"val_check_interval": 2}],
    ids=["plain", "accumulated", "bf16-mixed", "validated in mid-epoch"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, flags: dict[str, Any], batch_norm: Any) -> None:
    """Losses, weights, rows and momentum encoder, bit for bit; from the end of an epoch."""
    flags = {"max_epochs": 3, **flags, "val": loader() if "val_check_interval" in flags else None}
    options: dict[str, Any] = {"size": 11, "encoder_momentum": 0.9, "encoder_batch_norm": batch_norm}
    whole, parts = Learner(), Learner()
    through, resumed = MemoryCallback(**options), MemoryCallback(**options)
    fit(whole, through, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), **flags)
    fit(parts, resumed, ckpt=tmp_path / "epoch=0.ckpt", **flags)
    assert parts.losses == whole.losses[6:]
    assert same(dict(whole.state_dict()), dict(parts.state_dict()))
    assert same(through.state_dict(), resumed.state_dict())


def test_the_control_fails_without_the_momentum_encoders_state(tmp_path: Path) -> None:
    """Otherwise the test above would prove nothing."""
    whole, parts, saver = Learner(), Learner(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(whole, MemoryCallback(size=11, encoder_momentum=0.9), saver)
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    del checkpoint["callbacks"]["MemoryCallback"]["keys"]
    torch.save(checkpoint, tmp_path / "cut.ckpt")
    fit(parts, MemoryCallback(size=11, encoder_momentum=0.9), ckpt=tmp_path / "cut.ckpt")
    assert parts.losses != whole.losses[6:]


def test_momentum_can_be_switched_on_and_off_between_checkpoints(tmp_path: Path) -> None:
    """On: the average starts from the restored network. Off: its state is left unused, and not saved again."""
    without, with_keys = MemoryCallback(size=8), MemoryCallback(size=8, encoder_momentum=0.9)
    fit(Learner(), without, ModelCheckpoint(tmp_path, "without"))
    fit(Learner(), with_keys, ModelCheckpoint(tmp_path, "with"))

    class Start(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Learner) -> None:
            self.weights = copy.deepcopy(on.momentum_encoder.module.net.state_dict())
            self.same = same(dict(self.weights), dict(pl_module.net.state_dict()))

    on, off, start = MemoryCallback(size=8, encoder_momentum=0.9), MemoryCallback(size=8), Start()
    fit(Learner(), on, start, ckpt=tmp_path / "without.ckpt", max_epochs=3)
    assert start.same
    assert on.state_dict()["keys"]["updates"] == 6
    fit(Learner(), off, ckpt=tmp_path / "with.ckpt", max_epochs=3)
    assert off.memory.batches == 18
    assert "keys" not in off.state_dict()


def test_the_same_trainer_goes_on_with_the_same_encoder() -> None:
    callback, whole = MemoryCallback(size=8, encoder_momentum=0.9), MemoryCallback(size=8, encoder_momentum=0.9)
    module, other = Learner(), Learner()
    trainer = fit(module, callback, max_epochs=1)
    assert callback.momentum_encoder is None, "after the fit the copy takes no accelerator memory"
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    fit(other, whole, max_epochs=2)
    assert callback.state_dict()["keys"]["updates"] == 12
    assert same(callback.state_dict()["keys"]["weights"].keys(), whole.state_dict()["keys"]["weights"].keys())


@pytest.mark.parametrize("memory_first", [True, False])
def test_weight_averaging_and_the_momentum_encoder_do_not_see_each_other(memory_first: bool) -> None:
    alone, beside = (MemoryCallback(size=10, encoder_momentum=0.8) for _ in range(2))
    fit(Learner(), alone, max_epochs=3)
    callbacks = [beside, EMAWeightAveraging()]
    fit(Learner(), *(callbacks if memory_first else callbacks[::-1]), val=loader(), max_epochs=3)
    assert same(alone.state_dict(), beside.state_dict())


def test_the_encoder_is_no_part_of_module_or_optimiser_and_its_state_is_safe(tmp_path: Path) -> None:
    found: dict[str, Any] = {}

    class Look(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Learner) -> None:
            found["names"] = set(pl_module.state_dict())
            found["trained"] = sum(len(group["params"]) for group in trainer.optimizers[0].param_groups)

    fit(Learner(), MemoryCallback(size=8, encoder_momentum=0.9), Look(), ModelCheckpoint(tmp_path, "last"))
    assert found == {"names": set(Learner().state_dict()), "trained": len(list(Learner().parameters()))}
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(Learner().state_dict())
    assert not hasattr(Learner.load_from_checkpoint(tmp_path / "last.ckpt"), "memory")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_the_average_is_float32_under_bf16(precision: Any) -> None:
    seen: dict[str, Any] = {}

    class Look(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Learner) -> None:
            seen["average"] = {value.dtype for value in callback.momentum_encoder.module.parameters()}
            seen["network"] = {value.dtype for value in pl_module.parameters()}

    callback = MemoryCallback(size=100, encoder_momentum=0.9)
    fit(Learner(), callback, Look(), precision=precision)
    assert seen["average"] == {torch.float32}
    assert seen["network"] == {torch.float32 if precision == "bf16-mixed" else torch.bfloat16}
    rows = callback.memory.read()[0]
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)), atol=2e-7, rtol=0)


class Bare(Learner):
    """Without a `forward`, as many modules are; normalised outside of the network."""

    forward = LightningModule.forward

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y, _ = batch
        z = normalize(self.net(x))
        return self.loss(z, y) + against_memory(self, self.loss, z, y)


def test_a_module_without_forward_needs_the_name_of_its_encoder() -> None:
    with pytest.raises(ValueError, match=r"Bare has no `forward`.*encoder=.*its parts are net, loss"):
        fit(Bare(), MemoryCallback(size=8, encoder_momentum=0.9))
    with pytest.raises(ValueError, match=r"`encoder` to be a part of Bare, such as net, loss, but got 'trunk'"):
        fit(Bare(), MemoryCallback(size=8, encoder_momentum=0.9, encoder="trunk"))
    follow, callback = Follow(0.7), MemoryCallback(size=100, encoder_momentum=0.7, encoder="net")
    fit(Bare(), follow, callback)
    torch.testing.assert_close(callback.memory.read()[0], torch.cat(follow.rows), rtol=1e-4, atol=1e-5)


def test_another_part_than_the_encoder_is_recognised_by_its_shape() -> None:
    with pytest.raises(ValueError, match=r"embeddings of shape \(4, 8\).*but got \(4, 16\).*`encoder=`"):
        fit(Learner(), MemoryCallback(size=8, encoder_momentum=0.9, encoder="net.0"))


def test_images_are_the_first_item_of_the_batch_or_what_the_step_returns_as_inputs() -> None:
    class Shifted(Learner):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            inputs = batch[0] + 1
            outputs = super().training_step([inputs, *batch[1:]], batch_idx)
            return {**outputs, "inputs": inputs}

    module, callback = Shifted(), MemoryCallback(size=8, encoder_momentum=0, encoder_ramp=1)
    fit(module, callback)
    plain, memory = Shifted(), MemoryCallback(size=8)
    fit(plain, memory)
    assert same(callback.state_dict()["memory"], memory.state_dict()["memory"])

    class Named(Learner):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return super().training_step([batch["x"], batch["y"], batch["i"]], batch_idx)

        def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> dict[str, Tensor]:
            return dict(zip(("x", "y", "i"), batch, strict=True))

    with pytest.raises(
        ValueError, match=r"which the momentum encoder needs, but got a dict\. Let Named.training_step return them"
    ):
        fit(Named(), MemoryCallback(size=8, encoder_momentum=0.9))


def test_a_factory_builds_what_cannot_be_copied() -> None:
    class Cached(Learner):
        def forward(self, x: Tensor) -> Tensor:
            self.last = super().forward(x)
            return self.last

        def on_fit_start(self) -> None:
            self(torch.randn(4, 6))

    class Early(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: Cached) -> None:
            pl_module(torch.randn(4, 6))

    with pytest.raises(TypeError, match="Cached cannot be copied"):
        fit(Cached(), Early(), MemoryCallback(size=8, encoder_momentum=0.9))
    callback = MemoryCallback(size=8, encoder_momentum=0.9, encoder_factory=Cached)
    fit(Cached(), Early(), callback)
    assert len(callback.memory) == 8


def test_a_compiled_module_writes_rows_with_the_average_and_not_with_the_network() -> None:
    """`torch.compile` of a LightningModule puts a `forward` into it that is bound to the original network."""
    torch._dynamo.reset()
    eager, compiled = (MemoryCallback(size=100, encoder_momentum=0.9) for _ in range(2))
    fit(Learner(), eager)
    fit(torch.compile(Learner(), backend="eager"), compiled)
    torch.testing.assert_close(compiled.memory.read()[0], eager.memory.read()[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [1.0, -0.1])
def test_impossible_momentum_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match=r"`encoder_momentum` in \[0, 1\)"):
        MemoryCallback(encoder_momentum=momentum)


def test_weights_kept_in_parts_are_refused() -> None:
    """FSDP gives each rank a part of the weights, of which there is no average of the whole."""
    callback = MemoryCallback(size=8, encoder_momentum=0.9)
    trainer = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(
        ValueError, match=r"keeps whole weights.* but got FSDPStrategy\. Train with `strategy='ddp'`, or leave"
    ):
        callback._momentum.start(trainer, LightningModule())
