"""The error messages and hints of the command line."""

from __future__ import annotations

from argparse import ArgumentError
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from support.command_line import DATA, LOSS, MEMORY, NET, QUIET, TINY, Command, answer

from lightning_memdml import MetricLearner, PairLoss
from lightning_memdml.cli_messages import WORDING, ArgumentParser, find, readable
from lightning_memdml.commands import COMMANDS

WRONG_ON_THE_COMMAND_LINE = {
    "--model.loss Contrastve": "model.loss: There is no class 'Contrastve'. Did you mean 'ContrastiveLoss'?",
    "--model.loss lightning_memdml.ContrastivLoss": "Did you mean 'lightning_memdml.ContrastiveLoss'?",
    "--model.loss no_such_package.Loss": "There is no module 'no_such_package'.",
    "--model.loss SmallConvNet": "model.loss: The class 'SmallConvNet' does not belong here.",
    "--model.loss ContrastiveLoss --model.loss.margn 1": "ContrastiveLoss has no option 'margn'. Did you mean 'margi",
    "--model.loss ContrastiveLoss --model.loss.margin wide": "model.loss.margin: Expected float but got 'wide'.",
    "--model.loss DirectWeightLoss --model.loss.positive Expnential": "Did you mean 'Exponential'?",
    "--model.loss DirectWeightLoss --model.loss.positive Threshold --model.loss.positive.treshold 1": "'threshold'?",
    "--model.optimizer Adamm": "model.optimizer: There is no class 'Adamm'. Did you mean 'Adam'?",
    "--model.lr_scheduler CosineAnealingLR": "Did you mean 'CosineAnnealingLR'?",
    "--model.lr_scheduler_interval steps": "Expected one of step, epoch but got 'steps'. Did you mean 'step'?",
    "--model.lss ContrastiveLoss": "There is no option '--model.lss'. Did you mean '--model.loss'?",
    "--model.backbon resnet18": "Did you mean '--model.backbone'?",
    "--optimizer SGD": "Did you mean '--model.optimizer'?",
    "--trainr.max_steps 3": "Did you mean '--trainer.max_steps'?",
    "--trainer.max_steps many": "trainer.max_steps: Expected int but got 'many'.",
    "--trainer.callbacks+=MemoryCalback": "trainer.callbacks: There is no class 'MemoryCalback'. Did you mean 'MemoryC",
    "--trainer.callbacks+=MemoryCallback --trainer.callbacks.siz=5": "MemoryCallback has no option 'siz'. Did you",
    "--data GlyfDataModule": "data: There is no class 'GlyfDataModule'. Did you mean 'GlyphDataModule'?",
    "--data.num_clases 20": "data: GlyphDataModule has no option 'num_clases'. Did you mean 'num_classes'?",
    "--data FolderDataModule": "Expected --data.root",
    "--model.loss torch.nn.Linear": "model.loss: Expected a class that derives from PairLoss, or a function that retur",
    "--trainer.callbacks+=torch.nn.Linear": "Expected a class that derives from Callback, or a function that returns",
    "--qqqqqqqqqqqqqqqqqqqq 3": "There is no option '--qqqqqqqqqqqqqqqqqqqq'. `--help_all` lists all options.",
    "--model.optimizer Qqq": "model.optimizer: There is no class 'Qqq'. Write one of your own with its module: my_modu",
    "--model.loss ContrastiveLoss --model.loss.qqq 1": "ContrastiveLoss has no option 'qqq'. Options: backend, margin.",
    "--model.head qqq": "model.head: Expected one of linear, none but got 'qqq'. Pass one of these.",
    "--config nowhere.yaml": "config: File does not exist",
}


