"""`runs/latest`: a fixed path to the last run that has saved a checkpoint. Needs no training library."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

LATEST = "latest"


def point_latest_at(folder: Path, root: Path) -> None:
    """Make `<root>/latest` lead to the folder of a run, by a relative link, or by a text file where there are no links.

    What is there and is neither such a link nor such a file is left alone.

    Args:
        folder: Of the run, inside `root`.
        root: The folder of all runs, such as `runs`.
    """
    place, unfinished = root / LATEST, root / f".{LATEST}-{os.getpid()}"
    if not place.is_symlink() and place.exists() and _read_pointer(place) is None:
        return
    target = os.path.relpath(folder, root)
    with suppress(OSError):
        unfinished.unlink(missing_ok=True)
        try:
            unfinished.symlink_to(target, target_is_directory=True)
        except (OSError, NotImplementedError):  # such as Windows without the right to make links
            unfinished.write_text(f"{target}\n", encoding="utf-8")
        unfinished.replace(place)


def _read_pointer(place: Path) -> str | None:
    """Return the folder that a text file in place of a link names; None if it is no such file."""
    try:
        text = place.read_text(encoding="utf-8") if place.is_file() and place.stat().st_size < 4096 else ""
    except (OSError, ValueError):
        return None
    target = text.removesuffix("\n")
    return target if target and "\n" not in target and (place.parent / target).is_dir() else None


def follow_latest(argument: str) -> str:
    """Return an argument with `latest` replaced by the run it leads to, where it is a text file and not a link.

    Example:
        >>> follow_latest("runs/latest/checkpoints/last.ckpt")
        'runs/latest/checkpoints/last.ckpt'
    """
    option, equals, path = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    parts = Path(path).parts
    if LATEST not in parts:
        return argument
    place = Path(*parts[: parts.index(LATEST) + 1])
    if place.is_symlink() or (target := _read_pointer(place)) is None:
        return argument
    return f"{option}{equals}{place.parent.joinpath(target, *parts[parts.index(LATEST) + 1 :])}"
