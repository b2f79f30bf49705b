"""Every packaged configuration has a header that `memdml configs` reads, and trains."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from support.pictures import draw_archive

from lightning_memdml import data
from lightning_memdml.cli import main
from lightning_memdml.config_merging import merge_arguments
from lightning_memdml.packaged_configs import FOLDER, config_names, describe_configs, find_config, read_header

_spec = importlib.util.spec_from_file_location("trees", Path(__file__).parent / "data/trees.py")
trees = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trees)

REPOSITORY = Path(__file__).parents[1]
CONFIGS = sorted(FOLDER.glob("*.yaml"))
SMALL = "--data.batch_size=8 --data.images_per_class=2 --data.num_workers=0 --data.val_fraction=0.2"
SHORT = "--trainer.accelerator=cpu --trainer.max_steps=2 --trainer.val_check_interval=2 --trainer.log_every_n_steps=1"


def image_folder(path: Path, classes: int = 14, images: int = 3) -> None:
    """A folder of tiny PNG files for each class."""
    for index in range(classes * images):
        file = path / f"class{index // images}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), (17 * (index // images), 80, 5 * index)).save(file)


def configs_of(config: Path) -> list[str]:
    """The configurations that the command of a header names, in their order."""
    command = shlex.split(read_header(config).command)
    return [name for option, name in pairwise(command) if option == "--config"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda file: file.stem)
def test_no_option_is_set_twice(config: Path) -> None:
    """YAML takes the last of two equal keys without a word."""

    def check(node: yaml.Node) -> None:
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            assert len(keys) == len(set(keys)), f"a key of {keys} is repeated"
        for child in node.value if isinstance(node.value, list) else ():
            for part in child if isinstance(child, tuple) else (child,):
                check(part)

    check(yaml.compose(config.read_text()))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda file: file.stem)
def test_header_has_command_hardware_cost_and_expected_result(config: Path) -> None:
    header = read_header(config)
    names = configs_of(config)
    assert names[-1] == config.stem
    assert shlex.split(header.command)[:2] == ["memdml", "fit"]
    # One that lies on top of another has no data of its own.
    has_data = ["data" in yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) for name in names]
    assert has_data == [True, *[False] * (len(names) - 1)]
    assert all(text.endswith(".") for text in (header.summary, header.hardware, header.cost, header.expected))
    for result in re.findall(r"experiments/results/\S+\.\w+", header.expected):
        assert (REPOSITORY / result).is_file()


def test_a_configuration_without_a_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bare.yaml").write_text("# Trains. Cost: none.\nseed_everything: 0\n")
    with pytest.raises(
        ValueError, match=r"^Expected bare\.yaml to start with a comment of the form `# SUMMARY Command: "
    ):
        read_header(tmp_path / "bare.yaml")


def test_every_configuration_is_listed_with_cost_and_expectation() -> None:
    listed = " ".join(describe_configs().split())
    for name in config_names():
        assert f"{name} {read_header(FOLDER / f'{name}.yaml').summary} Cost: " in listed
    assert "Cost: about 40 seconds. Expected: Recall@1 of 68.3 on new characters" in listed


def test_a_local_file_comes_before_a_packaged_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("glyphs_memory") == FOLDER / "glyphs_memory.yaml"
    Path("glyphs_memory").write_text("seed_everything: 1")
    assert find_config("glyphs_memory") == Path("glyphs_memory")


@pytest.mark.parametrize("source", ["seed_everything: 1", "{}", "nowhere.yaml", "a: 1\nb: 2\n"])
def test_text_and_other_files_are_left_to_the_parser(source: str) -> None:
    assert find_config(source) is None


@pytest.mark.parametrize("source", ["glyph_memory", "experiments/glyphs_memory.yaml"])
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_an_unknown_name_gets_the_nearest_one(command: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["memdml"])
    with pytest.raises(SystemExit) as stopped:
        main([command, "--config", source])
    assert stopped.value.code == (
        "error: Expected a file or the name of a packaged configuration as --config but got "
        f"'{source}'. Did you mean 'glyphs_memory'? `memdml configs` describes them: {', '.join(config_names())}."
    )


def test_a_configuration_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs", "glyphs_memory"])
    assert capsys.readouterr().out == (FOLDER / "glyphs_memory.yaml").read_text()


@pytest.mark.filterwarnings("ignore:.*Scores are not comparable")
@pytest.mark.filterwarnings("ignore:Expected `start_step` below the 2 optimiser steps")
@pytest.mark.parametrize(
    ("config", "precision"),
    [*((config, "32-true") for config in CONFIGS), (FOLDER / "sop_xbm.yaml", "bf16-mixed")],
    ids=lambda value: getattr(value, "stem", value),
)
def test_configuration_trains(
    config: Path, precision: str, tmp_path: Path, glyph_cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps on tiny data of its own kind, in place of ResNet-50 with a small network; all else is as it stands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["memdml"])
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # which a run sets
        monkeypatch.setenv(name, "0")
    names = configs_of(config)
    name = yaml.safe_load((FOLDER / f"{names[0]}.yaml").read_text())["data"]["class_path"]
    if name == "GlyphDataModule":
        own = f"--data.num_classes=20 --data.cache_dir={glyph_cache}"
    elif name == "TableDataModule":
        draw_archive(tmp_path / "tiny.npz")
        own = f"--data.path={tmp_path / 'tiny.npz'} --data.image_size=33"
    elif name == "FolderDataModule":
        image_folder(tmp_path / "tiny")
        own = f"--data.root={tmp_path / 'tiny'} --data.image_size=33"
    else:
        own = f"--data.root={trees.TREES[name](tmp_path / 'tree')}"
        if name != "Omniglot":  # a small network, and no weights, which would have to be downloaded
            own += " --data.image_size=33 --model.weights=null"
            own += "" if config.stem == "googlenet_512" else " --model.backbone=mobilenet_v3_small"
    own += f" --trainer.precision={precision} --trainer.enable_progress_bar=false"
    main(["fit", *(f"--config={name}" for name in names), *f"{SMALL} {SHORT} {own}".split()])
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["global_step"] == 2
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_every_benchmark_has_a_configuration_with_its_recall_levels() -> None:
    """The levels that papers report, in the configuration as in the data module."""
    found = set()
    for config in CONFIGS:
        said = yaml.safe_load(config.read_text())
        name = said.get("data", {}).get("class_path")
        if name in trees.TREES:
            found.add(name)
            assert tuple(said["model"]["k"]) == getattr(data, name).recall_levels, config.name
    assert found == set(trees.TREES)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_a_long_run_without_validation_writes_checkpoints_to_resume_from(config: Path) -> None:
    """Lightning writes them after a validation, or, without `check_val_every_n_epoch`, not before the end."""
    said = yaml.safe_load(config.read_text())
    if said.get("data", {}).get("init_args", {}).get("val_fraction") != 0:
        return
    first = said["trainer"]["callbacks"][0]
    assert first["class_path"] == "ModelCheckpoint"
    assert first["init_args"]["every_n_train_steps"] <= said["trainer"]["max_steps"] / 5


@pytest.mark.parametrize(
    ("line", "shrinks"),
    [
        ("--config photos", True),
        (f"--config {FOLDER}/glyphs_memory.yaml", True),
        ("--config photos --data TableDataModule", True),
        ("--config photos --data.images_per_class 2", True),
        ("--config photos --data.batch_size 64", False),
        ("--config photos --data.init_args.batch_size=64", False),
        ("--config photos --config mine.yaml", False),
        ("--config mine.yaml --config photos", True),
        ("--config mine.yaml", False),
        ("--config run.yaml", True),
        ("--config run.yaml --data.batch_size 64", False),
        ("--config run.yaml --config mine.yaml", False),
        ("--data FolderDataModule", False),  # nothing is set, and the default shrinks by itself
    ],
)
def test_batches_of_a_packaged_configuration_shrink_and_those_of_the_user_do_not(
    line: str, shrinks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder: dict[str, Any] = {"class_path": "FolderDataModule", "init_args": {"batch_size": 16}}
    Path("mine.yaml").write_text(yaml.safe_dump({"data": folder}))
    folder["init_args"] |= {"shrink_batch": True}  # as a run of `photos` saves it
    Path("run.yaml").write_text(yaml.safe_dump({"data": folder}))
    merged = merge_arguments(line.split(), {"data": {"class_path": "GlyphDataModule"}})
    options = yaml.safe_load(merged[merged.index("--config") + 1])["data"].get("init_args", {})
    assert options.get("shrink_batch", False) is shrinks


def benchmark(*names: str) -> dict[str, Any]:
    """The model of merged configurations."""
    (text,) = [part for part in merge_arguments([f"--config={name}" for name in names], {}) if part != "--config"]
    return yaml.safe_load(text)


def test_the_published_setting_of_xbm_is_in_its_configurations() -> None:
    for name in ("sop_xbm", "in_shop_xbm"):
        found = benchmark(name)
        model, (_, callback) = found["model"], found["trainer"]["callbacks"]
        assert callback == {"class_path": "MemoryCallback", "init_args": {"size": 55000, "start_step": 1000}}
        assert (model["pooling"], model["head_init"], model["embedding_dim"]) == ("maximum", "kaiming", 128)
        assert model["optimizer"] == {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-4, "weight_decay": 5e-4}}
        assert model["loss"] == {"class_path": "ContrastiveLoss", "init_args": {"margin": 0.5}}
        assert model["memory_includes_batch"] is True
        assert model["memory_excludes_own_image"] is model["batch_excludes_own_image"] is False
        assert (found["trainer"]["max_steps"], found["data"]["init_args"]["batch_size"]) == (35000, 64)


def test_configurations_on_top_of_others_change_what_they_name() -> None:
    below, above = benchmark("sop_memory"), benchmark("sop_memory", "rate_3e4")
    assert above["model"].pop("optimizer")["init_args"] == {"lr": 3e-4, "weight_decay": 5e-4}
    assert (above["model"].pop("pooling"), above["model"].pop("head_init")) == (None, "default")
    for name in ("optimizer", "pooling", "head_init"):
        del below["model"][name]
    assert above == below
    model = benchmark("sop_xbm", "googlenet_512")["model"]
    assert (model["backbone"], model["embedding_dim"], model["pooling"]) == ("googlenet", 512, None)
    assert model["head_init"] == "kaiming"
