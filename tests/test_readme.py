"""The README's code runs as it stands."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_block_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {"__name__": "__main__"} | _names_before(number))


def _names_before(number: int) -> dict:
    """Later blocks go on where the light ones before them ended; the training of the first is not repeated."""
    names: dict = {}
    for block in BLOCKS[1:number]:
        exec(block, names)
    return names


def test_the_first_screen_holds_the_commands_the_table_and_the_drop_in_diff():
    screen = "\n".join(README.splitlines()[:65])
    for wanted in ("memdml fit", "make demo", "```python", "| Recall@1 %", "```diff"):
        assert wanted in screen
