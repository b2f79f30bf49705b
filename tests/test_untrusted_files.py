"""A checkpoint or an index of a stranger builds networks and data, and runs nothing else."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_memdml import MetricLearner
from lightning_memdml.cli import main
from lightning_memdml.deploy.trained import data_of, load_learner
from lightning_memdml.runs import CONFIG_IN_CHECKPOINT, read_checkpoint
from lightning_memdml.trust import UntrustedFileError, allowed_config, build

Forge = Callable[[str, Any], None]
RunIn = Callable[[Path], AbstractContextManager[None]]
FIT = """fit --model.backbone=SmallConvNet --model.backbone.width=4 --model.embedding_dim=8
    --model.loss=DirectWeightLoss
    --data.num_classes=20 --data.batch_size=8 --data.images_per_class=2 --data.val_fraction=0
    --trainer.accelerator=cpu --trainer.max_steps=1 --trainer.enable_progress_bar=false"""
LAST = "runs/memdml/version_0/checkpoints/last.ckpt"
STRANGER = """
from pathlib import Path
import torch

def touch(name: str = "built"):
    Path(name).touch()
    return torch.nn.Identity()

class Callable_:
    def __init__(self, name: str = "built"):
        Path(name).touch()
    def __call__(self, values):
        return values

class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(784, 4, bias=False))
    num_features = 4

def network(name: str) -> torch.nn.Module:
    return touch(name)

def hard(similarity):
    return similarity.clamp(min=0)
"""
SHELL = {"class_path": "os.system", "init_args": {"command": "touch built"}}
FUNCTION = {"class_path": "stranger.touch", "init_args": {"name": "built"}}
NETWORK = {"class_path": "stranger.network", "init_args": {"name": "built"}}
CODE = {
    "class_path": "torch.fx.graph_module.reduce_graph_module",
    "init_args": {"body": {"_code": ""}, "import_block": "open('built', 'w').close()"},
}
OBJECT = {"class_path": "stranger.Callable_", "init_args": {"name": "built"}}
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, run_in: RunIn) -> dict[str, Any]:
    """What an honest checkpoint holds."""
    folder = tmp_path_factory.mktemp("honest")
    with run_in(folder):
        main(FIT.split())
    return torch.load(folder / LAST, weights_only=True)


@pytest.fixture
def forge(trained: dict[str, Any], tmp_path: Path, glyph_cache: str, monkeypatch: pytest.MonkeyPatch) -> Forge:
    """Writes a checkpoint whose configuration says something else, and lies in the folder of the user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LIGHTNING_MEMDML_CACHE", glyph_cache)
    monkeypatch.setattr(sys, "argv", ["memdml"])
    Path("stranger.py").write_text(STRANGER)
    Path("stranger.yaml").write_text(yaml.safe_dump(SHELL))

    def forge(key: str, value: Any) -> None:
        checkpoint = deepcopy(trained)
        config = yaml.safe_load(checkpoint[CONFIG_IN_CHECKPOINT])
        first, *inner, last = key.split(".")
        for place in (config[first], *([checkpoint["hyper_parameters"]] if first == "model" else [])):
            for name in inner:
                place = place[name]
            place[last] = value
        checkpoint[CONFIG_IN_CHECKPOINT] = yaml.safe_dump(config)
        torch.save(checkpoint, "forged.ckpt")

    yield forge
    sys.modules.pop("stranger", None)


HOSTILE = {
    "function as a loss": ("model.memory_loss", SHELL),
    "function of a module there": ("model.memory_loss", FUNCTION),
    "callable object as a loss": ("model.memory_loss", OBJECT),
    "in a text": ("model.memory_loss", json.dumps(SHELL)),
    "in an escaped text": ("model.memory_loss", json.dumps(SHELL).replace("class", r"\u0063lass")),
    "in a file beside it": ("model.memory_loss", "stranger.yaml"),
    "function as an optimizer": ("model.optimizer", FUNCTION),
    "function of torch that runs a text, and returns a module": ("model.memory_loss", CODE),
    "the same as a network": ("model.backbone", CODE),
    "function of one's own that returns a module": ("model.backbone", NETWORK),
    "deep in a loss": ("model.loss.init_args.negative", SHELL),
    "as a transform": ("data.init_args.test_transform", SHELL),
    "as a transform in a text": ("data.init_args.test_transform", json.dumps(OBJECT)),
    "as a transform in a file": ("data.init_args.test_transform", "stranger.yaml"),
    "deep in a transform": (
        "data.init_args.test_transform",
        {"class_path": "torchvision.transforms.Compose", "init_args": {"transforms": [SHELL]}},
    ),
    "in a list of transforms": (
        "data.init_args.test_transform",
        {"class_path": "torchvision.transforms.v2.Compose", "init_args": {"transforms": [OBJECT]}},
    ),
    "as data": ("data.class_path", "stranger.touch"),
    "as a network": ("model.backbone", FUNCTION),
}


