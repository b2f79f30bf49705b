"""What tests of several rooms share."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.children import PATIENCE
from support.command_line import Command
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_memdml.cli import main

# Without a GPU its kernels run in Triton's interpreter, which has to be asked for before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Doctests draw a few characters too; nothing of a test run stays in the user's cache, nor in the temporary folder.
if "LIGHTNING_MEMDML_CACHE" not in os.environ:
    os.environ["LIGHTNING_MEMDML_CACHE"] = tempfile.mkdtemp(prefix="memdml")
    atexit.register(shutil.rmtree, os.environ["LIGHTNING_MEMDML_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def glyph_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder in which the characters are drawn once for all tests."""
    return str(tmp_path_factory.mktemp("glyphs"))


@pytest.fixture(scope="session")
def run_in(glyph_cache: str) -> Callable[[Path], AbstractContextManager[None]]:
    """Takes the command line into a folder, and afterwards takes back what it left in this process."""

    @contextmanager
    def inside(folder: Path) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("LIGHTNING_MEMDML_CACHE", glyph_cache)
            patch.setattr(sys, "argv", ["memdml"])
            for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # which a run sets
                patch.setenv(name, "0")
                patch.delenv(name)
            yield

    return inside


@pytest.fixture
def fake_gpu() -> Iterator[FakeTensorMode]:
    """Tensors of a GPU that need not be there: whatever needs their content raises."""
    with FakeTensorMode() as mode:
        numbers = torch.zeros(2, dtype=torch.int64, device="cuda")
        try:
            numbers[numbers]
        except RuntimeError as error:
            pytest.skip(f"torch {torch.__version__} asks the driver of a fake GPU: {str(error).splitlines()[0]}")
    from lightning_memdml.losses import constants  # torch may import Triton with it

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "_ON_DEVICE", {})  # tensors of one mode are of no use in another
        yield mode


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., str]:
    """Opens a page in a real browser without a network, with flags, and returns what it prints."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    browser = os.environ.get("CHROMIUM") or next((path for name in names if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser among {', '.join(names)}, nor in $CHROMIUM")

    def browse(page: Path, *flags: str) -> str:
        command = [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            f"--user-data-dir={tmp_path}/profile", "--host-resolver-rules=MAP * ~NOTFOUND", *flags, page.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return browse


@pytest.fixture
def offline_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """W&B without an account, and without what an earlier test left in its process-wide state."""
    wandb = pytest.importorskip("wandb", reason="an optional logger")
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    yield wandb
    wandb.teardown()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def memdml(tmp_path: Path, glyph_cache: str, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_MEMDML_CACHE", glyph_cache)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # which a run sets, and which would last longer than the test
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["memdml"])
    return lambda line: main(line.split())
