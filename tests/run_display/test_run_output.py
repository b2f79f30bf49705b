"""What a run prints and where it lies: lines of scores, the bar, quiet logs, `runs/latest`."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.children import run_python
from support.command_line import TINY, Command

from lightning_memdml import ContrastiveLoss, InfoNCELoss
from lightning_memdml.latest_run import follow_latest, point_latest_at
from lightning_memdml.run_display.logs import AboveBars
from lightning_memdml.run_display.step_bar import losses_per_pair
from lightning_memdml.run_folders import remove_unused

LATEST = "runs/latest/checkpoints/last.ckpt"
STEPS = "--trainer.max_steps=4 --trainer.max_epochs=-1 --trainer.check_val_every_n_epoch=null"


def test_each_validation_is_a_line_and_latest_leads_to_the_run(
    memdml: Command, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    memdml(f"{TINY} {STEPS} --trainer.val_check_interval=2")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for step, line in zip((2, 4), lines, strict=True):
        assert re.fullmatch(rf"step {step}/4  Recall@1 \d+\.\d  MAP@R \d+\.\d", line)
    assert "Network: 2,564 parameters, all trained." in caplog.messages
    assert (
        "Trained 4 steps. Next: memdml test --ckpt_path runs/memdml/version_0/checkpoints/last.ckpt" in caplog.messages
    )

    memdml(f"test --ckpt_path {LATEST}")
    assert capsys.readouterr().out.startswith("Test classes, 96 queries\n  Recall@1 ")
    with pytest.raises(SystemExit) as stop:
        memdml(f"fit --ckpt_path {LATEST}")
    assert stop.value.code == (
        f"error: Expected a checkpoint of an unfinished run but {LATEST} is at step 4, where this run ends. To go on, "
        "pass a larger --trainer.max_steps, such as 8, or a larger --trainer.max_epochs."
    )
    # The folder of the test is a run of its own; that of the training that did nothing is gone.
    assert sorted(path.name for path in Path("runs/memdml").iterdir()) == ["version_0", "version_1"]
    assert Path("runs/latest").resolve() == Path("runs/memdml/version_0").resolve()


def test_a_run_that_fails_at_its_start_leaves_no_folder(memdml: Command) -> None:
    with pytest.raises(SystemExit):
        memdml(f"{TINY} --trainer.callbacks null")  # refused in the first step
    assert not list(Path("runs").rglob("version_*"))


def test_a_folder_with_numbers_or_other_files_is_kept(tmp_path: Path) -> None:
    logged, other, empty = (tmp_path / name for name in ("logged", "other", "empty"))
    for folder in (logged, other, empty):
        folder.mkdir()
        (folder / "config.yaml").write_text("seed_everything: 0")
    (logged / "metrics.csv").write_text("step\n1\n")
    (other / "notes.txt").write_text("mine")
    (empty / "metrics.csv").touch()
    remove_unused([logged, other, empty])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logged", "other"]


def test_latest_is_a_text_file_where_links_are_not_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError("no right to make links")

    monkeypatch.setattr(Path, "symlink_to", refused)
    monkeypatch.chdir(tmp_path)
    for version in (0, 1):
        folder = Path(f"runs/memdml/version_{version}")
        folder.mkdir(parents=True)
        point_latest_at(folder, Path("runs"))
    assert Path("runs/latest").read_text() == "memdml/version_1\n"
    assert follow_latest(LATEST) == "runs/memdml/version_1/checkpoints/last.ckpt"
    assert follow_latest(f"--ckpt_path={LATEST}") == "--ckpt_path=runs/memdml/version_1/checkpoints/last.ckpt"


def test_what_the_user_has_put_at_latest_stays(tmp_path: Path) -> None:
    (tmp_path / "version_0").mkdir()
    for mine in (tmp_path / "folder" / "latest", tmp_path / "file" / "latest"):
        mine.parent.mkdir()
        mine.write_text("mine\n") if mine.parent.name == "file" else mine.mkdir()
        point_latest_at(tmp_path / "version_0", mine.parent)
        assert not mine.is_symlink()
    assert (tmp_path / "file" / "latest").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("loss", "memory_loss", "expected"),
    [
        (ContrastiveLoss(), None, {"batch loss per pair": 2.1 / 7, "memory loss per pair": 30 / 100}),
        (InfoNCELoss(), ContrastiveLoss(), {"batch loss": 2.1, "memory loss per pair": 30 / 100}),
    ],
)
def test_the_bar_shows_each_loss_per_pair(loss: Any, memory_loss: Any, expected: dict[str, float]) -> None:
    """So that it does not grow when a memory of 100 rows joins a batch of 8."""
    logged = {"train/batch_loss": 2.1, "train/memory_loss": 30.0, "train/loss": 32.1}
    module = SimpleNamespace(loss=loss, memory_loss=memory_loss, memory=range(100))
    found = losses_per_pair(SimpleNamespace(callback_metrics=logged), module, {"labels": torch.zeros(8)})  # type: ignore[arg-type]
    assert found == pytest.approx(expected)
    module.memory = range(0)  # before its first rows
    before = losses_per_pair(SimpleNamespace(callback_metrics=logged), module, {"labels": torch.zeros(8)})  # type: ignore[arg-type]
    assert list(before) == list(expected)[:1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_counts_the_steps_of_the_whole_training(memdml: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("lightning_memdml.run_display.step_bar.REFRESH", 0.0)
    memdml(TINY.replace("--trainer.enable_progress_bar=false", "").replace("max_epochs=1", "max_epochs=2"))
    shown = terminal.getvalue()
    assert "step 0/6 " in shown
    assert "step 6/6 " in shown
    assert "batch loss per pair=" in shown
    assert "memory loss per pair=" in shown
    assert "Epoch" not in shown


def test_logs_of_lightning_are_hidden_and_warnings_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    import lightning

    handler = AboveBars()
    for path, level, text in (
        (lightning.__file__, logging.INFO, "advertisement"),
        (lightning.__file__, logging.WARNING, "warning"),
        (__file__, logging.INFO, "mine"),
    ):
        handler.handle(logging.LogRecord("lightning.pytorch", level, path, 1, text, None, None))
    assert capsys.readouterr().err.split() == ["warning", "mine"]


@pytest.mark.parametrize("verbose", [False, True])
def test_a_run_prints_its_own_lines_and_with_verbose_those_of_lightning(
    verbose: bool, tmp_path: Path, glyph_cache: str
) -> None:
    line = f"{TINY} --trainer.max_steps=1 --data.val_fraction=0{' --verbose' if verbose else ''}"
    done = run_python(
        "-m", "lightning_memdml", *line.split(), cwd=tmp_path, env={"LIGHTNING_MEMDML_CACHE": glyph_cache}
    )
    printed = done.stdout + done.stderr
    for text in ("Seed set to", "GPU available", "Modules in eval mode"):
        assert (text in printed) == verbose
    assert "Trained 1 step." in printed
