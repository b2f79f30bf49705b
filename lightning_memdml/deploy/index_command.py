"""`memdml index`: embed images with a trained network, and build an index of them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule

from lightning_memdml.cli_messages import ArgumentParser
from lightning_memdml.data.paths import require_utf8
from lightning_memdml.deploy.damaged_images import damaged_images, offer_to_skip, without_skipped
from lightning_memdml.deploy.embedding import PROGRESS, embed_to_file
from lightning_memdml.deploy.trained import data_config_of, file_digest, load_learner, refuse_without
from lightning_memdml.inference.sources import (
    FromFile,
    NamedImages,
    Part,
    absolute_paths,
    data_of,
    images_at,
    input_transform,
    part_of,
    tensor_shape,
)
from lightning_memdml.retrieval.index import EmbeddingIndex, IndexedImages, build_index
from lightning_memdml.retrieval.index_folder import require_replaceable, staged_folder
from lightning_memdml.retrieval.index_kinds import OLD_NAMES, IndexKind, index_kinds, make_index_kind
from lightning_memdml.whitening import Whitening

TRAINING = "training"  # folder of the embeddings of the training images, as long as they are needed
DESCRIPTION = """\
Embed images with a trained network, and build an index of them.

  memdml index --ckpt_path runs/latest/checkpoints/last.ckpt
  memdml index --ckpt_path last.ckpt --source my/images --output runs/my_index
  memdml index --ckpt_path last.ckpt --source catalogue.csv --kind ivf --nprobe 16
  memdml index --ckpt_path last.ckpt --flip --whiten

