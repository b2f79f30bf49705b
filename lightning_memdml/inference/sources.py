"""The images of a command: a part of a data module, a folder or table, or single files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from lightning_memdml.data import HuggingFaceDataModule, Record, RetrievalDataModule, TableDataModule
from lightning_memdml.data.folders import image_records
from lightning_memdml.data.images import ImageDataset, OpenFiles, TensorImageDataset
from lightning_memdml.data.paths import local_path
from lightning_memdml.data.pictures import SUFFIXES, upright
from lightning_memdml.data.records import first_rows
from lightning_memdml.trust import allowed_config, build
from lightning_memdml.trust_sizes import limited_tensors

Part = Literal["gallery", "query", "val", "train"]


class NamedImages:
    """Images to embed, with the class name of each.

    Attributes:
        images: Map-style data set with the test transform.
        classes: Name of each image's class, `N` of them.
    """

    def __init__(self, images: ImageDataset, classes: Sequence[int | str]) -> None:
        self.images = images
        self.classes = [str(name) for name in classes]


def data_of(config: Any, source: str = "the index", *, trust: bool = False) -> RetrievalDataModule:
    """Build a data module from `class_path` and `init_args`; no image is opened.

    Args:
        config: The class path and its options.
        source: The file they come from, for errors.
        trust: Allow what is not on the closed list: the file is the user's own, or the user trusts its maker.

    Raises:
        ValueError: If it is not a `RetrievalDataModule`, which lists its images, or not on the closed list.
    """
    allowed = allowed_config({"data": config}, source, trust=trust)["data"]
    with limited_tensors(source, trust=trust):
        data = build(LightningDataModule, allowed)
    if not isinstance(data, RetrievalDataModule):
        raise ValueError(
            f"Expected a data module that is a RetrievalDataModule but got {type(data).__name__}; pass "
            "`--data FolderDataModule --data.root DIR`, or images with `--source`."
        )
    return data


def part_of(data: RetrievalDataModule, part: Part) -> NamedImages:
    """Return a set of a data module, with the test transform.

    Raises:
        ValueError: If the set is empty.
    """
    data.setup()
    images: ImageDataset = getattr(data, f"{part}_set")
    if not len(images):
        raise ValueError(
            f"Expected {part} images but {type(data).__name__} has none. Pass `--images` gallery, query, val or train."
        )
    images = images.part(torch.arange(len(images)), data.query_set.transform)
    return NamedImages(images, [data.classes[label] for label in images.labels.tolist()])


def images_at(source: str | Path, transform: Callable[[Any], Any]) -> NamedImages:
    """Return all images of a folder, or of a table or archive as `TableDataModule` reads them.

    Of a folder these are the images at any depth that are not hidden; their classes are those that `FolderDataModule`
    gives them. An image that is listed twice is taken once.

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If there is no image.
    """
    source = local_path(source, "source")
    if source.is_dir() and source.suffix.lower() != ".parquet":
        records: Sequence[Record] = image_records(source)
        opened: Any = None
    elif source.suffix.lower() in (".csv", ".parquet", ".npz"):
        table = TableDataModule(path=str(source))
        records = table.records()
        opened = table.images(records)
    else:
        there = "" if source.exists() else ", which does not exist"
        raise FileNotFoundError(
            f"Expected a folder, or a table (.csv, .parquet, .npz), but got {source}{there}. Check the path."
        )
    if not records:
        raise ValueError(f"Expected images in {source} but got none. Images end in {', '.join(sorted(SUFFIXES))}.")
    if opened is None or isinstance(opened, OpenFiles):
        records = [records[row] for row in dict.fromkeys(first_rows(records))]
        opened = OpenFiles(records)
    names = [record.label for record in records]
    number = {name: label for label, name in enumerate(dict.fromkeys(names))}
    labels = torch.tensor([number[name] for name in names])
    return NamedImages(ImageDataset(opened, [record.path for record in records], labels, transform), names)


def image_files(paths: Sequence[str], transform: Callable[[Any], Any]) -> ImageDataset:
    """Return image files as a data set of unknown classes.

    Raises:
        FileNotFoundError: If one of them does not exist.
    """
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"Expected an image file but there is no {path}. Check the path.")
    records = [Record(path, 0, "query") for path in paths]
    return ImageDataset(OpenFiles(records), list(paths), torch.zeros(len(paths), dtype=torch.long), transform)


def absolute_paths(config: Mapping[str, Any], data: RetrievalDataModule) -> dict[str, Any]:
    """Return the configuration of a data module with absolute paths, which hold from any folder.

    Args:
        config: Its class path and arguments, as they were written.
        data: The data module that was made of them.
    """
    given = config.get("init_args") or {}
    paths = {name: str(getattr(data, name)) for name in ("root", "path") if given.get(name) is not None}
    return {**config, "init_args": {**given, **paths}}


def input_transform(data: RetrievalDataModule) -> Callable[[Any], Any]:
    """Return what turns an opened image of this data into the network's input."""
    return data.default_test_transform() if data.test_transform is None else data.test_transform


def tensor_shape(data: RetrievalDataModule) -> list[int] | None:
    """Return the shape `[C, H, W]` of images, or `[V, F]` of features, that a data module holds as a tensor.

    It is None for a data module of image files. These are not set up, so that a network can be used on a machine
    without its training images.
    """
    opens_files = (RetrievalDataModule.images, TableDataModule.images, HuggingFaceDataModule.images)
    if type(data).images in opens_files:
        return None
    data.setup()
    return list(data.query_set.images.shape[1:]) if isinstance(data.query_set, TensorImageDataset) else None


class FromFile:
    """Prepares image files for a network: brings them to the channels, size and type of its training images.

    Args:
        transform: The test transform of the data module.
        shape: `[C, H, W]` of images that are held as a tensor; None for a data module of image files.

    Raises:
        ValueError: If the network was trained on features, which image files do not have.
    """

    def __init__(self, transform: Callable[[Any], Any], shape: Sequence[int] | None) -> None:
        if shape is not None and len(shape) != 3:
            raise ValueError(
                "Expected a network that was trained on images but this one was trained on features of them. Compute "
                "features of these images in the same way (`memdml freeze`), and pass `memdml index --data "
                "FeatureDataModule --data.path FILE`. To search that index, embed the features of the queries in a "
                "program: `load_index(folder).search(embeddings)`."
            )
        self.transform, self.shape = transform, shape

    def __call__(self, image: Image.Image | Tensor) -> Any:
        """Return the network's input."""
        if self.shape is None or isinstance(image, Tensor):
            return self.transform(image)
        channels, height, width = self.shape
        picture = upright(image).convert("L" if channels == 1 else "RGB").resize((width, height))
        return self.transform(functional.pil_to_tensor(picture))

    def __repr__(self) -> str:
        return f"FromFile({self.transform!r}, {self.shape})"
