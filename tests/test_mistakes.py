"""Mistakes that people make on the command line: each is answered by one sentence with a way out, and no traceback.

What was typed stands beside the whole message. `NET`, `FIT` and the like stand for the options below.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.command_line import Command

from lightning_memdml import (
    ContrastiveLoss,
    GalleryLogger,
    GlyphDataModule,
    MemoryCallback,
    MetricLearner,
    SmallConvNet,
)
from lightning_memdml.cli import main
from lightning_memdml.commands import COMMANDS
from lightning_memdml.packaged_configs import config_names

SHORT = {
    "NET": "--model.backbone=SmallConvNet --model.backbone.width=4 --model.embedding_dim=8",
    "QUIET": "--trainer.accelerator=cpu --trainer.enable_progress_bar=false --report=false",
    "GLYPHS": "--data.num_classes=20 --data.batch_size=8 --data.images_per_class=2 --data.batches_per_epoch=3",
}
SHORT["FIT"] = (
    f"fit {SHORT['NET']} --model.loss=ContrastiveLoss {SHORT['GLYPHS']} {SHORT['QUIET']} --trainer.max_epochs=1"
)
SHORT["FOLDER"] = (
    f"fit {SHORT['NET']} --model.backbone.in_channels=3 --model.loss=ContrastiveLoss {SHORT['QUIET']} "
    "--data=FolderDataModule --data.image_size=28 --data.num_workers=0 --data.batch_size=8 --data.images_per_class=2"
)
HERE = "<folder>"  # the working directory in a message
COMMAND_LIST = ", ".join(COMMANDS)
CONFIG_LIST = ", ".join(config_names())
SCORES = "val/recall_at_1, val/recall_at_10, val/recall_at_100, val/recall_at_1000, val/map_at_r, val/r_precision"

MISTAKES = {
    # commands
    "train --config photos": f"There is no command 'train'. Did you mean 'fit'? There are {COMMAND_LIST}.",
    "--config glyphs_memory fit": (
        "Expected a command before the option --config. Write `memdml fit --config ...`."
    ),
    "": f"Expected a command: {COMMAND_LIST}. `memdml --help` describes them.",
    "fit": (
        "Expected --model.backbone, --model.loss, on the command line or in a file given with --config. For example: "
        "`memdml fit --config glyphs_memory`."
    ),
    "FIT --data.root my/images": (
        "data: GlyphDataModule has no option 'root'. It is an option of FolderDataModule: `--data FolderDataModule "
        "--data.root ...`."
    ),
    "FIT --trainer.max_steps -5": (
        "Expected --trainer.max_steps of at least 0, or -1 for no limit, but got -5. Pass 1000."
    ),
    "FIT --trainer.val_check_interval 0.5 --trainer.check_val_every_n_epoch null": (
        "Expected --trainer.val_check_interval to be a number of steps but got a share of an epoch, which needs "
        "--trainer.check_val_every_n_epoch. Pass steps, such as 500, or --trainer.check_val_every_n_epoch 1."
    ),
    "test": (
        "Expected --model.backbone, --model.loss, on the command line or in a file given with --config, or a "
        "checkpoint of `memdml fit` as --ckpt_path."
    ),
    "study": "Expected CONFIG but got nothing. `memdml study --help` describes the options.",
    "study a.yaml --processes 0": (
        "Expected --processes of at least 1 but got 0. `memdml study --help` describes the options."
    ),
    "study a.yaml --time_limit soon": (
        "Expected --time_limit to be a number but got 'soon'. `memdml study --help` describes the options."
    ),
    "demo --seeds one": (
        "Expected --seeds to be a whole number but got 'one'. `memdml demo --help` describes the options."
    ),
    "configs photos --width 3": (
        "Expected no further options but got --width 3. `memdml configs --help` describes the options."
    ),
    "export": "Expected --ckpt_path, on the command line or in a file given with --config.",
    "score": (
        "Expected `--embeddings` or `--ckpt_path` but got neither. Pass a file of embeddings, such as `memdml predict` "
        "writes, or a checkpoint."
    ),
    "data chek": "Expected `memdml data check` but got `memdml data chek`. `memdml data check --help` describes it.",
    "data check": "Expected --data, on the command line or in a file given with --config.",
    "weight-curves": (
        "Expected a loss or a checkpoint but got neither. Pass `--loss ContrastiveLoss`, or `--ckpt_path FILE`."
    ),
    # configurations
    "fit --config photo": (
        "Expected a file or the name of a packaged configuration as --config but got 'photo'. Did you mean 'photos'? "
        f"`memdml configs` describes them: {CONFIG_LIST}."
    ),
    "fit --config indent.yaml": (
        "Expected YAML in indent.yaml but line 3, 'loss: ContrastiveLoss', does not fit: mapping values are not "
        "allowed here. Indent keys of one level alike, with spaces, and close all brackets."
    ),
    # names and values
    "FIT --model.loss Contrastve": "model.loss: There is no class 'Contrastve'. Did you mean 'ContrastiveLoss'?",
    "FIT --model.lss ContrastiveLoss": "There is no option '--model.lss'. Did you mean '--model.loss'?",
    "FIT --trainer.max_steps many": "trainer.max_steps: Expected int but got 'many'.",
    "FIT --trainer.max_epochs two": "trainer.max_epochs: Expected int but got 'two'.",
    "FIT --seed_everything abc": "seed_everything: Expected bool or int but got 'abc'.",
    "FIT --trainer.precision 8": (
        "trainer.precision: Expected one of 64, 32, 16, transformer-engine, transformer-engine-float16, 16-true, "
        "16-mixed, bf16-true, bf16-mixed, 32-true, 64-true, bf16 but got '8'. Pass one of these."
    ),
    "FIT --trainer.logger WandbLoger": "trainer.logger: There is no class 'WandbLoger'. Did you mean 'WandbLogger'?",
    "FIT --data.val_fraction 1.5": (
        "Expected `val_fraction`, a share of the training classes, in [0, 1) but got 1.5. Pass 0.1, for example."
    ),
    "FIT --model.optimizer.lr -1": (
        "Expected a learning rate of at least 0 but got -1.0. Pass --model.optimizer.lr 0.001, for example."
    ),
    "FIT --model.memory_weight -1": "Expected `memory_weight` of at least 0 but got -1.0. Pass 1, for example.",
    "FIT --trainer.callbacks+=MemoryCallback --trainer.callbacks.size=0": (
        "Expected `size` of the memory as a number of rows, at least 1, or as a share of the training images in "
        "(0, 1], but got 0. Pass 8192, for example."
    ),
    # modules in the working directory
    "fit NET --model.loss absent.Loss": (
        "model.loss: There is no module 'absent'. Put absent.py into the working directory, or install the package."
    ),
    "fit NET --model.loss broken.Loss": "model.loss: There is no module 'nothing_there'. Install it.",
    "fit --model.loss ContrastiveLoss --model.backbone my_net.Nett": (
        "Expected a class of the module 'my_net' as the backbone but got 'Nett'. Did you mean 'Net'?"
    ),
    "fit --model.loss ContrastiveLoss --model.backbone my_nett.Net": (
        "Expected a backbone in the module 'my_nett' but got No module named 'my_nett'. Put my_nett.py into the "
        "working directory, or install the package."
    ),
    "fit --model.loss ContrastiveLoss --model.backbone my_net.Net": (
        "Expected the backbone my_net.Net to be a torch.nn.Module, or a function that returns one, but it is neither. "
        "Derive the class from torch.nn.Module, or annotate what the function returns: `-> torch.nn.Module`."
    ),
    # losses and the memory
    "FIT --model.memory_loss ContrastiveLoss": (
        "Expected a memory, as `memory_loss` is set, but there is none. Pass "
        "`Trainer(callbacks=[MemoryCallback(size=8192)])`, or leave out what is set."
    ),
    "FIT --model.memory_weight 0.3 --model.memory_includes_batch true": (
        "Expected a memory, as `memory_weight` and `memory_includes_batch` are set, but there is none. Pass "
        "`Trainer(callbacks=[MemoryCallback(size=8192)])`, or leave out what is set."
    ),
    "FIT --model.loss torch.nn.TripletMarginLoss": (
        "Expected a loss of embeddings and labels but TripletMarginLoss takes other arguments. Pass --model.loss "
        "ContrastiveLoss, or another loss of this package or of pytorch-metric-learning."
    ),
    "FIT --model.loss torch.nn.CrossEntropyLoss --trainer.callbacks+=MemoryCallback": (
        "Expected a loss that compares with references against the memory but got CrossEntropyLoss, which takes none. "
        "Pass another one for the memory: `memory_loss=ContrastiveLoss()`, or `against_memory(self, ContrastiveLoss(), "
        "...)`."
    ),
    # the machine and the Trainer
    "FIT --trainer.accelerator gpu": (
        "Expected a GPU for --trainer.accelerator but torch finds none. Pass --trainer.accelerator cpu."
    ),
    "FIT --trainer.accelerator gpuu": (
        "Expected --trainer.accelerator to be one of cpu, gpu, cuda, mps, tpu, auto but got 'gpuu'. Did you mean 'gpu'?"
    ),
    "FIT --trainer.strategy ddpp": (
        "Expected --trainer.strategy to be one of auto, ddp, fsdp, deepspeed but got 'ddpp'. Did you mean 'ddp'?"
    ),
    "FIT --trainer.devices 0": (
        "Expected --trainer.devices to be a number of at least 1, or auto, but got '0'. Pass 1."
    ),
    "FIT --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val/map": (
        f"Expected a metric of the run as `monitor` but got 'val/map'. Did you mean 'val/map_at_r'? Validation gives "
        f"{SCORES}."
    ),
    "FIT --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.monitor=val/map": (
        f"Expected a metric of the run as `monitor` but got 'val/map'. Did you mean 'val/map_at_r'? Validation gives "
        f"{SCORES}."
    ),
    "FIT --trainer.val_check_interval 500": (
        "Expected --trainer.val_check_interval of at most the 3 batches of an epoch but got 500. Pass "
        "--trainer.check_val_every_n_epoch null, which counts steps across epochs."
    ),
    # images
    "FOLDER": "Expected --data.root, on the command line or in a file given with --config.",
    "FOLDER --data.root nowhere": (
        f"FolderDataModule looked for the folder {HERE}/nowhere, which does not exist; pass `root=`."
    ),
    "FOLDER --data.root pictures --data.batch_size 64": (
        "Expected at most 10 classes per batch but got batch_size=64 / images_per_class=2 = 32: of the classes "
        "10 train, 2 validate and 12 test. Pass batch_size=20 or less, or more images per class."
    ),
    "FOLDER --data.root pictures --data.batch_size 7": (
        "Expected `batch_size` to be a multiple of `images_per_class`, both positive, but got batch_size=7 and "
        "images_per_class=2. Pass batch_size=6 or 8."
    ),
    "fit --config glyphs_batch --data.num_classes 20 --data.batch_size 64 QUIET": (
        "Expected at most 10 classes per batch but got batch_size=64 / images_per_class=2 = 32: of the classes "
        "10 train, 2 validate and 8 test. Pass batch_size=20 or less, or more images per class."
    ),
    "freeze pictures out.txt": "Expected a file that ends in .npz as output but got out.txt. Pass features.npz.",
    # checkpoints and files
    "test --ckpt_path nowhere.ckpt": (
        "Expected a checkpoint that can be read but got nowhere.ckpt: there is no such file. Check the path."
    ),
    "test --ckpt_path damaged.ckpt": (
        "Expected a checkpoint that can be read but got damaged.ckpt: it is damaged, or holds code, which is never "
        "run. Pass another one."
    ),
    "test --ckpt_path pictures": (
        "Expected a checkpoint of `memdml fit` but pictures is a folder. Pass the file in it, such as "
        "runs/latest/checkpoints/last.ckpt."
    ),
    "search pictures/0/0.png": (
        "Expected an index in runs/index but there is no index.json. Make one with `memdml index`."
    ),
    "score --embeddings nothing.parquet": (
        "Expected embeddings but there is no file nothing.parquet. `memdml predict` writes it."
    ),
    "study nothing.yaml": "Expected a YAML file but there is no file nothing.yaml. Check the path.",
}  # fmt: skip
OF_A_RUN = {
    "fit --ckpt_path last.ckpt": (
        "Expected a checkpoint of an unfinished run but last.ckpt is at step 3, where this run ends. To go on, pass a "
        "larger --trainer.max_steps, such as 6, or a larger --trainer.max_epochs."
    ),
    "fit --ckpt_path last.ckpt --model.embedding_dim 16 --trainer.max_epochs 4": (
        "Expected a checkpoint of the same network but model.head.weight is (8, 128) in the checkpoint and (16, 128) "
        "here. Leave out the option that changes it, such as --model.embedding_dim or --model.backbone."
    ),
    "index --ckpt_path last.ckpt --source nowhere": (
        f"Expected a folder, or a table (.csv, .parquet, .npz), but got {HERE}/nowhere, which does not exist. Check "
        "the path."
    ),
    "test --ckpt_path last.ckpt --data.num_clases 3": (
        "data: GlyphDataModule has no option 'num_clases'. Did you mean 'num_classes'?"
    ),
}


def typed(line: str) -> str:
    return " ".join(SHORT.get(word, word) for word in line.split(" "))


def message(memdml: Command, line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed of a mistake, without the word `error` before it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        memdml(typed(line))
    assert stop.value.code not in (0, None)
    printed = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert printed.startswith("error: ")
    return printed.removeprefix("error: ").rstrip("\n").replace(str(Path.cwd()), HERE)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder of 24 classes, and files with mistakes."""
    for label in range(24):
        for number in range(3):
            file = tmp_path / f"pictures/{label}/{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30, 30), (10 * label, 80 * number, 9)).save(file)
    (tmp_path / "indent.yaml").write_text("model:\n  backbone: SmallConvNet\n   loss: ContrastiveLoss\n")
    (tmp_path / "broken.py").write_text("import nothing_there\n")
    (tmp_path / "my_net.py").write_text("class Net:\n    pass\n")
    (tmp_path / "damaged.ckpt").write_bytes(b"PK\x03\x04 half a file")
    return tmp_path


