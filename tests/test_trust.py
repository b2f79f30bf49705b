"""What a configuration from a file may name, tested as data: nothing here is built but two networks."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
import torch

from lightning_memdml.trust import UntrustedFileError, allowed_config, build, find_refused, read_yaml
from lightning_memdml.trust_table import DEFAULT_LOGGER

SHELL = {"class_path": "os.system", "init_args": {"command": "touch built"}}
# Where a file may name a class.
PLACES = (
    "model.backbone", "model.loss", "model.memory_loss", "model.memory_weight", "model.optimizer", "model.lr_scheduler",
    "data", "data.init_args.train_transform", "data.init_args.test_transform",
    "trainer.callbacks",
)  # fmt: skip


def nested(place: str, value: Any) -> dict[str, Any]:
    """A configuration that is otherwise right, with a value at a place."""
    config: dict[str, Any] = {
        "model": {"backbone": "SmallConvNet", "loss": "ContrastiveLoss"},
        "data": {"class_path": "GlyphDataModule", "init_args": {}},
        "trainer": {},
    }
    *inner, last = place.split(".")
    part = config
    for name in inner:
        part = part[name]
    part[last] = value
    return config


def test_a_network_may_be_made_by_a_function_of_torchvision() -> None:
    spec = {"class_path": "torchvision.models.resnet18", "init_args": {"num_classes": 3, "weights": "DEFAULT"}}
    allowed = allowed_config({"model": {"backbone": spec}}, "file")["model"]["backbone"]
    assert allowed["init_args"] == {"num_classes": 3, "weights": None}, "nothing is downloaded"
    assert build(torch.nn.Module, allowed).fc.out_features == 3


@pytest.mark.parametrize(
    "name", ["os.system", "torch.load", "torch.hub.load", "torch.jit.load", "subprocess.getoutput"]
)
def test_a_function_that_runs_what_it_is_given_is_named_nowhere(name: str) -> None:
    for place in PLACES:
        with pytest.raises(UntrustedFileError, match="of the closed list but got"):
            allowed_config(nested(place, {"class_path": name}), "file")


COMPOSE = "torchvision.transforms.v2.Compose"
IMAGE_FOLDER = {
    "class_path": "torchvision.datasets.ImageFolder",
    "init_args": {"root": "home", "is_valid_file": "os.remove"},
}


def transforms(*steps: Any, kind: str = COMPOSE) -> dict[str, Any]:
    return {"class_path": kind, "init_args": {"transforms": list(steps)}}


# One configuration of a hostile file each: what it says, and where. Every one is refused before anything is built.
REFUSED = {
    # Functions that are named as values, and called by what they are handed to.
    "names in Compose": ("data.init_args.test_transform", transforms("torch.flatten", "builtins.exec")),
    "names in the first Compose": (
        "data.init_args.test_transform",
        transforms("builtins.exec", kind="torchvision.transforms.Compose"),
    ),
    "names in RandomApply": (
        "data.init_args.train_transform",
        transforms("os.system", kind="torchvision.transforms.v2.RandomApply"),
    ),
    "names in RandomChoice": (
        "data.init_args.train_transform",
        transforms("os.system", kind="torchvision.transforms.v2.RandomChoice"),
    ),
    "two levels down": ("data.init_args.test_transform", transforms(transforms("numpy.ndarray.tobytes"))),
    "JSON in a list": ("data.init_args.test_transform", transforms(json.dumps(SHELL))),
    "Lambda": (
        "data.init_args.test_transform",
        {"class_path": "torchvision.transforms.v2.Lambda", "init_args": {"lambd": "builtins.exec"}},
    ),
    "module of torch": (
        "data.init_args.test_transform",
        transforms({"class_path": "torch.nn.ConstantPad1d", "init_args": {"padding": 1}}),
    ),
    "weight function by path": (
        "model.loss",
        {"class_path": "DirectWeightLoss", "init_args": {"negative": "builtins.print"}},
    ),
    "loss by path": ("model.loss", "builtins.print"),
    "ramp by path": ("model.memory_weight", "builtins.print"),
    "ramp by class": ("model.memory_weight", {"class_path": "functools.partial", "init_args": {"func": "os.system"}}),
    "LambdaLR": (
        "model.lr_scheduler",
        {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": "os.system"}},
    ),
    "LambdaCallback": (
        "trainer.callbacks",
        [{"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"setup": "os.system"}}],
    ),
    "ThroughputMonitor": (
        "trainer.callbacks",
        [{"class_path": "lightning.pytorch.callbacks.ThroughputMonitor", "init_args": {"batch_size_fn": "os.system"}}],
    ),
    "BackboneFinetuning": (
        "trainer.callbacks",
        [{"class_path": "lightning.pytorch.callbacks.BackboneFinetuning", "init_args": {"lambda_func": "os.system"}}],
    ),
    # Classes where a number belongs, and data sets as networks.
    "data set as a network": ("model.backbone", IMAGE_FOLDER),
    "data set as a device": (
        "model.backbone",
        {"class_path": "torch.nn.Linear", "init_args": {"in_features": 1, "device": IMAGE_FOLDER}},
    ),
    "class as a width": ("model.num_features", IMAGE_FOLDER),
    "class as recall levels": ("model.k", [IMAGE_FOLDER]),
    "class in a network": (
        "model.backbone",
        {"class_path": "SmallConvNet", "init_args": {"width": IMAGE_FOLDER}},
    ),
    "class in an optimiser": ("model.optimizer", {"class_path": "SGD", "init_args": {"lr": IMAGE_FOLDER}}),
    "class in a transform": (
        "data.init_args.test_transform",
        {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": SHELL}},
    ),
    "class in dict_kwargs": ("model.backbone", {"class_path": "SmallConvNet", "dict_kwargs": {"width": SHELL}}),
    "another module of the same class name": ("model.loss", "stranger.ContrastiveLoss"),
    "a package that begins alike": ("model.loss", "lightning_memdml_evil.ContrastiveLoss"),
    "a private class": ("model.optimizer", "torch.optim._multi_tensor.Thing"),
    "an abstract base": ("data.class_path", "lightning.LightningDataModule"),
    # Other spellings.
    "dotted key": ("model.loss", {"class_path": "DirectWeightLoss", "init_args": {"negative.class_path": "os.system"}}),
    "options beside the class": ("model.loss", {"class_path": "ContrastiveLoss", "margin": SHELL}),
    "list for a class": ("model.loss", [SHELL]),
    "key at the top": ("optimizer", SHELL),
    "text for all options": ("data.init_args", json.dumps({"test_transform": SHELL})),
    "text for the trainer": ("trainer", json.dumps({"callbacks": [SHELL]})),
    "file for a class": ("model.loss", "stranger.yaml"),
    "number for a class": ("data", 3),
    # Networks and paths.
    "URL as data": ("data", {"class_path": "FolderDataModule", "init_args": {"root": "http://a.b/c"}}),
    "bucket as data": ("data", {"class_path": "TableDataModule", "init_args": {"path": "s3://a/b.csv"}}),
    "share as data": ("data", {"class_path": "FolderDataModule", "init_args": {"root": r"\\host\share"}}),
    "hub of timm": (
        "model.backbone",
        {"class_path": "timm.create_model", "init_args": {"model_name": "hf-hub:evil/model"}},
    ),
    "URL as a network": ("model.backbone", "http://a.b/c"),
    "file name that leads out": (
        "trainer.callbacks",
        [{"class_path": "ModelCheckpoint", "init_args": {"filename": "../../mine"}}],
    ),
    "absolute file name": (
        "trainer.callbacks",
        [{"class_path": "ModelCheckpoint", "init_args": {"filename": "/home/mine"}}],
    ),
    "checkpoint of an exception": (
        "trainer.callbacks",
        [{"class_path": "lightning.pytorch.callbacks.OnExceptionCheckpoint", "init_args": {"dirpath": "x"}}],
    ),
    "strategy by path": ("trainer.strategy", "stranger.Strategy"),
    "accelerator by class": ("trainer.accelerator", SHELL),
    # Sizes.
    "huge picture": ("data.init_args.image_size", 30_000),
    "huge resize": (
        "data.init_args.test_transform",
        {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [10**6, 2]}},
    ),
    "huge embedding": ("model.embedding_dim", 1e9),
    "huge embedding in a text": ("model.embedding_dim", "1000000000"),
    "huge network": ("model.backbone", {"class_path": "SmallConvNet", "init_args": {"width": 100_000}}),
    "huge memory": ("trainer.callbacks", [{"class_path": "MemoryCallback", "init_args": {"size": 10**12}}]),
    "many processes": ("data.init_args.num_workers", 100_000),
    "long list": ("model.k", [1] * 100_000),
}


@pytest.mark.parametrize(("place", "value"), REFUSED.values(), ids=REFUSED)
def test_a_hostile_configuration_is_refused_as_data(place: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = nested(place, value)
    allowed_config(nested("model.embedding_dim", 8), "file")  # the rest of it is right
    monkeypatch.setitem(sys.modules, "stranger", None)  # importing it would be an error
    with pytest.raises(UntrustedFileError, match=r"^Expected .* but got .* `--trust` \(in Python `trust=True`\)"):
        allowed_config(config, "file")
    assert find_refused(config)


@pytest.mark.parametrize(
    ("place", "value", "kept"),
    [
        ("trainer.default_root_dir", "home", None),
        ("trainer.profiler", "advanced", None),
        ("trainer.plugins", [SHELL], None),
        ("trainer.logger", False, DEFAULT_LOGGER),
        ("trainer.logger", SHELL, DEFAULT_LOGGER),
        ("trainer.logger", {"class_path": "WandbLogger", "init_args": {"save_dir": "home"}}, DEFAULT_LOGGER),
        ("trainer.logger", [{"class_path": "TensorBoardLogger", "init_args": {"save_dir": "home"}}], DEFAULT_LOGGER),
        ("data.init_args.cache_dir", "home", None),
        ("data.init_args.pixel_cache", "home", None),
        ("data.init_args.download", True, False),
        ("model.weights", "https://a.b/c.pth", None),
    ],
)
def test_nothing_in_a_file_decides_what_is_written_or_downloaded(place: str, value: Any, kept: Any) -> None:
    part = allowed_config(nested(place, value), "file")
    for name in place.split("."):
        part = part[name]
    assert part == kept


@pytest.mark.parametrize("name", [".config", "../home", "/home", "a/b", ""])
def test_a_logger_names_a_folder_below_runs_only(name: str) -> None:
    options = {"save_dir": "home", "name": "mine", "version": ""}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": options}
    found = allowed_config(nested("trainer.logger", logger), "file")["trainer"]["logger"]["init_args"]
    assert found == {"save_dir": "runs", "name": "mine", "version": None}
    options["name"] = name
    with pytest.raises(UntrustedFileError):
        allowed_config(nested("trainer.logger", logger), "file")


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOMB, "but got anchors or aliases"),
        ("a: &a 1", "but got anchors or aliases"),
        ("a: &a {b: 1}\nc: {<<: *a}", "but got anchors or aliases"),
        ("[" * 500 + "]" * 500, "32 levels but got more"),
        ("{a: " * 40 + "1" + "}" * 40, "32 levels but got more"),
        ("- 1\n" * 200_000, "100,000 values"),
        ("a" * 3_000_000, "characters but got 3,000,000"),
        ("a: !!python/object/apply:os.system ['touch built']", "cannot be read"),
        ("a: [", "cannot be read"),
        (b"a: 1", "but got a bytes"),
    ],
    ids=["bomb", "anchor", "merge key", "lists", "mappings", "values", "long", "tag", "broken", "bytes"],
)
def test_yaml_in_a_file_is_plain_and_bounded(text: Any, expected: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^Expected the configuration in file to be plain YAML.*{re.escape(expected)}"
    ):
        read_yaml(text, "file")
