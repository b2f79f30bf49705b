"""What tests of studies share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.studies import BASE, STUDY, Write, write_study


@pytest.fixture
def write(tmp_path: Path, glyph_cache: str, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a study file with changes into an empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_MEMDML_CACHE", glyph_cache)
    monkeypatch.setattr(sys, "argv", ["memdml"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    return lambda base=BASE, **changes: write_study(tmp_path, {**STUDY, **changes}, base)
