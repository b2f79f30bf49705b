"""Reads the code on Markdown pages, runs it, and compares what it prints with what the page shows.

On a page:

- Blocks of `python` run in order, in one namespace, in an empty folder with `experiments/` of the repository.
- A block of `text` that directly follows a block of `python` is what that block prints. `...` matches anything.
- So is what stands after `# ->` in a block of `python`: one printed line each, all printed lines of the block in order.
- A block with `title="name.py"` is written to that file, not run. Later blocks may import or name it.
- Lines of a block of `console` or `bash` that start a command of this package (after `$ ` in `console`) are parsed, not
  run: a command, an option or a class that does not exist fails.
- A block after the line `<!-- not run: reason -->` is left alone.
"""

from __future__ import annotations

import argparse
import contextlib
import doctest
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
from lightning.pytorch.cli import LightningCLI

from lightning_memdml.cli import main

REPOSITORY = Path(__file__).parents[2]
PAGES = [
    *(page for page in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md") if page.exists()),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
    *sorted((REPOSITORY / "experiments").glob("*.md")),
]
"""The pages that are checked."""
CHECKPOINT = REPOSITORY / "tests/fixtures/version_0_1/queue.ckpt"
"""Takes the place of each checkpoint that a command on a page names and that is not there."""

BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)(?P<options>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.DOTALL | re.MULTILINE,
)
NOT_RUN = re.compile(r"<!-- not run: .{10,}-->\s*\Z")
PRINTED = re.compile(r"# -> ?(.*)$", re.MULTILINE)
FENCED = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?![a-z]+:)([^)\s#]*)(?:#([^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass
class Block:
    """A block of code on a page."""

    language: str
    code: str
    line: int
    """Of the page on which the code starts."""
    title: str | None
    run: bool
    follows: str
    """The text of the page between the block before and this one."""


def read_blocks(page: str) -> list[Block]:
    """Return the blocks of a page."""
    blocks, end = [], 0
    for found in BLOCK.finditer(page):
        between, end = page[end : found.start()], found.end()
        width = len(found["indent"])
        code = "\n".join(line[width:] if line[:width].isspace() else line for line in found["code"].split("\n"))
        title = re.search(r'title="([^"]+)"', found["options"])
        line = page.count("\n", 0, found.start("code")) + 1
        run = not NOT_RUN.search(between)
        blocks.append(Block(found["language"], code, line, title and title[1], run, between))
    return blocks


def run_page(page: Path, folder: Path) -> None:
    """Write, run and parse the blocks of a page in a folder.

    Raises:
        AssertionError: If a block prints something else than the page shows, or a command cannot be parsed.
    """
    with contextlib.suppress(FileExistsError):
        (folder / "experiments").symlink_to(REPOSITORY / "experiments", target_is_directory=True)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = None
    for block in read_blocks(page.read_text(encoding="utf-8")):
        where = f"{page.name}, line {block.line}"
        if block.language == "text" and printed is not None and not block.follows.strip():
            expect_printed(block.code, printed, where)
        printed = None
        if not block.run:
            continue
        if block.title is not None:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.code, encoding="utf-8")
        elif block.language == "python":
            printed = run_block(block, page, namespace)
            if wanted := PRINTED.findall(block.code):
                expect_printed("\n".join(wanted), printed, where)
        elif block.language in ("console", "bash"):
            for command in commands_in(block):
                parse_command(command, where)


def run_block(block: Block, page: Path, namespace: dict[str, Any]) -> str:
    """Run a block of Python and return what it prints. A traceback shows file and line of the page."""
    printed = io.StringIO()
    code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)
    return printed.getvalue()


def expect_printed(wanted: str, printed: str, where: str) -> None:
    """Compare as doctest does; `...` matches anything, and runs of spaces are one."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    if not doctest.OutputChecker().check_output(wanted.strip() + "\n", printed.strip() + "\n", flags):
        raise AssertionError(f"{where}: expected the code to print\n{wanted}\nbut got\n{printed}")


def broken_links(page: Path) -> list[str]:
    """Return the links of a page to files that do not exist, or to headings that their page does not have."""
    broken = []
    for file, heading in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        target = page.parent / file if file else page
        if not target.exists() or (heading and target.suffix == ".md" and heading not in anchors(target)):
            broken.append(f"{file}#{heading}" if heading else file)
    return broken


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as MkDocs and GitHub name them."""
    headings = HEADING.findall(FENCED.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def commands_in(block: Block) -> Iterator[list[str]]:
    """Yield the arguments of each `memdml` or `python -m lightning_memdml` in a block of shell commands."""
    for line in block.code.replace("\\\n", " ").splitlines():
        if block.language == "console" and not line.startswith("$ "):
            continue  # printed by the command above
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if "memdml" in words:
            yield words[words.index("memdml") + 1 :]
        elif "lightning_memdml" in words:
            yield words[words.index("lightning_memdml") + 1 :]


class Parsed(BaseException):
    """Stops a command once its arguments are parsed."""


def parse_command(words: list[str], where: str) -> None:
    """Let the command line parse the arguments of `memdml`, and stop there.

    Raises:
        AssertionError: If it refuses them, or does more than parse.
    """
    arguments = [str(CHECKPOINT) if word.endswith(".ckpt") and not Path(word).exists() else word for word in words]
    depth = 0

    def stop_after(parse: Any, only: str | tuple[str, ...] = "") -> Any:
        def parsed(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                result = parse(self, *args, **kwargs)
            finally:
                depth -= 1
            if depth == 0 and self.prog.endswith(only):  # not the parser of a class inside
                raise Parsed
            return result

        return parsed

    def stop(*_: Any, **__: Any) -> None:
        raise Parsed

    error = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(error), contextlib.redirect_stdout(error):
        patch.setattr("sys.argv", ["memdml"])
        patch.setattr(jsonargparse.ArgumentParser, "parse_args", stop_after(jsonargparse.ArgumentParser.parse_args))
        known = argparse.ArgumentParser.parse_known_args
        patch.setattr(
            argparse.ArgumentParser,
            "parse_known_args",
            stop_after(known, ("memdml study", "memdml configs", "memdml demo")),
        )
        patch.setattr(LightningCLI, "instantiate_classes", stop)
        shown = f"{where}: `memdml {shlex.join(words)}`"
        try:
            main(arguments)
        except Parsed:
            return
        except SystemExit as stopped:
            if stopped.code in (0, None):  # --help, --version
                return
            said = stopped.code if isinstance(stopped.code, str) else error.getvalue()
            raise AssertionError(f"{shown} cannot be parsed: {said}") from None
        raise AssertionError(f"{shown} ran, although it was only to be parsed")
