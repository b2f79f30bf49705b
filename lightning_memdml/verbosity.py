"""Whether a command prints all that its libraries print: `--verbose`, after any command."""

from __future__ import annotations

import os
from collections.abc import Sequence

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
