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
from lightning_memdml.deploy.trained import load_learner
from lightning_memdml.inference.sources import data_of
from lightning_memdml.run_folders import without_foreign_files
from lightning_memdml.runs import CONFIG_IN_CHECKPOINT, read_checkpoint
from lightning_memdml.trust import UntrustedFileError

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
    "network of timm that is downloaded": ("model.backbone", "timm:hf-hub:someone/network"),
    "network of timm at an address": ("model.backbone", "timm:https://example.org/network"),
    "network of timm in a folder": ("model.backbone", "timm:local-dir:stranger"),
}


@pytest.mark.parametrize("command", ["test", "index", "score", "export --formats [torch]", "weight-curves"])
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


@pytest.mark.parametrize("command", ["test", "index", "score", "export --formats [torch]", "weight-curves"])
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


@pytest.mark.filterwarnings("ignore:Trusted .* to build and run")
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


@pytest.mark.parametrize("url", ["http://a.b/c.ckpt", "s3://a/c.ckpt", "file:///tmp/c.ckpt", "memory://c.bin"])
@pytest.mark.parametrize("command", ["test", "fit", "predict --config mine.yaml", "index", "weight-curves"])
def test_a_checkpoint_elsewhere_is_refused_before_any_work(
    command: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["memdml"])
    with pytest.raises(SystemExit, match=rf"^error: Expected a checkpoint on this machine but got {url}"):
        main([*command.split(), "--ckpt_path", url])


class Pickled:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("built"),)


@pytest.mark.parametrize("name", ["evil.ckpt", "evil.pt", "evil.bin", "evil"])
def test_pickled_code_never_runs_whatever_the_suffix(name: str, forge: Forge) -> None:
    forge("model.k", [1])
    torch.save({**torch.load("forged.ckpt", weights_only=True), "x": Pickled()}, name)
    Path("mine.yaml").write_text(read_checkpoint("forged.ckpt")[CONFIG_IN_CHECKPOINT])
    for options in ("", "--config mine.yaml"):
        with pytest.raises(SystemExit, match="it is damaged, or holds code"):
            main(["test", *options.split(), "--ckpt_path", name])
    with pytest.raises(ValueError, match="it is damaged, or holds code"):
        MetricLearner.load_from_checkpoint(name)
    assert not Path("built").exists()


def test_the_recipe_of_lightning_is_checked_too(forge: Forge) -> None:
    """A checkpoint of weights alone has no configuration, and an old one may hide its recipe under older keys."""
    forge("model.memory_loss", OBJECT)
    checkpoint = torch.load("forged.ckpt", weights_only=True)
    del checkpoint[CONFIG_IN_CHECKPOINT]
    torch.save(checkpoint, "weights.ckpt")
    with pytest.raises(UntrustedFileError, match=r"Expected model.memory_loss in weights.ckpt"):
        MetricLearner.load_from_checkpoint("weights.ckpt")
    for key in ("hparams", "module_arguments"):
        hidden = {**checkpoint, key: checkpoint["hyper_parameters"], "hyper_parameters": {}}
        torch.save(hidden, "hidden.ckpt")
        with pytest.raises((TypeError, ValueError)):
            MetricLearner.load_from_checkpoint("hidden.ckpt")
    torch.save({**checkpoint, "hyper_parameters": {"embedding_dim": 10**9}}, "huge.ckpt")
    with pytest.raises(UntrustedFileError, match=r"Expected model.embedding_dim in huge.ckpt"):
        MetricLearner.load_from_checkpoint("huge.ckpt", backbone="resnet18", loss=torch.nn.Identity())
    assert not Path("built").exists()


def test_a_checkpoint_names_no_files_to_remove_but_those_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / "inner").mkdir(parents=True)
    ours, linked, elsewhere = folder / "ours.ckpt", folder / "linked.ckpt", tmp_path / "mine.ckpt"
    for file in (ours, elsewhere, folder / "notes.txt"):
        file.touch()
    linked.symlink_to(elsewhere)
    foreign = [
        str(path) for path in (folder, folder / "inner", linked, elsewhere, folder / "notes.txt", "s3://a/b.ckpt")
    ]
    for path in [*foreign, str(ours)]:
        state = {
            "best_model_path": path, "last_model_path": path, "kth_best_model_path": path, "best_k_models": {path: 1.0},
        }  # fmt: skip
        without_foreign_files({"callbacks": {"ModelCheckpoint{}": state}}, folder / "last.ckpt")
        kept = path == str(ours)
        assert state["best_model_path"] == (path if kept else "")
        assert state["last_model_path"] == (path if kept else "")
        assert state["best_k_models"] == ({path: 1.0} if kept else {})


def test_a_log_folder_with_other_files_is_not_overwritten(forge: Forge) -> None:
    forge("model.k", [1])
    Path("home/mine").mkdir(parents=True)
    for name in ("config.yaml", "hparams.yaml", "metrics.csv"):
        Path("home/mine", name).write_text("mine")
    logger = "--trainer.logger.save_dir home --trainer.logger.name mine --trainer.logger.version"
    with pytest.raises(SystemExit, match="Expected an empty folder or a run for the log but got home/mine"):
        main(["test", "--ckpt_path", "forged.ckpt", *logger.split(), ""])
    assert {path.read_text() for path in Path("home/mine").iterdir()} == {"mine"}


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
