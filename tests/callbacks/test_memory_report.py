"""MemoryReport through the real Trainer: every number against what it says, and where it writes."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset

from lightning_memdml import GlyphDataModule, MetricLearner, SmallConvNet
from lightning_memdml.callbacks.memory import MemoryCallback
from lightning_memdml.callbacks.memory_report import MemoryReport, plot_reports
from lightning_memdml.losses.contrastive import ContrastiveLoss
from lightning_memdml.losses.multi_similarity import MultiSimilarityLoss
from lightning_memdml.memory.instance_memory import InstanceMemory

IMAGES, BATCH, CLASSES = 40, 4, 5


class Images(Dataset):
    """Images without augmentation; `shift` numbers them otherwise than by their position."""

    def __init__(self, shift: int = 0) -> None:
        generator = torch.Generator().manual_seed(7)
        self.images, self.shift = torch.randn(IMAGES, 6, generator=generator), shift
        self.labels = torch.arange(IMAGES) % CLASSES

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, int]:
        return self.images[position], self.labels[position], position + self.shift


def loader(shift: int = 0) -> DataLoader:
    return DataLoader(Images(shift), batch_size=BATCH)


class Learner(LightningModule):
    def __init__(self, rate: float = 0.1, memory_weight: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 8))
        self.loss, self.memory_loss = ContrastiveLoss(margin=0.3), MultiSimilarityLoss()
        self.rate, self.memory_weight = rate, memory_weight
        self.seen: list[dict[str, Any]] = []

    def forward(self, x: Tensor) -> Tensor:
        return normalize(self.net(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        x, y, indices = batch
        z, references = self(x), self.memory.read()
        in_batch = self.loss(z, y, indices=indices)
        against = self.memory_loss(z, y, *references[:2], indices=indices, ref_indices=references[2])
        against = self.memory_weight * against
        self.seen.append(
            {
                "z": z.detach(), "y": y, "indices": indices, "rows": [column.clone() for column in references],
                "steps": self.memory.steps.clone(), "share": float((against / (against + in_batch)).detach()),
            }
        )  # fmt: skip
        return {"loss": in_batch + against, "embeddings": z, "labels": y, "indices": indices}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def fit(module: LightningModule, *callbacks: Callback, data: Any = None, ckpt: Any = None, **flags: Any) -> Trainer:
    trainer = Trainer(
        **{
            "accelerator": "cpu", "max_epochs": 2, "logger": False, "callbacks": list(callbacks), **flags,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "enable_progress_bar": False, "enable_model_summary": False,
        }
    )  # fmt: skip
    trainer.fit(module, loader() if data is None else data, ckpt_path=ckpt)
    return trainer


@pytest.mark.parametrize("memory_first", [True, False])
@pytest.mark.parametrize("instances", [True, False])
def test_numbers_are_those_of_the_memory_that_the_step_found(
    memory_first: bool, instances: bool, tmp_path: Path
) -> None:
    """Fill, ages, classes, pairs with a weight and share of the loss, each from its definition."""
    module, report = Learner(memory_weight=0.5), MemoryReport(7, dirpath=str(tmp_path))
    memory = MemoryCallback(memory=InstanceMemory()) if instances else MemoryCallback(size=30)
    fit(module, *([memory, report] if memory_first else [report, memory]))
    assert [entry["step"] for entry in report.reports] == [7, 14]
    for entry in report.reports:
        step = entry["step"] - 1  # the weights that made the batch had taken one step less
        seen = module.seen[step]
        rows, labels, indices = seen["rows"]
        ages = (step - seen["steps"]).double()
        assert entry["rows"] == len(rows)
        assert entry["fill"] == pytest.approx(len(rows) / (IMAGES if instances else 30))
        assert (entry["age_mean"], entry["age_max"]) == pytest.approx((float(ages.mean()), float(ages.max())))
        assert entry["classes"] == len(set(labels.tolist()))
        assert entry["class_coverage"] == pytest.approx(entry["classes"] / CLASSES)
        weights = module.memory_loss.pair_weights(
            seen["z"], seen["y"], rows, labels, indices=seen["indices"], ref_indices=indices
        )
        found = [(side > 0).sum().item() / BATCH for side in weights]
        assert (entry["positives"], entry["negatives"]) == pytest.approx(tuple(found))
        assert entry["share_of_loss"] == pytest.approx(seen["share"], rel=1e-4)
    assert sum(entry["positives"] + entry["negatives"] for entry in report.reports) > 0


def test_a_network_that_stands_still_does_not_drift_and_one_that_moves_does(tmp_path: Path) -> None:
    """Without augmentation and dropout the row of an image is exactly what it would be now."""
    found = {}
    for rate in (0.0, 0.05):
        module, report = Learner(rate), MemoryReport(10, dirpath=str(tmp_path))
        module.net[2] = nn.Identity()
        fit(module, MemoryCallback(size=1.0), report)
        found[rate] = report.reports[-1]
    assert abs(found[0.0]["drift"]) < 1e-6
    assert found[0.05]["drift"] > 1e-3


def test_drift_is_one_minus_the_cosine_to_the_row_that_the_network_makes_now(tmp_path: Path) -> None:
    module, report = Learner(), MemoryReport(5, sample=1000, dirpath=str(tmp_path))
    expected = []

    class Recompute(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Learner, *_: Any) -> None:
            if trainer.global_step % 5 == 0:
                rows, _, indices = pl_module.seen[-1]["rows"]
                pl_module.eval()
                with torch.no_grad():
                    now = pl_module(Images().images[indices])
                pl_module.train()
                drift = 1 - (now * rows).sum(dim=1)  # oldest first, as a FIFO is read; 4 rows of each step
                quarter = len(drift) // 4
                expected.append([float(part.mean()) for part in (drift, drift[-quarter:], drift[:quarter])])

    fit(module, MemoryCallback(size=16), report, Recompute())
    names = ("drift", "drift_young", "drift_old")
    assert [[entry[name] for name in names] for entry in report.reports] == [
        pytest.approx(numbers, rel=1e-4) for numbers in expected
    ]


def test_a_momentum_encoder_drifts_less_than_the_network_and_both_are_told(tmp_path: Path) -> None:
    reports = {}
    for name, options in (("plain", {}), ("slow", {"encoder_momentum": 0.95, "encoder_ramp": 1})):
        report = MemoryReport(10, dirpath=str(tmp_path))
        module = Learner(rate=0.3)
        module.net[2] = nn.Identity()
        fit(module, MemoryCallback(size=1.0, **options), report)
        reports[name] = report.reports[-1]
    assert reports["slow"]["drift"] < 0.5 * reports["plain"]["drift"]
    assert reports["slow"]["network_drift"] > reports["slow"]["drift"]
    assert "network_drift" not in reports["plain"]


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_reporting_does_not_change_the_training(momentum: Any, tmp_path: Path) -> None:
    ends = []
    for reports in ([], [MemoryReport(5, dirpath=str(tmp_path))]):
        module = Learner()
        torch.manual_seed(3)
        fit(module, MemoryCallback(size=30, encoder_momentum=momentum), *reports)
        ends.append((module.state_dict(), torch.get_rng_state()))
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())
    assert torch.equal(ends[0][1], ends[1][1])


def test_a_memory_nobody_reads_is_still_warned_about(tmp_path: Path) -> None:
    class Deaf(Learner):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            z = self(batch[0])
            return {"loss": self.loss(z, batch[1]), "embeddings": z, "labels": batch[1]}

    with pytest.warns(UserWarning, match="does not read them"):
        fit(Deaf(), MemoryReport(10, dirpath=str(tmp_path)), MemoryCallback(size=30))


def test_table_and_picture_hold_all_reports_also_over_a_resume(tmp_path: Path) -> None:
    def callbacks(folder: str) -> list[Callback]:
        return [MemoryCallback(size=30, start_step=2), MemoryReport(2, dirpath=str(tmp_path / folder))]

    whole = callbacks("whole")
    fit(Learner(), *whole, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), accumulate_grad_batches=2)
    parts = callbacks("parts")
    fit(Learner(), *parts, ckpt=tmp_path / "epoch=0.ckpt", accumulate_grad_batches=2)
    assert [entry["step"] for entry in whole[1].reports] == [4, 6, 8, 10]
    assert [entry["step"] for entry in parts[1].reports] == [4, 6, 8, 10]
    for folder in ("whole", "parts"):
        with (tmp_path / folder / "report.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [float(row["step"]) for row in rows] == [4, 6, 8, 10]
        reports = {"whole": whole, "parts": parts}[folder][1].reports
        assert [float(row["drift"]) for row in rows] == [entry["drift"] for entry in reports]
        assert min(float(row["drift_old"]) for row in rows) > 0
        assert Image.open(tmp_path / folder / "report.png").size[0] == 7 * 150
        assert {path.name for path in (tmp_path / folder).iterdir()} == {"report.csv", "report.png"}


def test_the_logger_is_given_the_numbers_and_files_go_to_the_runs_folder(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="run")
    report = MemoryReport(4)
    fit(Learner(), MemoryCallback(size=30), report, logger=logger, log_every_n_steps=4)
    folder = tmp_path / "run" / "version_0"
    assert (folder / "memory" / "report.png").is_file()
    with (folder / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["memory/drift"]]
    assert [float(row["memory/fill"]) for row in logged] == pytest.approx([entry["fill"] for entry in report.reports])


def test_what_there_is_no_way_to_know_is_left_out(tmp_path: Path) -> None:
    class Other(Learner):
        def __init__(self) -> None:
            super().__init__()
            self.loss = self.memory_loss = None

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            z = self(batch[0])
            self.memory.read()
            return {"loss": z.sum(), "embeddings": z, "labels": batch[1], "indices": batch[2]}

    report = MemoryReport(4, dirpath=str(tmp_path))
    fit(Other(), MemoryCallback(size=30), report, data=loader(shift=1))
    assert set(report.reports[0]) == {"step", "rows", "fill", "age_mean", "age_max", "classes", "class_coverage"}


def test_one_report_is_a_picture_too_and_none_is_refused() -> None:
    figure = plot_reports([{"step": 3, "fill": 0.5}])
    assert len(figure.axes) == 1
    assert [line.get_marker() for line in figure.axes[0].get_lines()] == ["s"]
    with pytest.raises(ValueError, match="at least one report"):
        plot_reports([])


def test_a_report_without_a_memory_names_the_callback() -> None:
    with pytest.raises(ValueError, match=r"there is none. Pass `Trainer\(callbacks=\[MemoryCallback"):
        fit(Learner(), MemoryReport())


@pytest.mark.parametrize("arguments", [{"every_n_steps": 0}, {"sample": 3}, {"sample": -1}])
def test_impossible_arguments_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        MemoryReport(**arguments)


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_images_of_a_data_module_are_opened_as_for_validation(glyph_cache: str, tmp_path: Path) -> None:
    """The rows were made of shifted glyphs, and are compared with those of the glyphs as they are."""
    glyphs = GlyphDataModule(
        num_classes=20, batch_size=16, images_per_class=2, cache_dir=glyph_cache, num_workers=0, val_fraction=0.2
    )
    module = MetricLearner(SmallConvNet(width=4), ContrastiveLoss(), embedding_dim=8, freeze_batch_norm=True)
    expected = []

    class Recompute(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: MetricLearner, *_: Any) -> None:
            self.rows, _, self.indices = (column.clone() for column in pl_module.memory.read())

        def on_train_batch_end(self, trainer: Trainer, pl_module: MetricLearner, *_: Any) -> None:
            pictures = [glyphs.train_set.open(index) for index in self.indices.tolist()]
            if pictures:
                with torch.no_grad():
                    now = pl_module(torch.stack(pictures).float() / 255)
                expected.append(float((1 - (now * self.rows).sum(dim=1)).mean()))

    report = MemoryReport(1, dirpath=str(tmp_path))
    fit(module, report, MemoryCallback(size=64), Recompute(), data=glyphs, max_steps=4)
    assert [entry["drift"] for entry in report.reports] == pytest.approx(expected, rel=1e-3)
    assert glyphs.train_set.transform is not glyphs.val_set.transform
