"""A context in which a run is built and trained without the command line."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Hide the command line from Lightning, which would warn about it, and restore the environment afterwards."""
    arguments, environment = sys.argv, dict(os.environ)
    sys.argv = arguments[:1]
    try:
        yield
    finally:
        sys.argv = arguments
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
