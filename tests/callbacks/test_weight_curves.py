"""WeightCurveLogger through the real Trainer: what it measures, when, and where it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset

from lightning_memdml import (
    ContrastiveLoss,
    GlyphDataModule,
    MemoryCallback,
    MetricLearner,
    MultiSimilarityLoss,
    SmallConvNet,
)
from lightning_memdml.callbacks import WeightCurveLogger

BATCH = 8


def learner(memory_loss: nn.Module | None = None) -> MetricLearner:
    torch.manual_seed(0)
    return MetricLearner(SmallConvNet(width=4), ContrastiveLoss(), memory_loss=memory_loss, embedding_dim=8)


def glyphs(cache: str) -> GlyphDataModule:
    return GlyphDataModule(num_classes=12, batch_size=BATCH, images_per_class=2, val_fraction=0, cache_dir=cache)


def fit(module: LightningModule, data: Any, *callbacks: Callback, **flags: Any) -> Trainer:
    trainer = Trainer(
        **{
            "accelerator": "cpu", "max_steps": 6, "logger": False, "callbacks": list(callbacks),
            "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, **flags,
        }
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Watch(Callback):
    """The memory each step found, the embeddings it returned, and the numbers it logged."""

    def __init__(self) -> None:
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []
        self.batches: list[dict[str, Tensor]] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.found.append(tuple(column.clone() for column in pl_module.memory.read()))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append({name: outputs[name].detach() for name in ("embeddings", "labels", "indices")})
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("weights/")}
        self.logged.append(logged)


@pytest.mark.parametrize("memory_first", [True, False])
def test_the_weights_are_those_of_the_step_in_either_order_of_callbacks(
    memory_first: bool, glyph_cache: str, tmp_path: Path
) -> None:
    watch, curves, memory = Watch(), WeightCurveLogger(2, dirpath=str(tmp_path)), MemoryCallback(size=24)
    both = [memory, curves] if memory_first else [curves, memory]
    fit(learner(MultiSimilarityLoss()), glyphs(glyph_cache), *both, watch)
    steps = {f"{step:07d}" for step in (2, 4, 6)}
    assert names(tmp_path) == {
        f"{term}_{step}{end}"
        for term in ("batch", "memory") for step in steps for end in (".png", ".csv", "_histogram.csv")
    }  # fmt: skip
    for step in (2, 4, 6):
        batch, (rows, labels, indices) = watch.batches[step - 1], watch.found[step - 1]
        weights = MultiSimilarityLoss().pair_weights(
            batch["embeddings"], batch["labels"], rows, labels, indices=batch["indices"], ref_indices=indices
        )
        histogram = pd.read_csv(tmp_path / f"memory_{step:07d}_histogram.csv")
        pairs = BATCH * len(rows) - int((batch["indices"][:, None] == indices).sum())
        assert histogram.pairs.sum() == pairs
        for side, name in enumerate(("positive", "negative")):
            mass = histogram.weight[histogram.side == name].sum()
            assert mass == pytest.approx(float(weights[side].sum()), rel=1e-4)
            # log_dict of a batch-end hook is there for the callbacks that come after.
            logged = watch.logged[step - 1]
            assert logged[f"weights/memory_{name}_mass"] == pytest.approx(mass / BATCH, rel=1e-4)
            assert logged[f"weights/memory_{name}s"] == int((weights[side] != 0).sum()) / BATCH
        in_batch = ContrastiveLoss().pair_weights(batch["embeddings"], batch["labels"], indices=batch["indices"])
        assert logged["weights/batch_positives"] == float(in_batch[0].sum()) / BATCH
        assert logged["weights/batch_negative_mass"] == float(in_batch[1].sum()) / BATCH


def test_training_is_the_same_with_and_without(glyph_cache: str, tmp_path: Path) -> None:
    trained = []
    for extra in ([], [WeightCurveLogger(1, dirpath=str(tmp_path))]):
        module = learner()
        fit(module, glyphs(glyph_cache), *extra, MemoryCallback(size=24))
        trained.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    assert torch.equal(*trained)


def test_files_are_in_the_run_and_numbers_in_its_log(glyph_cache: str, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="run", version=3)
    fit(learner(), glyphs(glyph_cache), WeightCurveLogger(3), logger=logger, log_every_n_steps=3)
    folder = tmp_path / "run" / "version_3"
    assert names(folder / "weights") == {
        f"batch_{step}{end}" for step in ("0000003", "0000006") for end in (".png", ".csv", "_histogram.csv")
    }
    log = pd.read_csv(folder / "metrics.csv")
    columns = ["positives", "positive_mass", "negatives", "negative_mass"]
    assert len(log[[f"weights/batch_{name}" for name in columns]].dropna()) == 2


@pytest.mark.usefixtures("offline_wandb")
def test_wandb_holds_the_pictures(glyph_cache: str, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(project="curves", save_dir=tmp_path)
    fit(learner(), glyphs(glyph_cache), WeightCurveLogger(3), MemoryCallback(size=24), logger=logger)
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert {"weights/batch", "weights/memory"} <= set(summary)
    written = {path.read_bytes() for path in tmp_path.glob("curves/*/weights/*.png")}
    shown = {path.read_bytes() for path in tmp_path.glob("wandb/*/files/media/images/weights/*.png")}
    assert len(written) == 4
    assert shown == written


# ------------------------------------------------------------------------------------------------ other modules
class Foreign(LightningModule):
    """Somebody's module; its loss is no module, its embeddings are not of unit length."""

    def __init__(self, broken_step: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(6, 4)
        self.broken_step = broken_step
        self.step_and_rows: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        x, y = batch
        z = self.net(x)
        if batch_idx == self.broken_step:
            z = z * torch.tensor([[torch.nan]] + [[1.0]] * (len(x) - 1))
        return {"loss": z.nan_to_num().square().sum(), "embeddings": z, "labels": y}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def vectors(labels: Tensor | None = None) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(32) % 3 if labels is None else labels
    return DataLoader(TensorDataset(torch.randn(32, 6, generator=generator), labels), batch_size=4)


def test_a_foreign_module_is_read_with_the_loss_of_the_callback(tmp_path: Path) -> None:
    module = Foreign()
    trainer = fit(module, vectors(), WeightCurveLogger(1, str(tmp_path), ContrastiveLoss(margin=0.0)), max_steps=1)
    x, y = next(iter(vectors()))
    with torch.no_grad():
        module.net.load_state_dict(Foreign().net.state_dict())  # as it was before the step
        z = normalize(module.net(x))
    similarity, same = z @ z.T, y[:, None] == y
    expected = int(((similarity > 0) & ~same).sum()) / 4
    assert float(trainer.callback_metrics["weights/batch_negatives"]) == expected


def test_accumulated_batches_are_read_once_per_optimiser_step(tmp_path: Path) -> None:
    curves = WeightCurveLogger(2, str(tmp_path), ContrastiveLoss())
    fit(Foreign(), vectors(), curves, accumulate_grad_batches=2, max_steps=4)
    assert {name[:13] for name in names(tmp_path)} == {"batch_0000002", "batch_0000004"}


def test_rows_without_a_direction_are_left_out(tmp_path: Path) -> None:
    curves = WeightCurveLogger(1, str(tmp_path), ContrastiveLoss())
    fit(Foreign(broken_step=0), vectors(torch.zeros(32, dtype=torch.long)), curves, max_steps=1)
    histogram = pd.read_csv(tmp_path / "batch_0000001_histogram.csv")
    assert histogram.pairs.sum() == 3 * 2, "of four rows of one class, three are left"


def test_a_memory_that_the_training_does_not_read_is_still_warned_about(tmp_path: Path) -> None:
    callbacks = [WeightCurveLogger(1, str(tmp_path), ContrastiveLoss()), MemoryCallback(size=8)]
    with pytest.warns(UserWarning, match="does not read them"):
        fit(Foreign(), vectors(), *callbacks, max_steps=3)


def test_only_the_first_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    trainer = fit(Foreign(), vectors(), WeightCurveLogger(1, str(tmp_path), ContrastiveLoss()), max_steps=1)
    assert not names(tmp_path)
    assert "weights/batch_positives" in trainer.callback_metrics, "every rank knows its numbers"


def test_errors_name_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"every_n_steps` of at least 1 .* but got 0"):
        WeightCurveLogger(0)
    with pytest.raises(ValueError, match=r"as `Foreign.loss` but got NoneType. Pass `WeightCurveLogger\(loss="):
        fit(Foreign(), vectors(), WeightCurveLogger(1, str(tmp_path)))

    class Silent(Foreign):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx)["loss"]

    with pytest.raises(ValueError, match=r"which WeightCurveLogger needs, but got no `embeddings` and no `labels`"):
        fit(Silent(), vectors(), WeightCurveLogger(1, str(tmp_path), ContrastiveLoss()))
