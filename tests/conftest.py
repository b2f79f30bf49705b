"""What tests of several rooms share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def glyph_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder in which the characters are drawn once for all tests."""
    return str(tmp_path_factory.mktemp("glyphs"))
