"""Every error message of the form `Expected X but got Y.` goes on with what to do."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_memdml

FOLDER = Path(lightning_memdml.__file__).parent
VALUE = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for what is only known when the error is raised


def text(node: ast.expr) -> str:
    """A message, as far as it is written in the source."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text, node.values))
    return VALUE


def messages(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            yield text(node.exc.args[0])


def names_no_way_out(message: str) -> bool:
    """Whether a message ends where it has said what came. A remedy may stand in a variable at its end."""
    expects = re.search(r"^Expected |: expected ", message)
    goes_on = re.search(rf"[.;:?] [A-Za-z`{VALUE}]|[.?]{VALUE}$", message[expects.end() :]) if expects else True
    return not goes_on


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('raise ValueError(f"Expected `k` of at least 1 but got {k}.")', True),
        ('raise ValueError(f"Expected `k` of at least 1 but got {k}. Pass 1.")', False),
        ('raise ValueError(f"{where}: expected `k` of at least 1 but got {k}.")', True),
        ('raise ValueError(f"Expected one of {names} but got {k}.{nearest(k, names)}")', False),
        ('raise ValueError("a part of another message")', False),
    ],
)
def test_a_message_without_a_way_out_is_found(source: str, found: bool) -> None:
    assert [names_no_way_out(message) for message in messages(source)] == [found]


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("*.py")), ids=lambda file: str(file.relative_to(FOLDER)))
def test_every_message_says_what_to_do(file: Path) -> None:
    found = [message for message in messages(file.read_text(encoding="utf-8")) if names_no_way_out(message)]
    assert not found, [message.replace(VALUE, "{...}") for message in found]
