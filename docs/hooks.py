"""What MkDocs does beside its plugins when it builds the documentation site.

Pages of the repository outside `docs/` become part of the site, formulas become MathML, which browsers draw without a
script, and the page of the command line shows the help of the commands.
"""

from __future__ import annotations

import html
import json
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Beside `docs/`.
OUTSIDE = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "experiments/**/*", "examples/*")
SUFFIXES = {".md", ".png", ".yaml", ".py", ".csv", ""}
LINK = re.compile(r"(\]\()(?![a-z]+:|#|/)([^)\s#]+)")
COMMANDS = "<!-- all commands -->"  # their table and their help take its place
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures of the repository that lie outside `docs/`. The README is the first page."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and path.suffix in SUFFIXES:
                level = InclusionLevel.NOT_IN_NAV if "results" in path.parts else InclusionLevel.INCLUDED
                files.append(File.generated(config, _place(path), abs_src_path=str(path), inclusion=level))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    source = Path(page.file.abs_src_path or "").parent
    here = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(source / match[2]))
        return match[1] + posixpath.relpath(_place(target), here or ".")

    markdown = LINK.sub(moved, markdown)
    return markdown.replace(COMMANDS, describe_commands()) if COMMANDS in markdown else markdown


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn formulas into MathML."""

    def drawn(match: re.Match[str]) -> str:
        return convert(html.unescape(match[2]).strip(), display="block" if match[1] == "div" else "inline")

    return FORMULA.sub(drawn, content)


def describe_commands() -> str:
    """Return a table of all commands and the help of each, from one process, since starting one takes seconds."""
    script = r"""
import contextlib, io, json, sys
from lightning_memdml.cli import main
from lightning_memdml.commands import COMMANDS

shown, functions = {}, set()
sys.argv[0] = "memdml"
for name, command in COMMANDS.items():
    printed = io.StringIO()
    if command.function not in functions:  # validate, test and predict take the options of fit
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([name, *(["check"] if name == "data" else []), "--help"])
    functions.add(command.function)
    shown[name] = command.help, printed.getvalue().strip().replace(" \b", "")  # a backspace of jsonargparse
print(json.dumps(shown))
"""
    environment = {**os.environ, "COLUMNS": "88", "NO_COLOR": "1"}
    printed = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    shown: dict[str, tuple[str, str]] = json.loads(printed.stdout.splitlines()[-1])
    rows = [f"| `memdml {name}` | {line} |" for name, (line, _) in shown.items()]
    helps = [
        f'## memdml {name}\n\n<details markdown="1"><summary>Help</summary>\n\n```text\n{text}\n```\n\n</details>'
        for name, (_, text) in shown.items()
        if text
    ]
    return "\n\n".join(["\n".join(["| command | what it does |", "|---|---|", *rows]), *helps])


def _place(path: Path) -> str:
    """Return where a file of the repository lies in the site."""
    inside = path.relative_to(ROOT).as_posix()
    return "index.md" if inside == "README.md" else inside.removeprefix("docs/")
