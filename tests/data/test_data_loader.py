"""A run resumed from any checkpoint, on any number of workers or ranks, trains on the same batches to the last pixel.

This file is also the program of a rank: the test of two ranks starts it twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from support.children import join_group, run_ranks
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from lightning_memdml.data.images import ImageDataset, Record, TensorImageDataset
from lightning_memdml.data.loader import ClassBalancedLoader
from lightning_memdml.data.module import RetrievalDataModule
from lightning_memdml.data.sampler import ClassBalancedSampler
from lightning_memdml.data.transforms import RandomAffine

LABELS = torch.tensor([0] * 5 + [1] * 3 + [2] * 2 + [3] * 6 + [4] * 2 + [5] * 4)
PIXELS = torch.randint(256, (len(LABELS), 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
PER_IMAGE = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(6), v2.ToDtype(torch.float32, scale=True)])


class Noise(RetrievalDataModule):
    """Noise images; the last two classes validate."""

    def records(self) -> Iterator[Record]:
        for row, label in enumerate(LABELS.tolist()):
            yield Record(f"{row}.png", label, "train" if label < 4 else "val")

    def images(self, records: object) -> Tensor:
        return PIXELS

    def default_train_transform(self) -> nn.Module:
        return RandomAffine()

    def default_test_transform(self) -> nn.Module:
        return v2.ToDtype(torch.float32, scale=True)


class Recorder(LightningModule):
    """Writes down what it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: list[tuple[int, list[int], float]] = []

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, _, indices = batch
        self.seen.append((self.trainer.current_epoch, indices.tolist(), images.double().sum().item()))
        return self.layer(images.mean().view(1)).square().mean()

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveOnce(Callback):
    """Saves a checkpoint in the hook of that name, after so many batches."""

    def __init__(self, hook: str, batches: int, path: Path) -> None:
        def save(trainer: Trainer, module: Recorder, *arguments: object) -> None:
            if len(module.seen) == batches and not path.exists():
                trainer.save_checkpoint(path)

        setattr(self, hook, save)


def fit(data: Noise, *callbacks: Callback, checkpoint: Path | None = None, **options: Any) -> tuple[Recorder, Trainer]:
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), **{"max_epochs": 3, **options},
    )  # fmt: skip
    recorder = Recorder()
    trainer.fit(recorder, data, ckpt_path=checkpoint, weights_only=True)
    return recorder, trainer


def noise(num_workers: int = 0, **options: Any) -> Noise:
    return Noise(batch_size=4, images_per_class=2, num_workers=num_workers, **options)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("hook", "batches"),
    [
        ("on_train_batch_end", 2),
        ("on_train_batch_end", 5),  # the last of the epoch
        ("on_train_batch_end", 7),
        ("on_train_epoch_end", 5),
        ("on_train_epoch_end", 10),
        ("on_validation_end", 5),
    ],
)
def test_a_resumed_run_sees_the_batches_of_the_uninterrupted_one(tmp_path, num_workers, hook, batches):
    path = tmp_path / "saved.ckpt"
    whole, _ = fit(noise(num_workers), SaveOnce(hook, batches, path))
    resumed, _ = fit(noise(num_workers), checkpoint=path)
    assert [epoch for epoch, _, _ in whole.seen] == [0] * 5 + [1] * 5 + [2] * 5
    assert resumed.seen == whole.seen[batches:]


@pytest.mark.parametrize("steps", [3, 4, 6])
def test_a_run_stopped_by_its_steps_goes_on_where_it_stopped(tmp_path, steps):
    path, options = tmp_path / "saved.ckpt", {"max_epochs": -1, "limit_val_batches": 0}
    whole, _ = fit(noise(batches_per_epoch=4), max_steps=14, **options)
    first, _ = fit(noise(batches_per_epoch=4), SaveOnce("on_train_batch_end", steps, path), max_steps=steps, **options)
    resumed, _ = fit(noise(batches_per_epoch=4), max_steps=14, checkpoint=path, **options)
    assert first.seen + resumed.seen == whole.seen


def test_workers_are_gone_after_a_run():
    data = noise(num_workers=2)
    _, trainer = fit(data, max_epochs=1)
    assert trainer.train_dataloader._iterator is None


def batches_of(loader: ClassBalancedLoader, epoch: int) -> list[tuple[Tensor, ...]]:
    loader.sampler.set_epoch(epoch)
    return list(loader)


