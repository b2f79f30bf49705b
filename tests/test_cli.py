"""The command line: what it runs, what a run leaves behind, and what it builds."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from PIL import Image
from support.children import run_python
from support.command_line import LOSS, NET, QUIET, TINY, Command

from lightning_memdml import ContrastiveLoss, DirectWeightLoss, GlyphDataModule, MetricLearner, __version__
from lightning_memdml.cli import main
from lightning_memdml.commands import COMMANDS
from lightning_memdml.deploy.predictions import read_embeddings
from lightning_memdml.lightning_cli import MemdmlCLI

RUN = Path("runs/memdml/version_0")
LAST = RUN / "checkpoints/last.ckpt"


@pytest.fixture
def build(memdml: Command) -> Callable[[str], MemdmlCLI]:
    """Builds what a command line says, and runs nothing."""
    return lambda line: MemdmlCLI(args=line.split(), run=False)


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def logged(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------ what a run leaves behind


def test_fit_leaves_configuration_log_and_checkpoint_in_a_folder_of_its_own(
    memdml: Command, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        assert memdml(TINY) is None  # a console script exits with what `main` returns
    assert not [str(warning.message) for warning in recwarn if "args" in str(warning.message)]
    for version in (0, 1):
        folder = RUN.with_name(f"version_{version}")
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["model"]["memory_loss"]["init_args"]["margin"] == 0.7
        assert config["data"]["init_args"]["num_classes"] == 20
        assert (folder / "checkpoints/last.ckpt").is_file()
        rows = logged(folder)
        assert [row["step"] for row in rows if row["train/memory_loss"]] == ["0", "1", "2"]
        assert 0 <= float(rows[-1]["val/map_at_r"]) <= 1
    assert f"memdml test --ckpt_path {LAST}" in caplog.text


def test_rerun_from_the_saved_configuration_is_the_same_run(memdml: Command) -> None:
    memdml(TINY)
    memdml(f"fit --config {RUN}/config.yaml")
    again = RUN.with_name("version_1")
    assert logged(RUN) == logged(again)
    first, second = weights_of(LAST), weights_of(again / "checkpoints/last.ckpt")
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert (RUN / "config.yaml").read_text() == (again / "config.yaml").read_text()


def test_checkpoint_alone_is_enough_to_test_validate_and_predict(
    memdml: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], glyph_cache: str
) -> None:
    """Also after it was moved away from its run."""
    memdml(TINY)
    moved = tmp_path / "elsewhere.ckpt"
    LAST.rename(moved)
    (RUN / "config.yaml").unlink()
    learner = MetricLearner.load_from_checkpoint(moved)
    glyphs = GlyphDataModule(num_classes=20, cache_dir=glyph_cache)
    quiet = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (expected,) = quiet.test(learner, glyphs, verbose=False)
    capsys.readouterr()

    memdml(f"test --ckpt_path {moved}")
    names = {"Recall@1": "recall_at_1", "Recall@10": "recall_at_10"}
    names |= {"MAP@R": "map_at_r", "R-precision": "r_precision"}
    rows = [f"  {name:11}  {100 * expected[f'test/{score}']:>6.1f} %" for name, score in names.items()]
    # Recalls among 100 and 1,000 of 96 images are 100 %, so they are left out.
    assert capsys.readouterr().out.splitlines() == ["Test classes, 96 queries", *rows]
    memdml(f"validate --ckpt_path={moved}")
    assert capsys.readouterr().out.startswith("Validation classes, 24 queries\n  Recall@1 ")
    memdml(f"predict --ckpt_path {moved}")
    memdml(f"predict --ckpt_path {moved} --file_format npy")
    batches = quiet.predict(learner, glyphs)
    embeddings, labels, indices = (
        torch.cat([batch[name] for batch in batches]) for name in ("embeddings", "labels", "indices")
    )
    for file in ("version_3/embeddings.parquet", "version_4/embeddings.npy"):
        written, columns = read_embeddings(RUN.parent / file)
        assert torch.equal(written, embeddings)
        assert columns == {
            "path": [glyphs.query_set.paths[index] for index in indices],
            "label": labels.tolist(),
            "class": [glyphs.classes[label] for label in labels],
            "index": indices.tolist(),
        }


def test_command_line_wins_over_the_configuration_in_the_checkpoint(
    memdml: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    memdml(TINY)
    capsys.readouterr()
    memdml(f"test --ckpt_path {LAST} --model.k=[3] --data.train_fraction=0.5")
    table = capsys.readouterr().out
    assert "  Recall@3 " in table
    assert "  Recall@1 " not in table
    assert f"{0.5 * 20 * 12:.0f} queries" in table  # half of the characters, 12 pictures each


def test_checkpoint_alone_is_enough_to_go_on_training(memdml: Command) -> None:
    memdml(TINY)
    memdml(f"fit --ckpt_path {LAST} --trainer.max_epochs 2")
    memdml(TINY.replace("max_epochs=1", "max_epochs=2"))
    resumed, whole = (RUN.with_name(f"version_{version}") for version in (1, 2))
    assert logged(resumed) == logged(whole)[-len(logged(resumed)) :]
    one, other = weights_of(resumed / "checkpoints/last.ckpt"), weights_of(whole / "checkpoints/last.ckpt")
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_checkpoint_rebuilds_nested_losses_without_code(memdml: Command) -> None:
    memdml(TINY)
    torch.load(LAST, weights_only=True)
    learner = MetricLearner.load_from_checkpoint(LAST, weights_only=True)
    assert learner.memory_loss.margin == 0.7
    assert learner.loss.margin == 0.5
    assert all(torch.equal(value, weights_of(LAST)[key]) for key, value in learner.state_dict().items())


def test_weights_a_training_started_from_are_not_needed_to_test_it(memdml: Command, tmp_path: Path) -> None:
    backbone = MemdmlCLI(args=f"{NET} --model.loss=ContrastiveLoss".split(), run=False).model.model.backbone
    torch.save(backbone.state_dict(), tmp_path / "first.pth")
    memdml(f"{TINY} --model.weights {tmp_path / 'first.pth'}")
    (tmp_path / "first.pth").unlink()
    memdml(f"test --ckpt_path {LAST}")
    assert MetricLearner.load_from_checkpoint(LAST).model.backbone.num_features == backbone.num_features


@pytest.mark.usefixtures("offline_wandb")
def test_runs_of_wandb_keep_their_configurations_apart(memdml: Command) -> None:
    for margin in (0.61, 0.62):
        memdml(
            f"{TINY} --trainer.logger WandbLogger --trainer.logger.offline true --trainer.logger.save_dir runs "
            f"--trainer.logger.project tiny --model.loss.margin {margin}"
        )
    configs = [yaml.safe_load(file.read_text()) for file in Path("runs/tiny").glob("*/config.yaml")]
    assert sorted(config["model"]["loss"]["init_args"]["margin"] for config in configs) == [0.61, 0.62]
    assert len(list(Path("runs/tiny").glob("*/checkpoints/last.ckpt"))) == 2
    records = [file.read_bytes() for file in Path("runs/wandb").glob("offline-run-*/run-*.wandb")]
    assert len(records) == 2
    for record in records:  # metrics and the whole configuration, data included
        assert all(name in record for name in (b"train/memory_loss", b"val/map_at_r", b"num_classes"))
    margins = [re.findall(rb'"margin": ?(0\.6[12])', record) for record in records]  # some versions write a space
    assert sorted(sorted(set(found)) for found in margins) == [[b"0.61"], [b"0.62"]]


def test_without_a_logger_no_file_of_the_user_is_overwritten(memdml: Command) -> None:
    Path("config.yaml").write_text("mine")
    memdml(f"{TINY} --trainer.logger false")
    assert Path("config.yaml").read_text() == "mine"
    memdml("test --ckpt_path checkpoints/last.ckpt")


def test_nothing_is_written_where_checkpoints_are_turned_off(memdml: Command) -> None:
    memdml(f"{TINY} --trainer.enable_checkpointing false")
    assert not list(Path("runs").rglob("*.ckpt"))
    memdml(f"{TINY} --trainer.fast_dev_run true")
    assert not list(Path().rglob("*.ckpt"))


# ------------------------------------------------------------------ what can be said on the command line and in YAML


def picture_folder(root: Path, classes: int = 8, images: int = 3) -> None:
    for index in range(classes * images):
        file = root / f"class{index % classes}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 20), (30 * (index % classes), 10 * index, 90)).save(file)


def test_folder_of_images_from_the_command_line_alone(memdml: Command) -> None:
    picture_folder(Path("pictures"))
    memdml(
        "fit --data FolderDataModule --data.root pictures --data.image_size 16 --data.num_workers 0 "
        "--data.val_fraction 0 --data.batch_size 4 --data.images_per_class 2 --model.backbone SmallConvNet "
        "--model.backbone.in_channels 3 "
        f"--model.backbone.width 4 --model.loss MultiSimilarityLoss --trainer.max_steps 2 {QUIET}"
    )
    assert LAST.is_file()


def test_yaml_names_the_class_and_the_command_line_the_file(build: Callable[[str], MemdmlCLI]) -> None:
    Path("table.yaml").write_text(
        "data: {class_path: TableDataModule, init_args: {path: of_the_author.npz, image_size: 33}}\n"
        "model: {backbone: SmallConvNet, loss: {class_path: ContrastiveLoss, init_args: {margin: 0.3}}}\n"
    )
    cli = build("--config table.yaml --data.path mine.npz --data.num_workers 3")
    assert (Path(cli.datamodule.path).name, cli.datamodule.image_size, cli.datamodule.num_workers) == (
        "mine.npz",
        33,
        3,
    )
    assert cli.model.loss.margin == 0.3


def test_nested_classes_are_built_from_short_names(build: Callable[[str], MemdmlCLI]) -> None:
    cli = build(
        f"{NET} --model.loss HybridLoss --model.loss.positive ContrastiveLoss "
        "--model.loss.negative MultiSimilarityLoss --model.loss.negative.beta 40 "
        "--model.memory_loss DirectWeightLoss --model.memory_loss.positive Constant "
        "--model.memory_loss.negative Power --model.memory_loss.negative.power 3 --trainer.callbacks+=MemoryCallback "
        "--trainer.callbacks.size=512 --trainer.callbacks+=LearningRateMonitor"
    )
    assert cli.model.loss.negative.beta == 40
    assert isinstance(cli.model.memory_loss, DirectWeightLoss)
    assert cli.model.memory_loss.negative.power == 3
    assert [type(callback).__name__ for callback in cli.trainer.callbacks[:2]] == [
        "MemoryCallback",
        "LearningRateMonitor",
    ]
    assert cli.trainer.callbacks[0].memory.size == 512


def test_optimizer_and_scheduler_come_from_the_command_line(build: Callable[[str], MemdmlCLI]) -> None:
    cli = build(
        f"{NET} {LOSS} --model.optimizer SGD --model.optimizer.lr 0.3 --model.optimizer.momentum 0.8 "
        "--model.backbone_lr 0.03 --model.lr_scheduler CosineAnnealingLR --model.lr_scheduler.T_max 10 "
        "--model.lr_scheduler_interval epoch"
    )
    configured = cli.model.configure_optimizers()
    assert [group["lr"] for group in configured["optimizer"].param_groups] == [0.3, 0.03]
    assert configured["optimizer"].defaults["momentum"] == 0.8
    assert configured["lr_scheduler"]["scheduler"].T_max == 10
    assert configured["lr_scheduler"]["interval"] == "epoch"


def test_another_class_keeps_what_was_set_and_starts_from_its_own_defaults(
    build: Callable[[str], MemdmlCLI], caplog: pytest.LogCaptureFixture
) -> None:
    """By itself jsonargparse would hand on the defaults that both classes have, too."""
    Path("base.yaml").write_text(
        "model: {backbone: SmallConvNet, loss: {class_path: ContrastiveLoss, init_args: {margin: 0.77}},\n"
        "        memory_loss: {class_path: DirectWeightLoss, init_args: {negative: {class_path: Threshold, init_args: "
        "{threshold: 0.77, above: false}}}}}\n"
        "data: {class_path: GlyphDataModule, init_args: {num_classes: 50, batch_size: 12, image_size: 28}}\n"
    )
    with caplog.at_level("INFO"):
        cli = build(
            "--config base.yaml --model.loss TripletLoss --model.memory_loss.negative Power --model.optimizer SGD "
            "--data FolderDataModule --data.root x"
        )
    assert cli.model.loss.margin == 0.77
    assert cli.model.memory_loss.negative.threshold == 0.77
    assert cli.model.configure_optimizers().defaults["weight_decay"] == 0.0  # AdamW's is 0.01
    assert cli.datamodule.image_size == 224  # that of the glyphs is 28, and it was only named, not chosen
    assert cli.datamodule.batch_size == 12
    assert [record.message for record in caplog.records if " instead of " in record.message] == [
        "model.loss: TripletLoss instead of ContrastiveLoss keeps margin.",
        "model.memory_loss.negative: Power instead of Threshold keeps threshold and drops above.",
        "data: FolderDataModule instead of GlyphDataModule keeps batch_size and drops num_classes.",
    ]
    cli = build("--config base.yaml --model.loss ContrastiveLoss")
    assert cli.model.loss.margin == 0.77  # the same class keeps its options


def test_later_configurations_win_and_a_class_may_change_between_them(build: Callable[[str], MemdmlCLI]) -> None:
    Path("one.yaml").write_text("model.backbone: SmallConvNet\nmodel.loss: {class_path: ContrastiveLoss}\n")
    Path("two.yaml").write_text("model: {optimizer: {class_path: AdamW, init_args: {lr: 1e-2, weight_decay: 0.3}}}\n")
    Path("three.yaml").write_text("model: {optimizer: SGD, loss: {init_args: {margin: 0.4}}}\n")
    cli = build("--config one.yaml --config two.yaml --config=three.yaml --model.optimizer.momentum 0.5")
    assert cli.model.loss.margin == 0.4
    defaults = cli.model.configure_optimizers().defaults
    assert {name: defaults[name] for name in ("lr", "weight_decay", "momentum")} == {
        "lr": 0.01, "weight_decay": 0.3, "momentum": 0.5,
    }  # fmt: skip


def test_losses_of_pytorch_metric_learning_and_short_names_live_together(build: Callable[[str], MemdmlCLI]) -> None:
    pytest.importorskip("pytorch_metric_learning", reason="its losses are accepted, not needed")
    from pytorch_metric_learning import losses  # whose names are the same

    cli = build(
        f"{NET} --model.loss ContrastiveLoss --model.memory_loss pytorch_metric_learning.losses.ContrastiveLoss"
    )
    assert type(cli.model.loss) is ContrastiveLoss
    assert type(cli.model.memory_loss) is losses.ContrastiveLoss


def test_torchvision_and_timm_backbones_are_named(build: Callable[[str], MemdmlCLI]) -> None:
    pytest.importorskip("timm", reason="timm is an optional source of backbones")
    cli = build("--model.backbone resnet18 --model.loss ContrastiveLoss")
    assert cli.model.model.head.in_features == 512
    Path("timm.yaml").write_text(
        "model: {loss: ContrastiveLoss, backbone: {class_path: timm.create_model, "
        "init_args: {model_name: test_resnet}, dict_kwargs: {num_classes: 0}}}\n"
    )
    cli = build("--config timm.yaml")
    assert cli.model(torch.zeros(2, 3, 32, 32)).shape == (2, 128)


# ------------------------------------------------------------------ help, and real processes


def test_help_shows_the_commands_and_the_docstrings(memdml: Command, capsys: pytest.CaptureFixture[str]) -> None:
    for line in (
        "--help",
        "fit --help_all",
        "fit --model.loss.help MultiSimilarityLoss",
        "fit --data.help FolderDataModule",
        "data --help",
        "--version",
    ):
        with pytest.raises(SystemExit) as stop:
            memdml(line)
        assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for sentence in (
        *(COMMANDS[name].help for name in ("fit", "validate", "test", "predict")),
        "memdml weight-curves",
        "Train a network. `memdml configs` lists what --config takes by name.",
        "memdml data check --data FolderDataModule",
        __version__,
        "memdml test --ckpt_path",
        "Weight of the memory term, at least 0",  # MetricLearner
        "lightning_memdml.MultiSimilarityLoss",
        "--model.loss.beta BETA",
        "Which classes train if `root` has no folder for each role",  # FolderDataModule
    ):
        assert sentence in said
    assert "torch.nn.Conv2d" not in said  # hundreds of modules would be backbones


def test_console_script_is_main() -> None:
    (script,) = entry_points(group="console_scripts", name="memdml")
    assert script.load() is main


def test_two_ranks_from_one_command(tmp_path: Path, glyph_cache: str) -> None:
    """Lightning starts the second process from the arguments of the first; both end with code 0.

    The callbacks of each rank must know the metric they monitor.
    """
    best = "--trainer.callbacks.monitor=val/map_at_r --trainer.callbacks.mode=max"
    both = f"--trainer.callbacks+=ModelCheckpoint {best} --trainer.callbacks+=EarlyStopping {best}"
    line = f"{TINY} --trainer.devices=2 --trainer.strategy=ddp {both}"
    run_python("-m", "lightning_memdml", *line.split(), cwd=tmp_path, env={"LIGHTNING_MEMDML_CACHE": glyph_cache})
    folder = tmp_path / RUN
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "hparams.yaml",
        "metrics.csv",
        "report.html",
    ]
    assert [row["step"] for row in logged(folder) if row["val/map_at_r"]] == ["2"]
    saved: dict[str, Any] = torch.load(tmp_path / LAST, weights_only=True)
    assert saved["global_step"] == 3
    assert len(saved["callbacks"]["MemoryCallback"]["memory"]["labels"]) == 40  # 3 steps of 2 ranks of 8 rows, cut
