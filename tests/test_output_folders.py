"""Where the command line writes: `~` and `file://` are folders of this machine, other addresses are refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_memdml.cli import main

FIT = [
    "fit", "--model.backbone", "SmallConvNet", "--model.backbone.width", "4", "--model.embedding_dim", "8",
    "--model.loss", "ContrastiveLoss", "--data.num_classes", "20", "--data.batch_size", "8",
    "--data.images_per_class", "2", "--data.num_workers", "0", "--trainer.accelerator", "cpu",
    "--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false",
]  # fmt: skip


@pytest.mark.parametrize("save_dir", ["~/runs", "file://{home}/runs"])
def test_a_home_folder_and_a_file_address_are_folders_here(
    save_dir: str, run_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    with run_in(work):
        main([*FIT, "--trainer.logger.save_dir", save_dir.format(home=home), "--trainer.default_root_dir", "~/root"])
    assert (home / "runs/memdml/version_0/config.yaml").is_file()
    assert (home / "runs/memdml/version_0/checkpoints/last.ckpt").is_file()
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("option", ["--trainer.logger.save_dir", "--trainer.default_root_dir"])
def test_an_address_of_another_machine_is_refused_before_the_work(option: str, run_in: Any, tmp_path: Path) -> None:
    with run_in(tmp_path), pytest.raises(SystemExit) as stop:
        main([*FIT, option, "s3://bucket/runs"])
    name = option.rpartition(".")[2]
    assert f"Expected `{name}` to be a path on this machine but got 's3://bucket/runs'." in str(stop.value.code)
    assert list(tmp_path.iterdir()) == []


def test_a_version_that_another_run_takes_in_the_same_moment_is_left_to_it(
    run_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run makes its folder after this one has looked for the next free version."""
    look = CSVLogger._get_next_version
    taken = []

    def look_and_lose(logger: CSVLogger) -> int:
        version = look(logger)
        if not taken:
            taken.append(Path(logger.root_dir, f"version_{version}").absolute())
            taken[0].mkdir(parents=True)
        return version

    monkeypatch.setattr(CSVLogger, "_get_next_version", look_and_lose)
    with run_in(tmp_path):
        main(FIT)
    assert list(taken[0].iterdir()) == []
    assert (tmp_path / "runs/memdml/version_1/checkpoints/last.ckpt").is_file()
    assert (tmp_path / "runs/memdml/version_1/config.yaml").is_file()
