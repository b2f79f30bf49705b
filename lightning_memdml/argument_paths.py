"""Paths on the command line: `~` is expanded in every option, and URLs are refused before the work."""

from __future__ import annotations

import os
from collections.abc import Sequence

WRITTEN = ("--output", "--html", "--png", "--picture", "--per_class", "--map")
READ = ("--index", "--source", "--embeddings", "--gallery", "--train")


def with_local_paths(arguments: Sequence[str]) -> list[str]:
    """Return arguments with paths of this machine: a shell expands `--output ~/x`, but not `--output=~/x`.

    Raises:
        ValueError: If a file or folder of a command is a URL of another machine.

    Example:
        >>> with_local_paths(["index", "--output=file:///data/index"])
        ['index', '--output=/data/index']
    """
    found, before = [], ""
    for argument in arguments:
        name, equals, value = argument.partition("=") if argument.startswith("--") else (before, "", argument)
        if value == "~" or value.startswith("~/"):
            value = os.path.expanduser(value)
        elif name in (*WRITTEN, *READ) and "://" in value:
            from lightning_memdml.data.paths import local_path  # which takes a second to import

            value = str(local_path(value, name.removeprefix("--")))
        found.append(f"{name}{equals}{value}" if argument.startswith("--") else value)
        before = argument if argument.startswith("--") and not equals else ""
    return found
