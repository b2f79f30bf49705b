"""What tests of several rooms share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from types import ModuleType

import pytest

# Doctests draw a few characters too; nothing of a test run stays in the user's cache.
os.environ.setdefault("LIGHTNING_MEMDML_CACHE", tempfile.mkdtemp(prefix="memdml"))


@pytest.fixture(scope="session")
def glyph_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder in which the characters are drawn once for all tests."""
    return str(tmp_path_factory.mktemp("glyphs"))


@pytest.fixture
def offline_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """W&B without an account, and without what an earlier test left in its process-wide state."""
    wandb = pytest.importorskip("wandb", reason="an optional logger")
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    yield wandb
    wandb.teardown()
