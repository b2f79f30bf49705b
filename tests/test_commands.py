"""The table of commands: every command has help, a function and documentation, and wrong names lead to right ones."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from lightning_memdml.cli import main
from lightning_memdml.commands import COMMANDS, Command, help_text, unknown_command

WITHOUT_TORCH = """
import sys
from lightning_memdml.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
heavy = {"torch", "lightning", "numpy", "jsonargparse", "yaml"} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_help_in_one_line_and_a_function(name: str) -> None:
    command = COMMANDS[name]
    assert command.help.endswith(".")
    assert len(command.help) <= 90
    module, _, function = command.function.partition(":")
    assert callable(getattr(import_module(module), function))
    assert f"  {name} " in help_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_a_help_of_its_own(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["memdml"])
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "--help" in printed
    assert f" {name}" in printed.splitlines()[0]


def test_the_documentation_is_made_from_the_table() -> None:
    page = (Path(__file__).parents[1] / "docs" / "command_line.md").read_text()
    assert "<!-- all commands -->" in page


def test_a_command_from_elsewhere_is_one_entry_and_one_function(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_command.py").write_text("def greet(arguments):\n    print('hello', *arguments)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    monkeypatch.setitem(COMMANDS, "greet", Command("Greet.", "my_command:greet"))
    monkeypatch.setattr(sys, "argv", ["memdml"])
    main(["greet", "you"])
    assert capsys.readouterr().out == "hello you\n"
    main(["greet", "--help"])  # which is for the function
    assert capsys.readouterr().out == "hello --help\n"
    assert "  greet " in help_text()
    assert "Did you mean 'greet'?" in unknown_command("gret")


@pytest.mark.parametrize(
    ("line", "code", "expected"),
    [
        ("--help", 0, "usage: memdml COMMAND"),
        ("-h", 0, "usage: memdml COMMAND"),
        ("--version", 0, "memdml "),
        ("", 2, "error: Expected a command: fit, "),
        ("fti", 2, "error: There is no command 'fti'. Did you mean 'fit'?"),
    ],
)
def test_help_version_and_unknown_commands_need_no_torch(line: str, code: int, expected: str) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout if code == 0 else done.stderr).startswith(expected)
    assert done.returncode == code, done.stderr


@pytest.mark.parametrize(
    ("name", "meant"),
    [("train", "fit"), ("evaluate", "test"), ("embed", "predict"), ("query", "search"), ("curves", "weight-curves")],
)
def test_names_of_other_programs_lead_to_the_command(name: str, meant: str) -> None:
    assert unknown_command(name).startswith(f"There is no command {name!r}. Did you mean {meant!r}? There are fit, ")


def test_a_far_off_name_gets_the_list() -> None:
    assert unknown_command("no-such") == f"There is no command 'no-such'. There are {', '.join(COMMANDS)}."
