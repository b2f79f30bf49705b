"""What tests of deployment share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from support.command_line import Command
from support.workshop import COLOURS, FIT, draw

from lightning_memdml.cli import main

RunIn = Callable[[Path], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, run_in: RunIn) -> Iterator[Path]:
    """A folder with pictures of eight classes, the later four of which were not trained on, and a checkpoint."""
    folder = tmp_path_factory.mktemp("workshop")
    for label, colour in enumerate(COLOURS):
        for number in range(6):
            draw(folder / "pictures" / f"{label} {colour}" / f"{number}.png", colour, number)
    with run_in(folder):
        main(FIT.split())
        yield folder


@pytest.fixture
def memdml(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.chdir(workshop)
    monkeypatch.setattr(sys, "argv", ["memdml"])
    return lambda line: main(line.split())