def same(a: list[tuple[Tensor, ...]], b: list[tuple[Tensor, ...]]) -> bool:
    return len(a) == len(b) and all(
        x.equal(y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("transform", [None, PER_IMAGE], ids=["whole batches", "per image"])
def test_augmentation_depends_on_the_draw_and_not_on_workers_or_the_global_generator(transform):
    def epoch(number: int, num_workers: int, manual_seed: int) -> list[tuple[Tensor, ...]]:
        torch.manual_seed(manual_seed)
        return batches_of(noise(num_workers, train_transform=transform).train_dataloader(), number)

    assert same(epoch(1, 0, 0), epoch(1, 2, 1))
    assert not same(epoch(1, 0, 0), epoch(2, 0, 0))


@pytest.mark.parametrize("transform", [RandomAffine(), v2.ToDtype(torch.float32, scale=True)])
def test_two_draws_of_one_image_in_one_batch_are_augmented_differently(transform):
    labels = torch.tensor([0, 1])  # one image each: it fills all places of its class
    data_set = TensorImageDataset(PIXELS[:2], ["a", "b"], labels, transform)
    ((images, _, indices),) = ClassBalancedLoader(data_set, ClassBalancedSampler(labels, 4, 2))
    assert indices[0] == indices[1]
    assert images[0].equal(images[1]) == (not isinstance(transform, RandomAffine))


def test_iterating_leaves_the_global_generators_alone(monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("it would reset the GPUs' generators too"))
    before = torch.get_rng_state()
    batches_of(noise(train_transform=PER_IMAGE).train_dataloader(), 0)
    assert torch.get_rng_state().equal(before)


def test_any_map_style_data_set_is_seeded():
    class Random(TensorDataset):
        def __getitem__(self, position: int) -> tuple[Tensor, Tensor, int]:
            return torch.rand(3), LABELS[position], position

    def loader() -> ClassBalancedLoader:
        return ClassBalancedLoader(Random(LABELS), ClassBalancedSampler(LABELS, 4, 2))

    assert same(list(loader()), list(loader()))
    images, labels, indices = next(iter(loader()))
    assert len(images.unique()) == images.numel()
    assert labels.equal(LABELS[indices])


def test_files_are_opened_in_workers(tmp_path):
    paths = [str(tmp_path / f"{row}.png") for row in range(4)]
    for row, path in enumerate(paths):
        Image.new("L", (9, 9), 60 * row).save(path)
    labels = torch.tensor([0, 0, 1, 1])
    opened = ImageDataset([Image.open(path).copy() for path in paths].__getitem__, paths, labels, v2.PILToTensor())
    images, _, indices = next(iter(ClassBalancedLoader(opened, ClassBalancedSampler(labels, 4, 2), num_workers=1)))
    assert images.shape == (4, 3, 9, 9)
    assert images[:, 0, 0, 0].tolist() == (60 * indices).tolist()


def test_state_counts_what_was_handed_out_and_not_what_workers_prepared():
    loader = noise(num_workers=2).train_dataloader()
    whole = batches_of(loader, 3)
    iterator = iter(loader)
    begun = [next(iterator), next(iterator)]
    state = loader.state_dict()
    assert state == {"epoch": 3, "batch": 2, "global_batch_size": 4}
    resumed = noise().train_dataloader()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert same(begun + batches_of(resumed, 3), whole)
    assert same(batches_of(resumed, 3), whole), "a second look at the epoch starts at its beginning"


def test_a_new_epoch_forgets_the_place_in_the_old_one():
    loader = noise().train_dataloader()
    loader.load_state_dict({"epoch": 1, "batch": 3, "global_batch_size": 4})
    loader.sampler.set_epoch(2)
    assert loader.state_dict()["batch"] == 0
    assert same(list(loader), batches_of(noise().train_dataloader(), 2))


def test_another_global_batch_size_goes_on_at_the_same_share_of_the_epoch():
    loader = noise(batches_per_epoch=10).train_dataloader()
    with pytest.warns(UserWarning, match="global batch of 8 images and is resumed with 4"):
        loader.load_state_dict({"epoch": 0, "batch": 3, "global_batch_size": 8})
    assert len(list(loader)) == 4


def two_epochs() -> list[Any]:
    """Return the batches of this rank; the loader is made before the process group."""
    loader = Noise(batch_size=4, images_per_class=2, num_workers=0).train_dataloader()
    join_group()
    return [batches_of(loader, epoch) for epoch in range(2)]


def test_two_ranks_together_train_on_the_batches_of_one():
    ranks = run_ranks(2, two_epochs, join=False)
    loader = Noise(batch_size=8, images_per_class=2, num_workers=0).train_dataloader()
    for epoch, parts in enumerate(zip(*ranks, strict=True)):
        together = [tuple(map(torch.cat, zip(*halves, strict=True))) for halves in zip(*parts, strict=True)]
        assert same(together, batches_of(loader, epoch))
