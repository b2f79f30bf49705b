"""Batches of 8 bits, normalised on the device: the same bits in every step, and a quarter of the bytes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from support.children import run_ranks
from support.gpu import Count
from support.pictures import draw_pictures
from torch import Tensor, nn
from torchvision.transforms import v2

from lightning_memdml.data import FolderDataModule
from lightning_memdml.data.pixel_batches import PixelBatch, PixelTransform, pixel_transform
from lightning_memdml.data.transforms import EvaluationTransform, PhotographTransform, TrainingTransform

pytestmark = pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer` in `LightningModule`")
OWN_STEPS = v2.Compose([v2.Resize((9, 9)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])


class Recorder(LightningModule):
    """Keeps the images that reach its steps and its hook after the transfer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[Tensor]] = {}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen.setdefault("hook", []).append(batch[0].clone())
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.setdefault("fit", []).append(batch[0].clone())
        return self.weight * batch[0].float().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.setdefault("validate", []).append(batch[0].clone())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.setdefault("test", []).append(batch[0].clone())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.setdefault("predict", []).append(batch[0].clone())
        return batch[2]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class WithHook(Recorder):
    """Gets batches before they are on the device."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


class OwnNormalisation(EvaluationTransform):
    """Normalises in its own way."""

    def normalise(self, pixels: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.div(pixels, 127.5, out=out).sub_(1)


def make_trainer(**options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


def make_data(folder: Path, wanted: bool | None = None, **options: Any) -> FolderDataModule:
    fixed = {"image_size": 32, "batch_size": 4, "images_per_class": 2, "val_fraction": 0.5}
    return FolderDataModule(str(folder), normalize_on_device=wanted, **{"num_workers": 0, **fixed, **options})


def images_of_steps(folder: Path, wanted: bool, precision: Any = "32-true", **options: Any) -> dict[str, list[Tensor]]:
    module, trainer = Recorder(), make_trainer(precision=precision)
    data = make_data(folder, wanted, **options)
    trainer.fit(module, data)
    trainer.validate(module, data)
    trainer.test(module, data)
    trainer.predict(module, data)
    return module.seen


def assert_same(left: dict[str, list[Tensor]], right: dict[str, list[Tensor]]) -> None:
    assert left.keys() == right.keys() == {"hook", "fit", "validate", "test", "predict"}
    for stage, images in left.items():
        assert [batch.dtype for batch in images] == [batch.dtype for batch in right[stage]]
        assert all(map(torch.equal, images, right[stage]))
        assert len(images) == len(right[stage])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draw_pictures(folder)
    return folder


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_every_step_gets_the_same_images(pictures: Path, precision: str) -> None:
    assert_same(images_of_steps(pictures, True, precision), images_of_steps(pictures, False, precision))


def test_workers_and_the_pixel_cache_send_the_same_images(pictures: Path, tmp_path: Path) -> None:
    options = {"num_workers": 1, "pixel_cache": str(tmp_path), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.1)}
    assert_same(images_of_steps(pictures, True, **options), images_of_steps(pictures, False, **options))


@pytest.mark.parametrize("transform", [OwnNormalisation(32), OWN_STEPS])
def test_transforms_of_the_user_are_left_as_they_are(pictures: Path, transform: nn.Module) -> None:
    data = make_data(pictures, True, train_transform=transform, test_transform=transform)
    data.trainer = make_trainer()
    for loader in (data.train_dataloader(), data.test_dataloader()):
        assert isinstance(next(iter(loader))[0], Tensor)


def test_a_loader_sends_a_quarter_of_the_bytes(pictures: Path) -> None:
    sizes = []
    for wanted in (True, False):
        data = make_data(pictures, wanted)
        data.trainer = make_trainer()
        loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader())
        images = [batch[0] for loader in loaders for batch in loader]
        assert all(isinstance(batch, PixelBatch if wanted else Tensor) for batch in images)
        sizes.append(sum(batch.pixels.nbytes if isinstance(batch, PixelBatch) else batch.nbytes for batch in images))
    assert 4 * sizes[0] == sizes[1] > 0


def test_loaders_without_a_trainer_and_data_sets_give_normalised_images(pictures: Path) -> None:
    data = make_data(pictures, True)
    assert next(iter(data.test_dataloader()))[0].dtype == torch.float32
    data.trainer = make_trainer()
    assert data.test_dataloader().dataset.labels.equal(data.query_set.labels)
    assert data.query_set[0][0].dtype == torch.float32


@pytest.mark.parametrize(
    ("wanted", "device", "module", "transform", "deferred"),
    [
        (None, "cuda", Recorder(), TrainingTransform(32), True),
        (None, "cuda", WithHook(), TrainingTransform(32), False),
        (None, "cpu", Recorder(), TrainingTransform(32), False),
        (False, "cuda", Recorder(), TrainingTransform(32), False),
        (True, "cpu", WithHook(), TrainingTransform(32), True),
        (True, "cuda", Recorder(), OwnNormalisation(32), False),
    ],
)
def test_where_images_are_normalised(
    pictures: Path, wanted: bool | None, device: str, module: Recorder, transform: PhotographTransform, deferred: bool
) -> None:
    data = make_data(pictures, wanted)
    strategy = SimpleNamespace(root_device=torch.device(device))
    data.trainer = SimpleNamespace(
        strategy=strategy, lightning_module=module, precision_plugin=make_trainer().precision_plugin
    )
    assert isinstance(pixel_transform(transform, data, wanted), PixelTransform) is deferred


def test_all_values_of_all_channels_are_the_same_bits_by_two_operations() -> None:
    transform = EvaluationTransform(16)
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    one_by_one = torch.stack([transform.normalise(image) for image in values])
    with Count() as counted:
        together = PixelBatch(values, transform).to("cpu")
    assert together.equal(one_by_one)
    # In one operation, a device may round once where the CPU rounds twice.
    assert [name for name in counted.names if "clone" not in name] == ["aten.mul", "aten.add_"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_gives_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16).contiguous()
    batch = PixelBatch(values, EvaluationTransform(16), dtype)
    assert batch.pin_memory().to("cuda").cpu().equal(batch.to("cpu"))


def images_of_rank(folder: str) -> list[bool]:
    """Whether each image of this rank is the same for both ways of loading."""
    found = []
    for wanted in (True, False):
        module, data = Recorder(), make_data(Path(folder), wanted)
        make_trainer(devices=2, strategy="ddp").fit(module, data)
        found.append(module.seen["fit"] + module.seen["validate"])
    assert len(found[0]) == len(found[1]) > 4
    return [left.equal(right) for left, right in zip(*found, strict=True)]


def test_two_ranks_get_the_same_images(pictures: Path) -> None:
    for same in run_ranks(2, images_of_rank, str(pictures), join=False):
        assert all(same)