@pytest.mark.parametrize(("options", "expected"), WRONG_ON_THE_COMMAND_LINE.items())
def test_wrong_name_on_the_command_line(
    options: str, expected: str, memdml: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    said = answer(memdml, f"fit {NET} --model.loss ContrastiveLoss {options}", capsys)
    assert expected in said
    assert len(said.splitlines()) < 8


WRONG_IN_YAML = {
    "model.loss: {class_path: Contrastve}": "Did you mean 'ContrastiveLoss'?",
    "model.loss: {class_path: ContrastiveLoss, init_args: {margn: 1}}": "Did you mean 'margin'?",
    "model.backbone: {class_path: SmalConvNet}": "model.backbone: There is no class 'SmalConvNet'. Did you mean",
    "model.loss: {class_path: DirectWeightLoss, init_args: {negative: Powr}}": "model.loss.negative: There is no class",
    "model.embeding_dim: 3": "Did you mean '--model.embedding_dim'?",
    "model.optimizer: {class_path: torch.optim.Adamm}": "Did you mean 'torch.optim.Adam'?",
    "data: {class_path: GlyfDataModule}": "Did you mean 'GlyphDataModule'?",
    "data: {class_path: GlyphDataModule, init_args: {sed: 1}}": "Did you mean 'seed'?",
    "trainer.max_step: 3": "Did you mean '--trainer.max_steps'?",
    "trainer.callbacks: [{class_path: MemoryCalback}]": "Did you mean 'MemoryCallback'?",
    "trainer.callbacks: [{class_path: MemoryCallback, init_args: {siz: 3}}]": "Did you mean 'size'?",
    "model.backbone: null": "Expected --model.backbone, on the command line or in a file",
    "model: [": "Expected YAML in wrong.yaml but line 4, 'model: [', does not fit",
    "seed_everything: 1\nseed_everything: 2": "wrong.yaml, line 1: expected every key once but 'seed_everything' is",
    "data: {class_path: CUB200, class_path: InShop}": "wrong.yaml, line 3: expected every key once but 'class_path' is",
}


@pytest.mark.parametrize(("text", "expected"), WRONG_IN_YAML.items())
def test_wrong_name_in_yaml(text: str, expected: str, memdml: Command, capsys: pytest.CaptureFixture[str]) -> None:
    required = {"model.backbone": "SmallConvNet", "model.loss": "ContrastiveLoss"}
    others = [f"{key}: {value}\n" for key, value in required.items() if not text.startswith(key)]
    Path("wrong.yaml").write_text(f"{''.join(others)}{text}\n")
    said = answer(memdml, "fit --config wrong.yaml", capsys)
    assert expected in said
    assert len(said.splitlines()) < 8


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("fti", "There is no command 'fti'. Did you mean 'fit'?"),
        ("weight-curve", "There is no command 'weight-curve'. Did you mean 'weight-curves'?"),
        ("fit --model.loss ContrastiveLoss --model.backbone SmalConvNet", "Did you mean 'SmallConvNet'?"),
        ("fit --model.loss ContrastiveLoss --model.backbone resnet05", "Did you mean 'resnet50'?"),
        (f"{TINY} --model.memory_weight -1", "Expected `memory_weight` of at least 0 but got -1.0"),
        (f"{TINY} --model.weights no.pth", "Expected the backbone's weights in the file no.pth but it does not exist"),
        (f"{TINY} --trainer.callbacks null", r"Expected a memory"),
        (f"{TINY} --data.batch_size 7", "Expected `batch_size` to be a multiple of `images_per_class`"),
        (f"fit {NET} {LOSS} {QUIET} --data TableDataModule --data.path no.csv", "no.csv"),
        (f"fit {LOSS} {MEMORY} {DATA} {QUIET} --model.backbone resnet18", "Expected RGB images"),
        ("", f"Expected a command: {', '.join(COMMANDS)}."),
        ("no-such", f"There is no command 'no-such'. There are {', '.join(COMMANDS)}."),
        ("index", "Expected --ckpt_path, on the command line"),
        ("score", "Expected `--embeddings` or `--ckpt_path` but got neither."),
        ("score --embeddings e.parquet --k 5", "k: Expected a list, such as [5], but got '5'."),
        (
            "export --ckpt_path c.ckpt --formats [onx]",
            "Expected one of onnx, torch but got 'onx'. Did you mean 'onnx'?",
        ),
        ("test", "or a checkpoint of `memdml fit` as --ckpt_path."),
        (f"fit {LOSS} --model.loss HybridLoss", "Expected --model.loss.positive, --model.loss.negative, on the comm"),
        (f"fit {NET} {LOSS} --data.path f.npz", "data: GlyphDataModule has no option 'path'. It is an option of Tabl"),
        (
            f"fit {NET} {LOSS} --data.seed=1 --data FolderDataModule",
            "Expected --data before --data.seed, which it would",
        ),
        (f"fit {LOSS} {MEMORY} {QUIET} {DATA} --model.backbone.in_channels=3 --model.backbone=SmallConvNet", "before"),
        ("test --ckpt_path nowhere.ckpt", "nowhere.ckpt: there is no such file"),
        ("test --ckpt_path damaged.ckpt", "damaged.ckpt: it is damaged"),
    ],
)
@pytest.mark.filterwarnings("ignore:`max_epochs` was not set")
def test_wrong_value_is_answered_by_the_sentence_alone(
    line: str, expected: str, memdml: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("damaged.ckpt").write_bytes(b"PK\x03\x04 half a file")
    assert expected in answer(memdml, line, capsys)


def test_error_from_elsewhere_keeps_its_traceback(memdml: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any, **__: Any) -> None:
        raise KeyError("in a library")

    monkeypatch.setattr("torch.optim.AdamW.step", wrong)
    with pytest.raises(KeyError, match="in a library"):
        memdml(TINY)


def test_message_that_is_not_understood_is_handed_on() -> None:
    assert readable("Something unheard of\n\nhappened") == "Something unheard of\nhappened"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:`max_epochs` was not set")
def test_a_damaged_image_is_a_sentence_from_a_worker_too(
    workers: int, memdml: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in range(8):
        folder = Path(f"pictures/{label}")
        folder.mkdir(parents=True)
        for number in range(2):
            (folder / f"{number}.png").write_bytes(b"no picture")
    said = answer(
        memdml,
        f"fit {NET} --model.backbone.in_channels=3 --model.loss=ContrastiveLoss {QUIET} --data=FolderDataModule "
        f"--data.root=pictures --data.val_fraction=0 --data.batch_size=4 --data.images_per_class=2 "
        f"--data.num_workers={workers}",
        capsys,
    )
    assert said.startswith("error: Cannot read the image ")
    assert "pictures/" in said
    assert said.endswith("`verify()` of the data module names all such images.")


def test_scores_without_a_checkpoint_are_told_to_be_those_of_no_training(memdml: Command) -> None:
    with pytest.warns(UserWarning, match="There is no --ckpt_path: the network is taken as it is before any training"):
        memdml(f"test {NET} --model.loss=ContrastiveLoss {DATA} {QUIET} --data.val_fraction=0")


@pytest.mark.parametrize(("epochs", "expected"), [(0, "Nothing is saved."), (1, "To go on: memdml fit --ckpt_path")])
def test_an_interrupted_training_says_how_it_goes_on(
    epochs: int, expected: str, memdml: Command, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step = MetricLearner.training_step

    def interrupted(self: MetricLearner, batch: Any, batch_idx: int) -> Any:
        if self.current_epoch == epochs:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(MetricLearner, "training_step", interrupted)
    with caplog.at_level("INFO"), pytest.raises(SystemExit):
        memdml(f"{TINY} --trainer.max_epochs=3")
    (said,) = (record.message for record in caplog.records if record.message.startswith("Interrupted."))
    assert expected in said
    assert not epochs or Path(said.split()[-1]).is_file()


def test_a_checkpoint_without_a_configuration_is_named(
    memdml: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {}}, tmp_path / "model.pt")
    said = answer(memdml, "test --ckpt_path model.pt", capsys)
    assert said.startswith(
        "error: Expected a checkpoint of `memdml fit`, which holds its configuration, but got model.pt."
    )


# A mistake -> what is typed, or written in a file, and what is read of the message of jsonargparse or argparse.
MISTAKES: dict[str, tuple[str | dict[str, Any], Any]] = {
    "key": ("--name=a --steps=many run", "steps"),
    "unknown class": ("--name=a --loss=Contrastve run", "Contrastve"),
    "unknown class of a module": ("--name=a --loss=torch.nn.Lineer run", ("torch.nn", "Lineer")),
    "missing module": ("--name=a --loss=no_such.Loss run", ("no_such.Loss", "no_such")),
    "class": ("--name=a --loss=ContrastiveLoss --loss.margn=1 run", "lightning_memdml.ContrastiveLoss"),
    "unknown parameter": ("--name=a --loss=ContrastiveLoss --loss.margn=1 run", ("ContrastiveLoss", "margn")),
    "wrong value": ("--name=a --unit=steps run", ("typing.Literal['step', 'epoch']", "steps")),
    "value of several types": ("--name=a --length=steps run", "steps"),
    "choices": ("--name=a --length=steps run", "'step', 'epoch'"),
    "class of another kind": ("--name=a --loss=torch.nn.Linear run", ("torch.nn.Linear", "PairLoss")),
    "missing options": ("run", "name"),
    "unknown option": ("--name=a run --rate=3", "rate"),
    "unknown option of a command": ({"name": "a", "subcommand": "run", "run": {"rate": 3}}, "rate"),
    "unknown command": ("--name=a rnu", "rnu"),
    "no command": ("--name=a", 'expected "subcommand"'),
}


@pytest.mark.parametrize("mistake", WORDING)
def test_the_messages_of_jsonargparse_are_worded_as_they_are_read(mistake: str) -> None:
    command, parser = ArgumentParser(exit_on_error=False), ArgumentParser(exit_on_error=False)
    command.add_argument("--x", type=int)
    parser.add_argument("--loss", type=PairLoss)
    parser.add_argument("--unit", type=Literal["step", "epoch"])
    parser.add_argument("--length", type=int | Literal["step", "epoch"])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--name", required=True)
    parser.add_subcommands().add_subcommand("run", command)
    made, expected = MISTAKES[mistake]
    with pytest.raises(ArgumentError) as error:
        parser.parse_args(made.split()) if isinstance(made, str) else parser.parse_object(made)
    assert expected in find(mistake, str(error.value))
