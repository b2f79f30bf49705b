"""The base of every data module: from a list of records to data sets and loaders for training and retrieval."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from multiprocessing.pool import ThreadPool
from typing import Any, ClassVar

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from lightning_memdml.checks import check_count, check_not_negative, check_types
from lightning_memdml.data import transforms
from lightning_memdml.data.cache import PixelCache
from lightning_memdml.data.images import ImageDataset, OpenFiles, TensorImageDataset
from lightning_memdml.data.loader import ClassBalancedLoader, default_workers
from lightning_memdml.data.paths import is_utf8, local_path, shown
from lightning_memdml.data.pixel_batches import pixel_transform
from lightning_memdml.data.read_images import ReadImages
from lightning_memdml.data.records import Record, Role, first_rows
from lightning_memdml.data.roles import Count, Problem, Rows, count_roles, require_classes, split_rows, warn_of_classes
from lightning_memdml.data.sampler import BATCH_SIZE, ClassBalancedSampler, check_batch, feasible_batch


class RetrievalDataModule(LightningDataModule):
    """Makes data sets and loaders for metric learning out of the records of a data set.

    A new data set is one class with one method, `records`, that yields a `Record` per image:

        class Shoes(RetrievalDataModule):
            def __init__(self, root: str, **kwargs: Any) -> None:
                super().__init__(**kwargs)
                self.root = Path(root)

            def records(self) -> Iterator[Record]:
                for role in ("train", "test"):
                    for path in sorted(self.root.glob(f"{role}/*/*.jpg")):
                        yield Record(str(path), label=path.parent.name, role=role)

    After `setup()` there are

    - `train_set`: the training classes less the validation classes; labels `0 ... C - 1`, indices `0 ... N - 1`;
    - `val_set`: the validation classes;
    - `query_set` and `gallery_set`: one and the same object if every test image is both. Equal indices are the same
      image in both sets, so an image can be recognised by its index;
    - `classes`: what the data set calls the class of each label; a label is the same class in every set;
    - `counts`: images and classes of each role, before validation classes are held out.

    Each is a map-style data set of `(image, label, index)` with `labels` (1-D, int64) and `paths`; one without images
    is empty. Every loader yields `(images, labels, indices)`. Under DDP, Lightning's sampler repeats a few images in
    evaluation, which have equal indices.

    Args:
        batch_size: Training images per batch on each rank; a multiple of `images_per_class`. By default 64, or as
            many as the training classes fill, with a notice. One that is set is never changed.
        images_per_class: Images of each class in a training batch.
        batches_per_epoch: Training batches per epoch; by default as many as it takes to visit every image. Shorter
            epochs visit every image too, over several epochs.
        shrink_batch: Make a `batch_size` that is set smaller too, with a notice, instead of refusing it.
        eval_batch_size: Images per batch of validation, test and prediction on each rank.
        num_workers: Processes per loader that open and transform images; 0 does it in the training process. By default
            as many as there are CPU cores for each rank of this machine, at most 16.
        seed: Seed of batches and augmentation. The validation classes do not depend on it.
        val_fraction: Share of the training classes that is held out for validation, evenly spread over their order: at
            least 2 classes, at least 2 left to train. 0 trains on all and validates on nothing: the test
            classes are never looked at before `test`. Without effect on a data set with its own validation classes.
        image_size: Side of the network's input in pixels. On the command line this and the last four options are by
            default those of a `timm:` backbone; otherwise 224 pixels.
        train_transform: Turns an opened image into the training input; by default the data set's own. Torch's random
            numbers in it are seeded for every draw; those of `random` and NumPy are not. A class of yours should be a
            `torch.nn.Module`: of what a checkpoint names, nothing else is built.
        test_transform: Turns an opened image into the input of validation, test and prediction; by default the
            data set's own.
        pixel_cache: Folder, on a local disk, in which opened images are kept as pixels, shrunk to what the default
            transforms begin with (shorter side 256 for an `image_size` of 224): later epochs and runs neither decode
            nor shrink them. The default transforms give the same numbers with and without it; your own get the shrunk
            image, as a uint8 tensor. For images in files; see `PixelCache`.
        pixel_cache_gb: How much of the disk (in 10^9 bytes) the folder may take; images beyond that are opened every
            time. An image takes about 0.25 MB at an `image_size` of 224.
        mean: Mean of each channel, of values in [0, 1]; by default that of ImageNet. As the next three options, of
            the default transforms of photographs only.
        std: Standard deviation of each channel; by default that of ImageNet.
        interpolation: How images are resized; by default `bilinear`.
        crop_pct: Share of the resized image's shorter side that the evaluation keeps, in (0, 1]; by default 0.875.
        normalize_on_device: Send photographs to the device in 8 bits, a quarter of the bytes, and normalise them there,
            to the same bits. By default where that is a GPU, unless the LightningModule has a hook that gets batches
            before they are there. Transforms of yours that normalise in their own way are not changed.

    Raises:
        ValueError: If an argument is out of range, or too few classes are left to train.
    """

    train_set: ImageDataset
    val_set: ImageDataset
    query_set: ImageDataset
    gallery_set: ImageDataset
    classes: list[int | str]
    counts: dict[Role, Count]
    #: What `setup()` has read. A module that is given it before its own `setup()` does not read the images again.
    read_images: ReadImages | None = None
    one_label_per_image: ClassVar[bool] = True  # false: two objects with one box are two images

    def __init__(
        self,
        batch_size: int | None = None,
        images_per_class: int = 4,
        batches_per_epoch: int | None = None,
        eval_batch_size: int = 128,
        num_workers: int | None = None,
        seed: int = 0,
        val_fraction: float = 0.1,
        image_size: int | None = None,
        train_transform: Callable[[Any], Any] | None = None,
        test_transform: Callable[[Any], Any] | None = None,
        pixel_cache: str | None = None,
        pixel_cache_gb: float = 64.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: transforms.Interpolation | None = None,
        crop_pct: float | None = None,
        shrink_batch: bool = False,
        normalize_on_device: bool | None = None,
    ) -> None:
        check_types(RetrievalDataModule.__init__, locals())
        super().__init__()
        size = BATCH_SIZE if batch_size is None else batch_size
        check_batch(size, images_per_class, seed, batches_per_epoch)
        check_count("eval_batch_size", eval_batch_size)
        check_not_negative("num_workers", num_workers)
        check_not_negative("pixel_cache_gb", pixel_cache_gb)
        if not 0 <= val_fraction < 1:
            raise ValueError(
                f"Expected `val_fraction`, a share of the training classes, in [0, 1) but got {val_fraction}. Pass "
                "0.1, for example."
            )
        self.batch_size = size
        self.images_per_class = images_per_class
        self.shrink_batch = shrink_batch
        self._fits_batch = shrink_batch or batch_size is None
        self.batches_per_epoch = batches_per_epoch
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.val_fraction = val_fraction
        self.image_size = 224 if image_size is None else check_count("image_size", image_size)
        self.mean = transforms.IMAGENET_MEAN if mean is None else tuple(mean)
        self.std = transforms.IMAGENET_STD if std is None else tuple(std)
        self.interpolation: transforms.Interpolation = interpolation or "bilinear"
        self.crop_pct = transforms.CROP if crop_pct is None else crop_pct
        # Images of another kind ignore these options, but not wrong ones.
        transforms.TrainingTransform(self.image_size, 1, self.mean, self.std, self.interpolation, self.crop_pct)
        self.train_transform = train_transform
        self.test_transform = test_transform
        self.pixel_cache = pixel_cache
        self.pixel_cache_gb = pixel_cache_gb
        self.normalize_on_device = normalize_on_device

    @property
    def batch_size(self) -> int:
        """Training images per batch on each rank."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        # Lightning's batch-size finder sets any number while it trains. It becomes one that the sampler can make.
        self._batch_size = size
        if hasattr(self, "classes"):
            self._batch_size = feasible_batch(size, self.images_per_class, len(self.train_set.labels.unique()))

    def __repr__(self) -> str:
        where = getattr(self, "root", getattr(self, "path", None))
        name = type(self).__name__ + ("" if where is None else f"({str(where)!r})")
        if not hasattr(self, "counts"):
            return f"{name}, not set up"
        sets = {"train": self.train_set, "validation": self.val_set, "query": self.query_set}
        if self.gallery_set is self.query_set:
            sets["query and gallery"] = sets.pop("query")
        else:
            sets["gallery"] = self.gallery_set
        found = (Count(len(images), len(images.labels.unique())).in_words(role) for role, images in sets.items())
        return f"{name}: {', '.join(found)}"

    __str__ = __repr__  # Lightning's reads every loader, and fails on one that is not a `DataLoader`

    # A data set defines `records`, and the other methods only if its images are not files or not photographs.

    def records(self) -> Iterable[Record]:
        """Return one record per image, in the same order at every call and on every rank."""
        raise NotImplementedError(
            f"{type(self).__name__} has no list of images. Define `records(self)`, which returns a "
            "`Record(path, label, role)` for each."
        )

    def images(self, records: Sequence[Record]) -> Tensor | Callable[[int], Image.Image | Tensor]:
        """Return the pixels: all as one uint8 tensor `(N, C, H, W)`, or a function that opens those of `records[row]`.

        The function is sent to worker processes, so it should hold what it needs and not this module.
        """
        return OpenFiles(records)

    def default_train_transform(self) -> Callable[[Any], Any]:
        """Return the training transform of this data set."""
        return transforms.TrainingTransform(
            self.image_size, mean=self.mean, std=self.std, interpolation=self.interpolation, crop_pct=self.crop_pct
        )

    def default_test_transform(self) -> Callable[[Any], Any]:
        """Return the transform of this data set for validation, test and prediction."""
        return transforms.EvaluationTransform(self.image_size, self.mean, self.std, self.interpolation, self.crop_pct)

    def shrink(self) -> transforms.Shrink | None:
        """Return the part that the default transforms begin with, which the pixel cache keeps; `None` for no cache."""
        return transforms.Shrink(self.image_size, self.interpolation, self.crop_pct)

    # The methods that Lightning calls.

    def setup(self, stage: str | None = None) -> None:
        """Read the records and make the data sets, once; for `fit`, settle the size of batches too."""
        if not hasattr(self, "classes"):
            self._set_up()
        if stage == "fit" and len(self.train_set):
            self._fit_batch()

    def _set_up(self) -> None:
        self.read_images = read = self.read_images or self._read()
        self._all_images, self.counts = read.images, read.counts
        self._make_sets(read.rows, read.cached)
        warn_of_classes(self.train_set.labels, self.query_set.labels)
        self.classes = read.classes

    def _read(self) -> ReadImages:
        records = list(self.records())
        pixels, paths = self.images(records), [record.path for record in records]
        rows = split_rows(records, self.val_fraction)
        if isinstance(pixels, OpenFiles):
            rows = self._each_image_once(rows, first_rows(records, self.one_label_per_image))
        classes = list(dict.fromkeys(records[row].label for part in rows for row in part.tolist()))
        label_of = {name: label for label, name in enumerate(classes)}
        labels = torch.tensor([label_of[record.label] for record in records], dtype=torch.long)
        if isinstance(pixels, Tensor):
            images: ImageDataset = TensorImageDataset(pixels, paths, labels)
        else:
            images = ImageDataset(pixels, paths, labels)
        return ReadImages(images, self._cached(images, records), rows, classes, count_roles(records))

    def _each_image_once(self, rows: Rows, first: Sequence[int]) -> Rows:
        """Return `rows` with every row replaced by the first one of the same image, and each of those once."""
        if len(set(first)) == len(first):
            return rows
        first_of = torch.tensor(first, dtype=torch.long)
        once = Rows(*(first_of[part].unique() for part in rows))
        repeats: set[int] = set()
        for part in rows:
            kept = np.unique(first_of[part].numpy(), return_index=True)[1]
            repeats |= set(part.tolist()) - set(part[kept].tolist())
        if repeats:
            rank_zero_warn(
                f"{type(self).__name__} lists images more than once; {len(repeats)} repeated rows are not used."
            )
        tested = torch.cat([once.query, once.gallery]).unique()
        if shared := int(torch.isin(tested, torch.cat([once.train, once.val])).sum()):
            rank_zero_warn(
                f"Test images that are training or validation images too: {shared}. Scores will be too good."
            )
        return once

    def _cached(self, images: ImageDataset, records: Sequence[Record]) -> ImageDataset:
        """Return all images, through the pixel cache if there is one; `verify` still reads the files."""
        shrink = self.shrink()
        if self.pixel_cache is None or shrink is None or isinstance(images, TensorImageDataset):
            return images
        folder, max_bytes = local_path(self.pixel_cache, "pixel_cache"), round(1e9 * self.pixel_cache_gb)
        cache = PixelCache(images.open_image, records, shrink, shrink.side, folder, max_bytes, shrink.interpolation)
        rank_zero_info(f"Pixel cache: {cache.taken() / 1e9:.1f} of {max_bytes / 1e9:.1f} GB taken in {folder}.")
        return ImageDataset(cache, images.paths, images.labels)

    def _make_sets(self, rows: Rows, images: ImageDataset) -> None:
        """Give each role its part of the images."""
        train_transform = self.default_train_transform() if self.train_transform is None else self.train_transform
        test_transform = self.default_test_transform() if self.test_transform is None else self.test_transform
        identity = torch.full((len(images),), -1)
        tested = torch.cat([rows.query, rows.gallery]).unique()
        identity[tested] = torch.arange(len(tested))
        self.train_set = images.part(rows.train, train_transform)
        self.val_set = images.part(rows.val, test_transform)
        self.query_set = images.part(rows.query, test_transform, identity[rows.query])
        self.gallery_set = self.query_set
        if not rows.query.equal(rows.gallery):
            self.gallery_set = images.part(rows.gallery, test_transform, identity[rows.gallery])

    def _fit_batch(self) -> None:
        """Lower a batch size that may be changed to what the training classes fill, and refuse one that may not."""
        most = len(self.train_set.labels.unique()) * self.images_per_class
        if self._fits_batch and most < self.batch_size:
            rank_zero_info(f"Batches have {most} images rather than {self.batch_size}: there are no more classes.")
            self.batch_size = most
        tested = {"validate": self.val_set.labels, "test": self.query_set.labels}
        require_classes(self.train_set.labels, tested, self.batch_size, self.images_per_class)

    @property
    def plain_train_set(self) -> ImageDataset:
        """The training images with the transform of the evaluation, after `setup()`."""
        return self.train_set.part(torch.arange(len(self.train_set)), self.query_set.transform)

    def train_dataloader(self) -> ClassBalancedLoader:
        """Return the resumable loader of class-balanced training batches."""
        self.setup()
        self._require(self.train_set, "train")
        self._fit_batch()
        sampler = ClassBalancedSampler(
            self.train_set.labels,
            self.batch_size,
            self.images_per_class,
            self.seed,
            self.batches_per_epoch,
            same_every_epoch=getattr(self.trainer, "overfit_batches", 0) > 0,
        )
        return ClassBalancedLoader(self._as_loaded(self.train_set), sampler, self._workers(), self._on_gpu())

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return the loader of the validation classes; an empty list, which Lightning skips, if there are none."""
        self.setup()
        return self._eval_loader(self.val_set) if len(self.val_set) else []

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return one loader if every test image is both query and gallery, else that of the query, then the gallery."""
        self.setup()
        self._require(self.query_set, "query")
        self._require(self.gallery_set, "gallery")
        if self.gallery_set is self.query_set:
            return self._eval_loader(self.query_set)
        return [self._eval_loader(self.query_set), self._eval_loader(self.gallery_set)]

    def predict_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Return the loaders of `test_dataloader`."""
        return self.test_dataloader()

    def _as_loaded(self, images: ImageDataset) -> ImageDataset:
        """Return images as loaders read them: without the normalisation, if it follows on the device."""
        transform = pixel_transform(images.transform, self, self.normalize_on_device)
        return images if transform is None else images.with_transform(transform)

    def _eval_loader(self, images: ImageDataset) -> DataLoader[Any]:
        images = self._as_loaded(images)
        return DataLoader(
            images,
            batch_size=self.eval_batch_size,
            collate_fn=images.collate,
            num_workers=self._workers(),
            pin_memory=self._on_gpu(),
            persistent_workers=self._workers() > 0,
        )

    def _workers(self) -> int:
        """Return the number of worker processes per loader."""
        if self.num_workers is not None:
            return self.num_workers
        return default_workers(1 if self.trainer is None else self.trainer.num_devices)  # of this machine

    def _require(self, images: ImageDataset, role: str) -> None:
        if not len(images):
            found = ", ".join(count.in_words(role) for role, count in self.counts.items()) or "nothing"
            raise ValueError(f"{type(self).__name__} has no {role} images, but {found}. Check its splits.")

    def _on_gpu(self) -> bool:
        """Return whether batches go to a GPU. For a run on the CPU, pinning memory would start a GPU without need."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def count_problems(self) -> list[Problem]:
        """Return where the numbers of images and classes are other than published; nothing, where none are."""
        return []

    def verify(self) -> list[Problem]:
        """Open every image of the data set, and return those that are missing or damaged.

        It reads every file whole, with as many threads as there are workers; a large data set takes its time.
        """
        self.setup()
        count = len(self._all_images)
        with ThreadPool(max(1, self._workers())) as threads:
            reasons = threads.imap(self._reason_not_to_open, range(count), chunksize=16)
            counted = tqdm(reasons, f"{type(self).__name__}: opening images", count, delay=1, unit="image")
            found = zip(self._all_images.paths, counted, strict=True)
            return [Problem(shown(path), reason) for path, reason in found if reason]

    def _reason_not_to_open(self, position: int) -> str | None:
        if not is_utf8(self._all_images.paths[position]):
            return "expected a name in UTF-8, without which it cannot be written into tables; rename the file or folder"
        try:
            self._all_images.open(position)
        except OSError as error:
            return str(error.__cause__ or error)
        return None