@pytest.fixture(scope="module")
def checkpoint(run_in: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of a finished run."""
    folder = tmp_path_factory.mktemp("run")
    with run_in(folder):
        main(typed("FIT").split())
    return folder / "runs/memdml/version_0/checkpoints/last.ckpt"


@pytest.mark.parametrize(("line", "expected"), MISTAKES.items())
@pytest.mark.filterwarnings("ignore:`max_epochs` was not set")
def test_a_mistake_is_answered_by_a_sentence(
    line: str, expected: str, workplace: Path, memdml: Command, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "path", [*sys.path, str(workplace)])
    for name in ("my_net", "broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert message(memdml, line, capsys) == expected
    if "monitor" not in line:  # which is read after the training
        assert not list(Path("runs").rglob("version_*")), "a run that failed leaves no folder"


@pytest.mark.parametrize(("line", "expected"), OF_A_RUN.items())
def test_a_mistake_with_a_checkpoint_is_answered_by_a_sentence(
    line: str, expected: str, checkpoint: Path, tmp_path: Path, memdml: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(checkpoint, tmp_path / "last.ckpt")
    assert message(memdml, line, capsys) == expected


@pytest.mark.parametrize(("logger", "library"), [("WandbLogger", "wandb"), ("TensorBoardLogger", "tensorboard")])
def test_a_logger_that_is_not_installed_is_named(
    logger: str, library: str, memdml: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Absent:
        def __bool__(self) -> bool:
            return False

        def __str__(self) -> str:
            return f"Requirement '{library}' not met. HINT: Try running `pip install -U '{library}'`"

    modules = {"wandb": "lightning.pytorch.loggers.wandb", "tensorboard": "lightning.fabric.loggers.tensorboard"}
    for name in ("_WANDB_AVAILABLE", "_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"{modules[library]}.{name}", Absent(), raising=False)
    assert message(memdml, f"FIT --trainer.logger {logger} --trainer.logger.save_dir runs", capsys) == (
        f"Expected {library} for {logger} but it is not installed. `pip install {library}`, or take another class for "
        "this option."
    )


def test_damaged_images_are_listed_and_left_out_of_an_index(
    checkpoint: Path, tmp_path: Path, memdml: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        file = tmp_path / f"glyphs/{number % 2}/{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (28, 28), 60 * number).save(file)
    (tmp_path / "glyphs/1/1.png").write_bytes(b"no picture")
    shutil.copy(checkpoint, tmp_path / "last.ckpt")
    refused = message(memdml, "index --ckpt_path last.ckpt --source glyphs", capsys)
    assert refused == (
        f"Cannot read the image {HERE}/glyphs/1/1.png (Expected a picture (JPEG, PNG, WEBP, TIFF, BMP, DIB, GIF, PPM, "
        "AVIF) but got a file that begins with b'no picture'. Replace it). "
        "To index the others, pass --skip_damaged true."
    )
    memdml("index --ckpt_path last.ckpt --source glyphs --skip_damaged true")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"skipped: {tmp_path}/glyphs/1/1.png: ")
    assert printed[1] == "1 of 4 images skipped."
    assert printed[2].startswith("3 images of 2 classes, flat index")
    memdml("search glyphs/0/0.png --ckpt_path last.ckpt --html found.html")  # the pictures of the index are found again
    assert Path("found.html").is_file()


def test_more_images_per_class_than_there_are_is_a_warning(memdml: Command) -> None:
    whole = (
        "^Expected training classes of at least images_per_class=30 images but the largest has 12: every batch repeats "
        "images. Pass images_per_class=12 or less.$"
    )
    with pytest.warns(UserWarning, match=whole):
        memdml(typed("FIT") + " --data.images_per_class 30 --data.batch_size 60")


def test_objects_are_printed_as_they_are_made(glyph_cache: str) -> None:

    assert repr(GalleryLogger(count=3)) == "GalleryLogger(count=3)"
    memory = "EmbeddingMemory(size=100, rows=0, dim=0, dtype=torch.float32, device='cpu')"
    assert repr(MemoryCallback(size=100, start_step=3)) == f"MemoryCallback(start_step=3, memory={memory})"
    learner = MetricLearner(SmallConvNet(width=4), ContrastiveLoss(margin=0.6), memory_weight=2.0)
    assert repr(learner).startswith(
        "MetricLearner(loss=ContrastiveLoss(margin=0.6), memory_weight=2.0): SmallConvNet, "
    )
    data = GlyphDataModule(num_classes=20, cache_dir=glyph_cache)
    assert str(data) == "GlyphDataModule, not set up"
