"""The help of every command: short, quick, and true: its options and defaults are those of the parser."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lightning import Trainer
from support.command_line import Command

from lightning_memdml import FolderDataModule, MemoryCallback, MetricLearner
from lightning_memdml.commands import COMMANDS
from lightning_memdml.data import RetrievalDataModule
from lightning_memdml.help_pages import OWN, TRAINING, help_page
from lightning_memdml.packaged_configs import config_names

COLUMNS = "80"  # of a terminal as it opens


def page_of(name: str) -> str:
    command = COMMANDS[name]
    return help_page(name, command.help, command.function, command.options)


def options_of(page: str) -> list[str]:
    return re.findall(r"^  (--[\w.]+)", page, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_has_at_most_60_lines_and_says_what_the_command_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", COLUMNS)
    page = page_of(name)
    assert len(page.splitlines()) <= 60
    assert page.startswith(f"usage: memdml {name}")
    assert f"  memdml {name}" in page, "an example"
    assert "--help_all` lists all options" in page
    assert "None" not in page


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("validate", "test", "predict")])
def test_the_options_of_a_page_are_those_of_the_parser(
    name: str, memdml: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        memdml(f"{name} --help_all")
    assert stop.value.code == 0
    everything = capsys.readouterr().out
    # Options of classes are listed with the class; the next test has them. The last two are taken before the parser.
    shown = [option for option in options_of(page_of(name)) if not option.startswith("--data.")]
    assert [option for option in shown if option not in everything and option not in ("--trust", "--verbose")] == []


def test_options_and_defaults_of_a_training_are_those_of_the_classes() -> None:
    owners = {"model": MetricLearner, "data": RetrievalDataModule, "trainer": Trainer}
    for options in TRAINING.values():
        for option, _, place in options:
            section, _, name = option.removeprefix("--").partition(".")
            owner = MemoryCallback if option.startswith("  ...") else owners[section.strip() or "trainer"]
            name = name.rpartition(".")[2] if option.startswith("  ...") else name
            if option == "--data.root":
                owner = FolderDataModule
            if name and not name.startswith("callbacks+="):
                assert name in inspect.signature(owner.__init__).parameters, option  # type: ignore[misc]
            assert isinstance(place, str) or place[1] in (
                "MetricLearner", "RetrievalDataModule", "FolderDataModule", "MemoryCallback",
            )  # fmt: skip
    page = page_of("fit")
    assert re.search(r"--model.embedding_dim +width of the embedding \[128\]", page)
    assert re.search(r"--data.val_fraction .*\[0.1\]", page)
    assert all(name in " ".join(page.split()) for name in config_names())


def test_defaults_are_shown_as_they_are_typed() -> None:
    assert re.search(r"--k  .*\[\[1, 10, 100, 1000\]\]", page_of("score"))
    assert "[[onnx, torch]]" in page_of("export")
    assert "[true]" in page_of("data")
    assert page_of("configs").startswith("usage: memdml configs [NAME] [OPTIONS]")


def test_own_options_of_the_trainer_commands_exist() -> None:
    from lightning_memdml.command_options import FIT, PREDICT, REPORT

    lightning = {"--config", "--ckpt_path", "--seed_everything", "--trust", "--verbose"}
    for name, own in {"fit": FIT, "test": REPORT, "predict": PREDICT, "validate": {}}.items():
        assert {option for option, *_ in OWN[name]} <= lightning | set(own)


WITHOUT_TORCH = """
import sys
from lightning_memdml.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
heavy = {"torch", "lightning", "numpy", "jsonargparse"} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""


def test_every_page_comes_before_torch_in_half_a_second(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="the time of a process, which Windows does not tell")
    for name in COMMANDS:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, name, "--help"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"usage: memdml {name}")
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
