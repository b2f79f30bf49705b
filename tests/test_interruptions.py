"""Ctrl-C, a reader that stops reading, and shortened options: one sentence, and nothing of Python's own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.children import PATIENCE, failure, python_path
from support.command_line import QUIET, TINY, Command

from lightning_memdml import cli
from lightning_memdml.commands import COMMANDS

GO_ON = {"index": "To go on with the images that are left, run", "study": "Finished runs are kept. To go on, run"}


@pytest.mark.parametrize("name", [*GO_ON, "score", "export"])
def test_after_ctrl_c_a_command_says_how_to_go_on(
    name: str, memdml: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    with pytest.raises(SystemExit) as stop:
        memdml(f"{name} x")
    assert stop.value.code == 130
    expected = f"Interrupted. {GO_ON[name]} the same command again." if name in GO_ON else "Interrupted."
    assert capsys.readouterr().err.strip() == expected


def test_every_command_that_resumes_says_so() -> None:
    assert {name for name, command in COMMANDS.items() if command.after_interrupt} == set(GO_ON)


def start(*arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """A command in a process group of its own, as in a terminal."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "lightning_memdml", *arguments],
            stdout=file, stderr=file, env=environment, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it in the background
        )  # fmt: skip


STUDY = """
base: base.yaml
arms: {a: {}, b: {model: {embedding_dim: 16}}}
seeds: [0, 1, 2, 3, 4, 5]
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="Ctrl-C reaches a group of processes")
def test_ctrl_c_ends_a_study_and_its_processes_with_a_sentence(memdml: Command, tmp_path: Path) -> None:
    """The terminal sends the signal to all processes of the command."""
    options = "max_steps: 400, max_epochs: -1, accelerator: cpu, enable_progress_bar: false"
    Path("base.yaml").write_text(
        "model: {backbone: {class_path: SmallConvNet, init_args: {width: 4}}, loss: {class_path: ContrastiveLoss}}\n"
        f"trainer: {{{options}}}\n"
        "data: {class_path: GlyphDataModule, init_args: {num_classes: 20, batch_size: 8, images_per_class: 2}}\n"
    )
    Path("study.yaml").write_text(STUDY)
    log = tmp_path / "log.txt"
    process = start("study", "study.yaml", "--processes", "2", log=log)
    deadline = time.monotonic() + PATIENCE
    while not list(Path("runs/study/study").glob("runs/*.json")):
        if process.poll() is not None or time.monotonic() > deadline:
            raise failure(f"study ended with {process.poll()}", log.read_text())
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    printed = log.read_text()
    assert "Interrupted. Finished runs are kept. To go on, run the same command again." in printed
    assert "Traceback" not in printed


@pytest.mark.skipif(os.name == "nt", reason="pipes of other systems")
@pytest.mark.parametrize("arguments", ["configs", "--help"])
def test_a_reader_that_has_enough_is_no_error(arguments: str) -> None:
    command = f'"{sys.executable}" -m lightning_memdml {arguments} | head -n 1'
    environment = {**os.environ, "PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("fit --conf x.yaml", "--conf"),
        (f"{TINY} --trainer.max_step 3", "--trainer.max_step"),
        ("test --ckpt last.ckpt", "--ckpt"),
        ("index --ckpt last.ckpt", "--ckpt"),
        ("index --ckpt_path last.ckpt --sour images", "--sour"),
        ("search a.png --ind runs/index", "--ind"),
        ("export --ckpt last.ckpt", "--ckpt"),
        ("score --embed x.parquet", "--embed"),
        ("data check --dat FolderDataModule", "--dat"),
        (f"configs --nam x {QUIET}", "--nam"),
        ("demo --conf x", "--conf"),
        ("weight-curves --los ContrastiveLoss", "--los"),
    ],
)
def test_a_shortened_option_is_not_taken_for_another(
    line: str, expected: str, memdml: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """It could become another option in a later version."""
    with pytest.raises(SystemExit) as stop:
        memdml(line)
    assert stop.value.code not in (0, None)
    printed = f"{stop.value.code} {capsys.readouterr().err}"
    assert expected in printed
    assert "Traceback" not in printed
