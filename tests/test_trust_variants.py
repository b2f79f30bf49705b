"""Further hostile configurations: other spellings, formats in names, deep and shared values, pickles in metadata."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lightning_memdml.data.table_files import read_parquet
from lightning_memdml.runs import config_of, read_checkpoint
from lightning_memdml.trust import UntrustedFileError, allowed_config, find_refused, read_yaml
from lightning_memdml.trust_sizes import tensors_in


def spec(class_path: Any, /, **options: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": options}


def config(place: str, value: Any) -> dict[str, Any]:
    part, key = place.split(".")
    if part == "data":
        return {"data": spec("FolderDataModule", **{"root": "images", key: value})}
    return {part: {key: value}}


def hybrid(depth: int) -> Any:
    loss: Any = "ContrastiveLoss"
    for _ in range(depth):
        loss = spec("HybridLoss", positive=loss, negative="ContrastiveLoss")
    return loss


RESNET = {"model_name": "resnet18"}
REFUSED: dict[str, tuple[str, Any]] = {
    # Spellings of class paths and options.
    "text in dict_kwargs": ("model.loss", {"class_path": "ContrastiveLoss", "dict_kwargs": {"margin": "os.system"}}),
    "class path in a list": ("model.loss", {"class_path": ["ContrastiveLoss"]}),
    "class path in a class path": ("model.loss", {"class_path": {"class_path": "ContrastiveLoss"}}),
    "no class path": ("model.loss", {"class_path": None}),
    "Cyrillic letter": ("model.loss", spec("Contr\u0430stiveLoss")),
    "full width letter": ("model.loss", spec("\uff23ontrastiveLoss")),
    "unseen space": ("model.loss", spec("ContrastiveLoss\u200b")),
    "line break": ("model.loss", spec("ContrastiveLoss\n")),
    "relative path": ("model.loss", spec("..os.system")),
    "constructor": ("model.loss", spec("lightning_memdml.losses.ContrastiveLoss.__init__")),
    "private option": ("model.loss", spec("ContrastiveLoss", __init__=1)),
    "private argument of the learner": ("model.__dict__", {}),
    "function of this package": ("model.loss", spec("lightning_memdml.cli.main")),
    "what a module of this package imports": ("model.loss", spec("lightning_memdml.runs.torch.load")),
    "a name of a million letters": ("model.loss", spec("A" * 10**6)),
    "digits of another script": ("model.embedding_dim", "\uff11\uff12"),
    "hexadecimal text": ("model.embedding_dim", "0x7fffffff"),
    "bytes": ("model.embedding_dim", b"1"),
    # Networks that are loaded from elsewhere.
    "torch.hub": ("model.backbone", spec("torch.hub.load", repo_or_dir="a/b", model="c")),
    "torch.load": ("model.backbone", spec("torch.load", f="x.pt")),
    "torch.jit.load": ("model.backbone", spec("torch.jit.load", f="x.pt")),
    "torch.package": ("model.backbone", spec("torch.package.PackageImporter", file_or_buffer="x")),
    "another function of torchvision": ("model.backbone", spec("torchvision.models.get_model", name="resnet18")),
    "detection": ("model.backbone", spec("torchvision.models.detection.fasterrcnn_resnet50_fpn")),
    "hub of timm, other spelling": ("model.backbone", "timm:hf_hub:a/b"),
    "path of timm": ("model.backbone", "timm:../x"),
    "line break of timm": ("model.backbone", "timm:resnet18\n"),
    "layer of timm": ("model.backbone", spec("timm.create_model", **RESNET, act_layer="os.system")),
    "checkpoint of timm": ("model.backbone", spec("timm.models.load_checkpoint")),
    # Optimisers, schedulers, metrics.
    "function as a rate": ("model.optimizer", spec("torch.optim.Adam", lr="os.system")),
    "functional optimiser": ("model.optimizer", spec("torch.optim.adam.adam")),
    "text as a schedule": ("model.lr_scheduler", spec("LambdaLR", lr_lambda="lambda step: 1")),
    "schedulers in a scheduler": ("model.lr_scheduler", spec("SequentialLR", schedulers=[spec("LambdaLR")])),
    "metric as a loss": ("model.loss", spec("torchmetrics.MetricTracker", metric="os.system")),
    # Formats in names of files.
    "attribute in a file name": ("trainer.callbacks", [spec("ModelCheckpoint", filename="{0.__init__.__globals__}")]),
    "attribute of a metric": ("trainer.callbacks", [spec("ModelCheckpoint", filename="{epoch.__class__}")]),
    "a file name of a gigabyte": ("trainer.callbacks", [spec("ModelCheckpoint", filename="{epoch:999999999}")]),
    "URL as a file name": ("trainer.callbacks", [spec("ModelCheckpoint", filename="s3://a/b")]),
    "way up after a metric": ("trainer.callbacks", [spec("ModelCheckpoint", filename="{epoch}/../../x")]),
    "drive of Windows": ("trainer.callbacks", [spec("ModelCheckpoint", filename="C:\\x")]),
    "private attribute as the encoder": ("trainer.callbacks", [spec("MemoryCallback", encoder="__class__.__init__")]),
    "line break in a log name": ("trainer.logger", spec("CSVLogger", save_dir="x", name="a\n")),
    # Data.
    "files through a web cache": ("data.root", "simplecache::http://a.b/c"),
    "transform that writes": ("data.test_transform", spec("torchvision.io.write_file", filename="x")),
    "function in a transform": (
        "data.test_transform", spec("torchvision.transforms.v2.SanitizeBoundingBoxes", labels_getter="os.system"),
    ),
    "deep losses": ("model.loss", hybrid(300)),
}  # fmt: skip


@pytest.mark.parametrize(("place", "value"), REFUSED.values(), ids=REFUSED)
def test_a_hostile_variant_is_refused_as_data(place: str, value: Any) -> None:
    with pytest.raises(UntrustedFileError, match=r"^Expected .* but got .*--trust"):
        allowed_config(config(place, value), "file")


@pytest.mark.parametrize(
    "filename",
    ["{epoch}-{step}", "best", "{epoch:02d}-{val/map_at_r:.2f}", "run 1/{step}", "{epoch}_{val/recall_at_1:.3f}"],
)
def test_honest_names_of_checkpoints_are_allowed(filename: str) -> None:
    assert not find_refused({"trainer": {"callbacks": [spec("ModelCheckpoint", filename=filename)]}})


@pytest.mark.parametrize(
    ("place", "options"),
    [
        ("model.backbone", {"pretrained_cfg": {"url": "http://a.b"}, "checkpoint_path": "/x", "pretrained": True}),
        ("trainer.logger", {"save_dir": "/etc", "name": "a", "version": "../../x"}),
        ("trainer.callbacks", {"dirpath": "/etc"}),
    ],
)
def test_what_is_not_taken_from_a_file_is_replaced(place: str, options: dict[str, Any]) -> None:
    made = {"model.backbone": "timm.create_model", "trainer.logger": "CSVLogger", "trainer.callbacks": "GalleryLogger"}
    value = spec(made[place], **options)
    allowed = allowed_config(config(place, [value] if place == "trainer.callbacks" else value), "file")
    kept = str(allowed)
    assert not any(text in kept for text in ("http", "/etc", "/x", "True"))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_sizes_that_are_no_numbers_do_not_pass_the_sum(number: float) -> None:
    data = {"data": spec("FolderDataModule", root="x", image_size=number, batch_size=number)}
    assert allowed_config(data, "file")["data"]["init_args"]["root"] == "x"  # the class refuses the number


@pytest.mark.parametrize(
    "text", ["a: " + "9" * 5000, "a: 2020-99-99", "? [1, 2]\n: 3", "a: 1\n---\nb: 2", "a: !!float x"]
)
def test_odd_yaml_names_the_file(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"^Expected the configuration in file to be plain YAML but it cannot be read: "
    ):
        read_yaml(text, "file")


def test_shared_and_endless_values_in_a_checkpoint_end(tmp_path: Path) -> None:
    """Pickled lists are shared, so that a few hundred bytes stand for more values than a machine can count."""
    shared: list[Any] = [1] * 10
    for _ in range(30):
        shared = [shared] * 10
    endless: list[Any] = []
    endless.append(endless)
    for name, value in {"shared": shared, "endless": endless}.items():
        options = {"loss": "ContrastiveLoss", "k": value, "_instantiator": "x"}
        torch.save({"state_dict": {}, "hyper_parameters": options}, tmp_path / f"{name}.ckpt")
        checkpoint = read_checkpoint(tmp_path / f"{name}.ckpt")
        with pytest.raises(UntrustedFileError, match="at most 100,000 values in 32 levels but got more"):
            config_of(checkpoint, "file")
    assert len(list(tensors_in([shared, {"a": torch.zeros(1)}, endless]))) == 1


class Pickled:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("built"),)


def test_pickles_in_the_metadata_of_a_table_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Pickled()),
    }
    fields = [pa.field("path", pa.string(), metadata=metadata), pa.field("label", pa.int64())]
    pq.write_table(
        pa.table([["a.png"], [1]], schema=pa.schema(fields, metadata={"pickle": pickle.dumps(Pickled())})), "t.parquet"
    )
    assert read_parquet(Path("t.parquet")).columns == {"path": ["a.png"], "label": [1]}
    np.savez("x.npz", feature=np.array([Pickled()], dtype=object), allow_pickle=True)
    from lightning_memdml.data import FeatureDataModule

    with pytest.raises(ValueError, match=r"x\.npz"):
        FeatureDataModule("x.npz").setup()
    assert not Path("built").exists()
