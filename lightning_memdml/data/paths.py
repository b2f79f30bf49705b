"""Paths as people write them: `~`, relative, absolute, URLs, and names that are not UTF-8."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote, urlsplit

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # a drive of Windows has one letter
# They would move the cursor of a terminal, begin a line, or turn the direction of the text round.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def local_path(path: str | Path, name: str) -> Path:
    """Return the absolute path of a file or folder on this machine, with `~` expanded.

    Args:
        path: A path, or a URL that begins with `file://`.
        name: The argument that it was given as, for the message.

    Raises:
        ValueError: If it is empty, or a URL of another machine.

    Example:
        >>> str(local_path("file:///data/my%20images", "root"))
        '/data/my images'
        >>> local_path("s3://bucket/images", "root")
        Traceback (most recent call last):
        ValueError: Expected `root` to be a path on this machine but got 's3://bucket/images'. Copy or mount the files.
    """
    text = os.fspath(path)
    if not text:
        raise ValueError(f"Expected `{name}` to be a path but got ''. Pass `.` for the working directory.")
    if URL.match(text):
        url = urlsplit(text)
        if url.scheme.lower() != "file" or url.netloc not in ("", "localhost"):
            raise ValueError(
                f"Expected `{name}` to be a path on this machine but got {text!r}. Copy or mount the files."
            )
        text = unquote(url.path)
    return Path(os.path.expanduser(text)).absolute()


def inside(root: Path, relative: str, where: str) -> str:
    """Return the path of `relative` below `root`.

    Args:
        root: The folder that holds the images.
        relative: A path in a list file. List files are not trusted: they may not point out of `root`.
        where: The place in the list file, for the message.

    Raises:
        ValueError: If `relative` is empty, absolute, or leaves `root` through `..`.

    Example:
        >>> inside(Path("images"), "a/1.jpg", "list.csv, row 1")
        'images/a/1.jpg'
        >>> inside(Path("images"), "../1.jpg", "list.csv, row 2")
        Traceback (most recent call last):
        ValueError: list.csv, row 2: expected a path below images but got '../1.jpg'. Correct the path, or `root=`.
    """
    path = PureWindowsPath(relative)  # it accepts both slashes, and recognises absolute paths of either system
    if path.anchor or not path.parts or ".." in path.parts or "\0" in relative:
        raise ValueError(f"{where}: expected a path below {root} but got {relative!r}. Correct the path, or `root=`.")
    return str(root.joinpath(*path.parts))


def listed_path(root: Path, path: str, where: str) -> str:
    """Return the path in a row of a table of the user's own: below `root`, or absolute.

    Args:
        root: The folder that relative paths start from.
        path: The path; it may begin with `/`, `~` or `file://`.
        where: The row, for the message.

    Raises:
        ValueError: If the path is empty, a URL of another machine, or leaves `root` through `..`.

    Example:
        >>> listed_path(Path("images"), "/data/1.jpg", "list.csv, row 1")
        '/data/1.jpg'
    """
    if "\0" not in path and (path.startswith(("/", "~/")) or URL.match(path)):
        try:
            return str(local_path(path, "path"))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return inside(root, path, where)


def required_file(path: Path, data_set: str, hint: str) -> Path:
    """Return `path` if it is a file.

    Args:
        path: The file looked for.
        data_set: Name of the data set, for the message.
        hint: Where the file comes from and which argument points to it, for the message.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{data_set} looked for the file {shown(path)}, which does not exist. {hint}")
    return path


def is_utf8(path: str) -> bool:
    r"""Return whether a file name can be written into a text file.

    Example:
        >>> is_utf8("café.png"), is_utf8(os.fsdecode(b"caf\xe9.png"))
        (True, False)
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_utf8(names: Iterable[str]) -> None:
    """Refuse names of files and classes that cannot be written into a table, before the work that would be lost.

    Raises:
        ValueError: If a name is not UTF-8. The message counts them.
    """
    odd = [name for name in names if not is_utf8(name)]
    if odd:
        more = f" and {len(odd) - 1:,} more" if len(odd) > 1 else ""
        raise ValueError(
            f"Expected names in UTF-8, which can be written into tables, but got {shown(odd[0])}{more}. Rename these "
            "files or folders; `memdml data check` lists them."
        )


def shown(path: str | Path) -> str:
    r"""Return a path or name that can be printed in one line, whatever bytes and control characters it has.

    Example:
        >>> shown(os.fsdecode(b"caf\xe9.png")), shown("a\nb.png")
        ('caf\\xe9.png', 'a\\nb.png')
    """
    text = os.fsencode(path).decode(errors="backslashreplace")
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
