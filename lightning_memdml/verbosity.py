"""What a command prints of what its libraries say: all with `--verbose`, after any command."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence

VARIABLE = "LIGHTNING_MEMDML_VERBOSE"  # in the environment, so that the processes of other ranks have it too


def take_verbose(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without `--verbose`, and store in the environment whether it was among them.

    Example:
        >>> take_verbose(["fit", "--config", "photos"]), is_verbose()
        (['fit', '--config', 'photos'], False)
    """
    if "--verbose" in arguments:
        os.environ[VARIABLE] = "1"
    else:
        os.environ.pop(VARIABLE, None)
    return [argument for argument in arguments if argument != "--verbose"]


def is_verbose() -> bool:
    """Whether the command was given `--verbose`."""
    return VARIABLE in os.environ


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
