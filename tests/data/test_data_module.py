"""From records to sets: roles, validation classes, indices that name images, and loaders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn

from lightning_memdml.data.module import RetrievalDataModule
from lightning_memdml.data.records import Record
from lightning_memdml.data.roles import split_rows, validation_classes
from lightning_memdml.data.transforms import EvaluationTransform, RandomAffine


class Listed(RetrievalDataModule):
    """Records from (label, role) pairs; image `i` is a pixel of value `i`."""

    def __init__(self, *listed: tuple[int | str, str], **kwargs: Any) -> None:
        super().__init__(**{"num_workers": 0, "batch_size": 4, "images_per_class": 2, "val_fraction": 0, **kwargs})
        self.listed = listed
        self.read = 0

    def records(self) -> Iterator[Record]:
        self.read += 1
        for i, (label, role) in enumerate(self.listed):
            yield Record(str(i), label, role)

    def images(self, records: object) -> Tensor:
        return torch.arange(len(self.listed), dtype=torch.uint8).view(-1, 1, 1, 1)

    def default_train_transform(self) -> nn.Module:
        return nn.Identity()

    default_test_transform = default_train_transform


TRAIN = (("cat", "train"), ("dog", "train"), ("cat", "train"), ("dog", "train"))


def made(*listed: tuple[int | str, str], **kwargs: Any) -> Listed:
    module = Listed(*listed, **kwargs)
    module.setup("fit")
    return module


def test_every_test_image_is_query_and_gallery_in_self_retrieval():
    module = made(*TRAIN, ("owl", "test"), ("owl", "test"), ("cow", "test"))
    assert module.gallery_set is module.query_set
    assert module.query_set.paths == ["4", "5", "6"]
    assert [module.query_set[i][2] for i in range(3)] == [0, 1, 2]
    assert isinstance(module.test_dataloader(), torch.utils.data.DataLoader)


def test_queries_and_gallery_share_labels_and_number_their_images_together():
    module = made(*TRAIN, ("owl", "gallery"), ("cow", "query"), ("owl", "test"), ("cow", "gallery"))
    assert (module.query_set.paths, module.gallery_set.paths) == (["5", "6"], ["4", "6", "7"])
    assert (module.query_set.indices.tolist(), module.gallery_set.indices.tolist()) == ([1, 2], [0, 2, 3])
    assert [module.classes[label] for label in module.query_set.labels] == ["cow", "owl"]
    assert [module.classes[label] for label in module.gallery_set.labels] == ["owl", "owl", "cow"]
    queries, gallery = module.predict_dataloader()
    assert (len(queries.dataset), len(gallery.dataset)) == (2, 3)


@pytest.mark.filterwarnings("ignore:Training classes with one image only")
def test_training_labels_are_the_first_numbers_and_indices_the_positions():
    module = made(("owl", "test"), ("x", "test"), *TRAIN, (1, "train"), (1, "train"), (10**18, "train"), val_fraction=0)
    assert module.classes == ["cat", "dog", 1, 10**18, "owl", "x"]
    assert module.train_set.labels.tolist() == [0, 1, 0, 1, 2, 2, 3]
    assert module.train_set.labels.dtype == torch.int64
    image, label, index = module.train_set[1]
    assert (int(image), label, index) == (3, 1, 1)


def test_validation_classes_come_evenly_from_the_training_classes():
    listed = [(label, "train") for label in range(20) for _ in range(2)] + [(99, "test")]
    module = made(*listed, val_fraction=0.2)
    names = [{module.classes[label] for label in part.labels} for part in (module.train_set, module.val_set)]
    assert names[1] == {2, 7, 12, 17}
    assert names[0] == set(range(20)) - names[1]
    assert module.train_set.labels.unique().tolist() == list(range(16))
    assert module.val_set.indices.tolist() == list(range(8))


@pytest.mark.parametrize(("classes", "fraction", "held_out"), [(4, 0.01, 2), (10, 0.5, 5), (1000, 0.1, 100), (7, 0, 0)])
def test_the_share_of_validation_classes(classes, fraction, held_out):
    assert len(validation_classes(range(classes), fraction)) == held_out


def test_a_data_set_with_validation_classes_of_its_own_keeps_them():
    module = made(*TRAIN, ("owl", "val"), ("ox", "test"), val_fraction=0.5)
    assert [module.classes[label] for label in module.val_set.labels] == ["owl"]
    assert len(module.train_set) == 4


def test_without_validation_classes_validation_is_left_out():
    module = made(*TRAIN)
    assert module.val_dataloader() == []
    assert len(module.val_set) == 0

    class Learner(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
            return self.layer(batch[0].float()).mean()

        def validation_step(self, batch: object, batch_idx: int) -> None:
            pytest.fail("there is nothing to validate on")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = Trainer(
        fast_dev_run=True, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, logger=False
    )
    trainer.fit(Learner(), module)
    assert trainer.global_step == 1


def test_records_are_read_once_and_loaders_need_no_setup():
    module = Listed(*TRAIN, ("owl", "test"))
    images, _, indices = next(iter(module.train_dataloader()))
    assert sorted(images.flatten().tolist()) == sorted(indices.tolist()) == [0, 1, 2, 3]
    module.setup("test")
    module.test_dataloader()
    assert module.read == 1


def test_a_failed_setup_can_be_repeated():
    module = Listed(*TRAIN, ("owl", "exam"))
    for _ in range(2):
        with pytest.raises(ValueError, match="4: expected a role of train, val, test, query, gallery but got 'exam'"):
            module.setup()


def test_given_transforms_are_used_even_empty_ones():
    module = made(*TRAIN, ("owl", "test"), train_transform=nn.Sequential(), test_transform=torch.neg)
    assert isinstance(module.train_set.transform, nn.Sequential)
    assert int(module.query_set[0][0]) == 256 - 4


def test_single_images_are_counted_in_one_warning():
    with pytest.warns(UserWarning, match="Training classes with one image only: 2 of 4") as warned:
        made(*TRAIN, ("owl", "train"), ("ox", "train"))
    assert len(warned) == 1


def test_a_test_on_training_classes_is_told():
    with pytest.warns(UserWarning, match="Test classes that are training classes too: 1"):
        made(*TRAIN, ("cat", "test"), ("owl", "test"))


@pytest.mark.parametrize(
    ("listed", "loader", "message"),
    [
        ([("owl", "test")], "train_dataloader", "Listed has no train images"),
        (TRAIN, "test_dataloader", "Listed has no query images"),
        ([*TRAIN, ("owl", "query")], "test_dataloader", "Listed has no gallery images"),
        (TRAIN[::2], "train_dataloader", "at least 2 training classes but got 1"),
    ],
)
def test_what_is_lacking_is_named_when_it_is_asked_for(listed, loader, message):
    with pytest.raises(ValueError, match=message):
        getattr(Listed(*listed), loader)()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "images_per_class": 4}, "multiple of `images_per_class`"),
        ({"val_fraction": 1.0}, r"`val_fraction`.* in \[0, 1\) but got 1.0"),
        ({"val_fraction": -0.1}, "`val_fraction`"),
        ({"eval_batch_size": 0}, "`eval_batch_size` of at least 1 but got 0"),
        ({"image_size": 0}, "`image_size` of at least 1 but got 0"),
    ],
)
def test_wrong_arguments_are_named_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        Listed(*TRAIN, **options)


def test_holding_out_too_many_classes_is_an_error():
    with pytest.raises(ValueError, match=r"at least 2 of the 3 training classes.*pass val_fraction=0"):
        split_rows([Record(name, name, "train") for name in "abc"], 0.1)


def test_more_classes_per_batch_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="at most 2 classes per batch"):
        Listed(*TRAIN, batch_size=6).train_dataloader()


def test_a_batch_shrinks_to_the_classes_there_are_if_that_is_wanted(caplog):
    data = Listed(*TRAIN, batch_size=6, shrink_batch=True)
    with caplog.at_level("INFO"):
        images, labels, _ = next(iter(data.train_dataloader()))
    assert data.batch_size == len(images) == 2 * data.images_per_class
    assert len(labels.unique()) == 2
    assert f"Batches have {len(images)} images rather than 6" in caplog.text
    assert Listed(*TRAIN, batch_size=2, shrink_batch=True).train_dataloader().sampler.batch_size == 2


def test_the_default_batch_shrinks_to_the_classes_there_are_and_one_that_is_set_does_not(caplog):
    few = TRAIN * 2
    data = Listed(*few, batch_size=None, images_per_class=4)
    assert data.batch_size == 64
    with caplog.at_level("INFO"):
        images, _, _ = next(iter(data.train_dataloader()))
    assert data.batch_size == len(images) == 8
    assert caplog.messages == ["Batches have 8 images rather than 64: there are no more classes."]
    with pytest.raises(ValueError, match=r"batch_size=64 / images_per_class=4 = 16: .* Pass batch_size=8 or less, or"):
        Listed(*few, batch_size=64, images_per_class=4).train_dataloader()
    with pytest.raises(ValueError, match="Pass batch_size=8 or less"):  # before features are computed and heads fitted
        Listed(*few, batch_size=64, images_per_class=4).setup("fit")
    Listed(*few, batch_size=64, images_per_class=4).setup("test")
    caplog.clear()
    with caplog.at_level("INFO"):
        Listed(*few, batch_size=None).setup("test")
    assert caplog.messages == []  # of batches that are not drawn
    many = [(label, "train") for label in range(40) for _ in range(2)]
    assert Listed(*many, batch_size=None).train_dataloader().sampler.batch_size == 64


class Files(RetrievalDataModule):
    def __init__(self, folder: Any, **kwargs: Any) -> None:
        super().__init__(num_workers=0, **kwargs)
        self.folder = folder

    def records(self) -> Iterator[Record]:
        for i in range(6):
            yield Record(str(self.folder / f"{i}.png"), i // 2, "train" if i < 4 else "test")


def test_verify_names_what_is_missing_or_damaged(tmp_path):
    for i in range(6):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    assert Files(tmp_path, val_fraction=0).verify() == []
    (tmp_path / "1.png").unlink()
    (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:40])
    missing, damaged = Files(tmp_path, val_fraction=0).verify()
    assert missing.path == str(tmp_path / "1.png")
    assert "No such file" in missing.reason
    assert damaged.path == str(tmp_path / "5.png")


def test_photographs_get_the_transforms_of_the_field_by_default(tmp_path):
    for i in range(6):
        Image.new("L", (40, 30), 40 * i).save(tmp_path / f"{i}.png")
    module = Files(tmp_path, val_fraction=0, image_size=32, batch_size=4, images_per_class=2)
    images, _, _ = next(iter(module.train_dataloader()))
    assert images.shape == (4, 3, 32, 32)
    ((images, _, _),) = module.test_dataloader()
    assert images[1].equal(EvaluationTransform(32)(Image.open(tmp_path / "5.png").convert("RGB")))
    assert not isinstance(module.train_set.transform, RandomAffine)


def test_a_data_set_that_does_not_say_its_images_is_told_what_to_define() -> None:
    class Shoes(RetrievalDataModule):
        """Nothing yet."""

    with pytest.raises(NotImplementedError, match=r"Shoes has no list of images\. Define `records\(self\)`"):
        Shoes().setup()


class Batches(LightningModule):
    """Notes the images of every training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, ...]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(tuple(batch[2].tolist()))
        return self.weight * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`", "ignore:You requested to overfit")
def test_overfit_batches_trains_on_the_same_batches_in_every_epoch() -> None:
    module = Batches()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        overfit_batches=2, limit_val_batches=0, max_epochs=3, accelerator="cpu", enable_model_summary=False, **quiet
    )
    trainer.fit(module, Listed(*[(label, "train") for label in range(8) for _ in range(4)]))
    assert len(module.seen) == 6
    assert module.seen[:2] == module.seen[2:4] == module.seen[4:]
    assert module.seen[0] != module.seen[1]
