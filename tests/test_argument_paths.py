"""Paths on the command line: home, other machines, and what the operating system refuses."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from support.command_line import Command

from lightning_memdml import cli
from lightning_memdml.argument_paths import with_local_paths
from lightning_memdml.atomic_write import named_if_full


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--output=~/x"], ["--output=HOME/x"]),
        (["--output", "~/x"], ["--output", "HOME/x"]),
        (["--ckpt_path=~/x.ckpt", "~/q.png", "~"], ["--ckpt_path=HOME/x.ckpt", "HOME/q.png", "HOME"]),
        (["--data.root=~/x"], ["--data.root=HOME/x"]),
        (["--output", "file:///a%20b"], ["--output", "/a b"]),
        (["--k", "~x", "a~/b", "--html=a=~/b"], ["--k", "~x", "a~/b", "--html=a=~/b"]),
        (["--trainer.logger.base_url=https://a.b"], ["--trainer.logger.base_url=https://a.b"]),
    ],
)
def test_paths_of_this_machine(given: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert with_local_paths(given) == [argument.replace("HOME", "/home/me") for argument in expected]


@pytest.mark.parametrize(
    "line",
    [
        "index --ckpt_path last.ckpt --output s3://a/b",
        "index --ckpt_path last.ckpt --source=https://a.b/images",
        "export --ckpt_path last.ckpt --output=gs://a/b",
        "search a.png --index s3://a/b",
        "search a.png --html s3://a/b.html",
        "data check --data FolderDataModule --data.root x --output hdfs://a/b",
        "weight-curves --loss ContrastiveLoss --output s3://a/b",
        "score --embeddings s3://a/b.parquet",
        "score --embeddings e.parquet --whiten --train s3://a/b.parquet",
        "study x.yaml --output s3://a/b",
    ],
)
def test_other_machines_are_refused_before_the_work(line: str, memdml: Command) -> None:
    with pytest.raises(
        SystemExit, match=r"^error: Expected `\w+` to be a path on this machine but got '.*'. Copy or mou"
    ):
        memdml(line)
    assert list(Path().iterdir()) == []


def test_what_the_system_refuses_is_a_sentence(memdml: Command) -> None:
    Path("file").touch()
    expected = r"^error: Expected to read or write 'file.*' but got: .*\. Check the path, or pass another\.$"
    with pytest.raises(SystemExit, match=expected):
        memdml("weight-curves --loss ContrastiveLoss --output file/inner")


def test_a_configuration_that_is_no_text_is_named(memdml: Command) -> None:
    Path("bin.yaml").write_bytes(b"\xff\xfe\0")
    with pytest.raises(SystemExit, match=r"^error: Expected YAML in bin.yaml but it is no text in UTF-8"):
        memdml("fit --config bin.yaml")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_is_a_sentence_wherever_it_is_met(
    number: int, memdml: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cli, "run", full)
    with pytest.raises(SystemExit, match=r"^error: Expected space on the disk but got: .*\. Free some space\.$"):
        memdml("fit")
    with pytest.raises(OSError, match="Expected space on the disk for x but there is no"), named_if_full(Path("x")):
        full()
