"""Contexts in which a run is built and trained: without the command line, and without Lightning's notices."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's notices, which it repeats for every run."""
    loggers = [
        logging.getLogger(f"lightning.{name}") for name in ("pytorch.utilities.rank_zero", "fabric.utilities.seed")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")  # warnings of this package are kept
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