Without --source, it indexes the gallery of the checkpoint's own test set (--images names another part). Of a folder it
takes all images, at any depth. It resumes after an interruption. At the end it prints how many of the exact neighbours
the index finds."""


def index(arguments: list[str]) -> None:
    """Run `memdml index` with what follows it on the command line."""
    _refuse_old_options(arguments)
    parser = ArgumentParser(prog="memdml index", description=DESCRIPTION)
    parser.add_function_arguments(index_images, as_group=False, skip={"data", "kind"})
    parser.add_subclass_arguments(
        LightningDataModule,
        "data",
        required=False,
        help="Where the images come from, if not from the checkpoint's own data.",
    )
    groups: Any = parser.groups
    groups["data"].title = "Where the images come from"
    options = _add_kind_arguments(parser)
    given = parser.parse_args(arguments).as_dict()
    given.pop("config", None)
    chosen = {option: value for option in options if (value := given.pop(option)) is not None}
    index_images(**{**given, "kind": make_index_kind(given["kind"], chosen)})


def _refuse_old_options(arguments: Sequence[str]) -> None:
    for argument in arguments:
        old = argument.partition("=")[0].removeprefix("--")
        if argument.startswith("--") and old in OLD_NAMES:
            raise ValueError(f"Expected `--{OLD_NAMES[old]}` but got `--{old}`, its name in version 0.1. Rename it.")


def _add_kind_arguments(parser: ArgumentParser) -> list[str]:
    """Add `--kind` and the options of every kind, and return the names of the options."""
    kinds = index_kinds()
    summaries = (f"{name}: {str(kind.__doc__).splitlines()[0]}" for name, kind in kinds.items())
    parser.add_argument("--kind", default="flat", help=" ".join(summaries))
    owners: dict[str, dict[str, list[str]]] = {}  # option -> description -> kinds
    for name, kind in kinds.items():
        for field in fields(kind):
            default = "" if field.default is None else f" Default: {field.default}."
            described = f"{_description(kind, field.name)}{default}"
            owners.setdefault(field.name, {}).setdefault(described, []).append(name)
    for option, descriptions in owners.items():
        described = " ".join(f"{', '.join(names)}: {text}" for text, names in descriptions.items())
        parser.add_argument(f"--{option}", type=int | None, default=None, help=described)
    return list(owners)


def _description(kind: type[IndexKind], option: str) -> str:
    """Return the description of an option in the docstring of a kind."""
    found = re.search(rf"^ +{option}: (.+?)(?=^ +\w+: |^\s*$|\Z)", str(kind.__doc__), re.MULTILINE | re.DOTALL)
    return "" if found is None else " ".join(found[1].split())


def index_images(
    ckpt_path: str,
    source: str | None = None,
    images: Part = "gallery",
    data: dict[str, Any] | None = None,
    output: str = "runs/index",
    device: str = "cpu",
    kind: IndexKind | None = None,
    trust: bool = False,
    skip_damaged: bool = False,
    flip: bool = False,
    whiten: bool = False,
    whiten_dim: int | None = None,
    shrinkage: float = 0.5,
) -> EmbeddingIndex:
    """Embed images with a trained network, and build an index of them in a folder.

    Args:
        ckpt_path: A checkpoint of `memdml fit`, or of a learner trained or saved in Python.
        source: A folder of images, or a table or archive as `TableDataModule` reads it, instead of the checkpoint's
            data. The images are prepared as the test images are.
        images: Which images of the data module, if there is no `source`: gallery, query, val or train.
        data: Class path and arguments of another data module.
        output: Folder of the index; an index there is replaced when the new one is finished.
        device: Where the network runs, `cpu` or `cuda`; on `cuda`, faiss trains the index there too.
        kind: Kind of index: `flat` (exact, the default), `ivf`, `hnsw` or `pq`. `--help_all` lists their options.
        trust: Let the checkpoint build and run whatever it names: only if you trust its author.
        skip_damaged: Leave out images that are missing or damaged, and list them. All images are opened once more.
        flip: Average the embedding of each image with that of its mirrored copy; a search then does the same.
        whiten: Whiten (PCA) the embeddings on the training images; a search then does the same.
        whiten_dim: Dimensions that whitening keeps; by default all.
        shrinkage: How far whitening moves the covariance towards the identity, in [0, 1).

    Raises:
        FileNotFoundError: If there is no such source.
        OSError: If an image is missing or damaged, the disk is full, or another process writes to `output`.
        ValueError: If the checkpoint or the device cannot be used, `output` is something other than an index, or an
            option is set that needs another one.
    """
    refuse_without("whiten", whiten, index_images, whiten_dim=whiten_dim, shrinkage=shrinkage)
    folder = Path(output).expanduser()
    require_replaceable(folder)
    about: dict[str, Any] = {
        "ckpt_path": str(Path(ckpt_path).resolve()),
        "source": None if source is None else str(Path(source).expanduser().resolve()),
        "images": images,
        "data": data or data_config_of(ckpt_path, trust=trust),
        "flip": flip,
    }
    learner, about["sha256"] = load_learner(ckpt_path, device, trust=trust), file_digest(ckpt_path)
    trust = trust or data is not None  # what the command line names is the user's own
    module = data_of(about["data"], str(ckpt_path) if data is None else "--data", trust=trust)
    about["data"] = absolute_paths(about["data"], module)
    about["tensor_shape"] = tensor_shape(module)
    chosen = indexed_images(about, trust=trust)
    training = part_of(module, "train") if whiten else None
    if skip_damaged:
        about["skipped"] = damaged_images(chosen.images, *([] if training is None else [training.images]))
        chosen = without_skipped(chosen, about["skipped"])
        training = None if training is None else without_skipped(training, about["skipped"])
    require_utf8([*chosen.images.paths, *dict.fromkeys(chosen.classes)])
    workers = min(8, os.cpu_count() or 1) if module.num_workers is None else module.num_workers
    embed: Any = partial(
        embed_to_file,
        learner,
        checkpoint=about["sha256"],
        flip=flip,
        batch_size=module.eval_batch_size,
        num_workers=workers,
        device=device,
    )
    with staged_folder(folder, resume=True) as staged:
        with offer_to_skip("index"):
            whitening = None
            if training is not None:
                known = embed(training.images, staged / TRAINING)
                whitening = Whitening.fit(torch.from_numpy(known), whiten_dim, shrinkage)
            rows = embed(chosen.images, staged, whitening=whitening)
        named = IndexedImages(chosen.images.paths, chosen.images.labels.tolist(), chosen.classes)
        built = build_index(rows, named, kind, about=about, device=device, progress=True)
        built.whitening = whitening  # the rows are whitened already
        classes = len(set(chosen.classes))
        print(f"{len(built):,} images of {classes:,} classes, {built.kind.kind()} index: {built.measure()}")
        built.write_all_but_embeddings(staged)
        shutil.rmtree(staged / TRAINING, ignore_errors=True)
        (staged / PROGRESS).unlink()
    print(f"    {folder}")
    if chosen.images.has_pictures:
        print(f"Next: memdml search IMAGE... --index {folder}")
    return built


def indexed_images(about: dict[str, Any], *, trust: bool = False) -> NamedImages:
    """Return the images of an index.

    Args:
        about: What `memdml index` keeps with the index.
        trust: Let it build whatever it names, also what is not on the closed list.
    """
    module = data_of(about["data"], trust=trust)
    if about["source"] is None:
        chosen = part_of(module, about["images"])
    else:
        chosen = images_at(about["source"], FromFile(input_transform(module), about["tensor_shape"]))
    return without_skipped(chosen, about.get("skipped"))
