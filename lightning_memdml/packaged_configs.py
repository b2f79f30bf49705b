"""The configurations that come with the package, and `memdml configs`, which lists them. Needs no training library."""

from __future__ import annotations

import re
import shutil
import textwrap
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from lightning_memdml.plain_parser import PlainParser

FOLDER = Path(__file__).parent / "configs"
FIELDS = ("Command", "Hardware", "Cost", "Expected")
DESCRIPTION = """\
List the configurations that come with the package: what each trains, what it costs, and what to expect. `--config`
takes a file or one of these names; a file that is called exactly so comes first.

  memdml configs
  memdml configs glyphs_memory > mine.yaml     print one, to change a copy of it
  memdml fit --config glyphs_memory"""


class Header(NamedTuple):
    """The comment at the top of a configuration.

    Attributes:
        summary: What it trains.
        command: A command that trains it.
        hardware: The machine that the cost is for.
        cost: In time, or in images.
        expected: A score, or why there is none, in the first sentence; further remarks after it.
    """

    summary: str
    command: str
    hardware: str
    cost: str
    expected: str


def config_names() -> list[str]:
    """Return the names of the packaged configurations, sorted.

    Example:
        >>> "glyphs_memory" in config_names()
        True
    """
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def find_config(source: str) -> Path | None:
    """Return the file that `--config` means, or None if the text is neither a file nor the name of a configuration.

    Args:
        source: A file, which comes first, the name of a packaged configuration, or a configuration as text.

    Raises:
        ValueError: If it is one word, as a name is, and there is no such configuration.

    Example:
        >>> find_config("glyphs_memory").name
        'glyphs_memory.yaml'
    """
    if len(source) >= 1024 or "\n" in source:  # a configuration as text, too long for the name of a file
        return None
    path = Path(source).expanduser()
    if path.is_file():
        return path
    names = config_names()
    if source in names:
        return FOLDER / f"{source}.yaml"
    is_name = re.fullmatch(r"[\w-]+", source) is not None
    if is_name or path.stem in names:
        close = get_close_matches(path.stem, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"Expected a file or the name of a packaged configuration as --config but got {source!r}.{hint} "
            f"`memdml configs` describes them: {', '.join(names)}."
        )
    return None


def is_packaged(source: str) -> bool:
    """Return whether `--config` means a configuration that comes with the package.

    Example:
        >>> is_packaged("photos"), is_packaged("seed_everything: 1")
        (True, False)
    """
    file = find_config(source)
    return file is not None and file.parent == FOLDER


def read_header(file: Path) -> Header:
    """Return the comment at the top of a configuration.

    Args:
        file: A file that starts with `# SUMMARY` and, in this order, `Command: `, `Hardware: `, `Cost: ` and
            `Expected: `, each with a text.

    Raises:
        ValueError: If one of them is missing.

    Example:
        >>> read_header(FOLDER / "glyphs_memory.yaml").cost
        'about 40 seconds.'
    """
    lines = file.read_text(encoding="utf-8").splitlines()
    top = lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))]
    text = " ".join(line.lstrip("# ") for line in top)
    found = re.fullmatch("(.+) " + " ".join(f"{field}: (.+)" for field in FIELDS), text)
    if found is None:
        raise ValueError(
            f"Expected {file.name} to start with a comment of the form `# SUMMARY {': ... '.join(FIELDS)}: ...` "
            f"but got {text[:60]!r}. Write one."
        )
    return Header(*found.groups())


def configs(arguments: list[str]) -> None:
    """Run `memdml configs` with what follows it on the command line."""
    parser = PlainParser("memdml configs", DESCRIPTION)
    parser.add_argument("name", nargs="?", help="print this configuration")
    given = parser.parse_args(arguments)
    if given.name is not None:
        file = find_config(given.name)
        if file is None:
            raise ValueError(f"Expected one of {', '.join(config_names())} but got {given.name!r}. Pass a name.")
        print(file.read_text(encoding="utf-8"), end="")
        return
    print(describe_configs(shutil.get_terminal_size((120, 24)).columns))


def describe_configs(width: int = 120) -> str:
    """Return an entry for each packaged configuration: what it trains, what it costs, and what to expect.

    Args:
        width: Of the lines, in characters.
    """
    names = config_names()
    column = max(map(len, names)) + 2
    entries = []
    for name in names:
        header = read_header(FOLDER / f"{name}.yaml")
        expected = header.expected.partition(". ")[0].rstrip(".")
        text = f"{name:{column}}{header.summary} Cost: {header.cost} Expected: {expected}."
        entries.append(textwrap.fill(text, max(width, 60), subsequent_indent=" " * column, break_on_hyphens=False))
    return "\n".join(entries)