@pytest.mark.parametrize("command", ["test", "index", "export --formats [torch]", "weight-curves"])
@pytest.mark.parametrize(("key", "value"), HOSTILE.values(), ids=HOSTILE)
def test_nothing_else_is_built(key: str, value: Any, command: str, forge: Forge) -> None:
    forge(key, value)
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--ckpt_path", "forged.ckpt"])
    assert stop.value.code not in (0, None)
    assert not Path("built").exists()


def test_no_callback_is_built_from_a_function(forge: Forge) -> None:
    forge(
        "trainer.callbacks",
        [{"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"setup": SHELL}}],
    )
    with pytest.raises(SystemExit):
        main(["test", "--ckpt_path", "forged.ckpt"])
    assert not Path("built").exists()


def test_the_refusal_names_what_it_refused(forge: Forge) -> None:
    forge("model.memory_loss", OBJECT)
    expected = re.escape(
        "Expected model.memory_loss in forged.ckpt to be a loss of the closed list but got 'stranger.Callable_'. If "
        "you trust the maker of this file, pass `--trust` (in Python `trust=True`), which allows model.memory_loss = "
        "'stranger.Callable_'."
    )
    for command in ("test", "index"):
        with pytest.raises(SystemExit, match=f"^error: {expected}$"):
            main([command, "--ckpt_path", "forged.ckpt"])
    with pytest.raises(ValueError, match=f"^{expected}$"):
        MetricLearner.load_from_checkpoint("forged.ckpt")
    assert not Path("built").exists()
    assert "stranger" not in sys.modules, "nothing a refused file names is imported"


@pytest.mark.parametrize("command", ["test", "index", "export --formats [torch]", "weight-curves"])
def test_the_user_may_trust_a_file_and_is_told_what_that_built(command: str, forge: Forge) -> None:
    forge("model.memory_loss", OBJECT)
    with pytest.warns(UserWarning, match=r"^Trusted forged.ckpt to build and run model.memory_loss = 'stranger.Call"):
        main([*command.split(), "--ckpt_path", "forged.ckpt", "--trust"])
    assert Path("built").exists()


def test_an_index_is_trusted_no_more_than_a_checkpoint(forge: Forge) -> None:
    forge("model.k", [1])
    main(["index", "--ckpt_path", "forged.ckpt", "--output", "index"])
    file = Path("index/index.json")
    content = json.loads(file.read_text())
    content["about"]["data"]["init_args"]["test_transform"] = SHELL
    file.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=r"Expected data.test_transform in index to be a transform of the closed list"):
        main(["search", "stranger.py", "--index", "index"])
    assert not Path("built").exists()


def test_networks_and_functions_of_the_user_are_built_by_trust(forge: Forge, trained: Any) -> None:
    forge("model.loss.init_args.negative", "stranger.hard")
    with pytest.raises(ValueError, match=r"which allows model.loss.negative = 'stranger.hard'"):
        load_learner("forged.ckpt")
    assert load_learner("forged.ckpt", trust=True).loss.negative.__name__ == "hard"
    weights = trained["state_dict"]
    changed = {name: value for name, value in weights.items() if "backbone" not in name}
    own = {"model.backbone.1.weight": torch.zeros(4, 784), "model.head.weight": torch.zeros(8, 4)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(trained, "state_dict", {**changed, **own})
        forge("model.backbone", {"class_path": "stranger.Net"})
        learner = MetricLearner.load_from_checkpoint("forged.ckpt", trust=True)
        assert type(learner.model.backbone).__name__ == "Net"


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


def test_what_the_user_says_is_not_restricted(forge: Forge) -> None:
    forge("model.k", [1])
    config = yaml.safe_load(read_checkpoint("forged.ckpt")[CONFIG_IN_CHECKPOINT])
    config["model"]["memory_loss"] = OBJECT
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    main(["test", "--config", "mine.yaml", "--ckpt_path", "forged.ckpt", "--trainer.limit_test_batches=1"])
    assert Path("built").exists()


def test_two_threads_do_not_open_the_boundary_for_each_other() -> None:
    """Nothing of the process is changed while a file is read, so that threads cannot meet."""
    hostile = {"class_path": "GlyphDataModule", "init_args": {"test_transform": OBJECT}}
    barrier, found = threading.Barrier(2, timeout=60), []

    def read() -> None:
        for _ in range(50):
            barrier.wait()
            try:
                data_of(hostile)
            except UntrustedFileError:
                found.append("refused")
            else:
                found.append("built")

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["refused"] * 100


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(2)])
def test_a_file_that_holds_something_else_is_no_checkpoint(
    content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["memdml"])
    file = tmp_path / "list.ckpt"
    torch.save(content, file)
    for command in ("test", "index"):
        with pytest.raises(
            SystemExit, match=rf"Expected a checkpoint but .*list.ckpt holds a {type(content).__name__}"
        ):
            main([command, "--ckpt_path", str(file)])
