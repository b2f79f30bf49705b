"""What the log of a run prints: lines of this package and of the user's code, and warnings of Lightning."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import lightning
from tqdm import tqdm

LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric")
LIGHTNING = Path(lightning.__file__).parent


class AboveBars(logging.StreamHandler):
    """Prints to standard error, above progress bars, without what Lightning reports of itself."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)  # not with a stream, which would be kept: standard error may be redirected

    @property
    def stream(self) -> Any:
        """Standard error as it is now."""
        return sys.stderr

    def filter(self, record: logging.LogRecord) -> bool:
        """Leave out what Lightning logs below a warning: devices, seeds, advertisements."""
        return record.levelno >= logging.WARNING or LIGHTNING not in Path(record.pathname).parents

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record, and draw the progress bars again below it."""
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def quiet_logs() -> None:
    """Print what `AboveBars` prints in place of all that Lightning logs. In a program nothing changes."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [
            AboveBars() if type(handler) is logging.StreamHandler else handler for handler in logger.handlers
        ]
