"""The code on the pages runs, prints what the page shows, and names commands and options that exist."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.pages import PAGES, REPOSITORY, broken_links, read_blocks, run_page

import lightning_memdml


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_code_on_the_page_works(page: Path, tmp_path: Path, glyph_cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_MEMDML_CACHE", glyph_cache)
    monkeypatch.syspath_prepend(str(tmp_path))  # a page may write a module and import it
    run_page(page, tmp_path)


LINKED = sorted({*PAGES, REPOSITORY / "CHANGELOG.md", *(REPOSITORY / "experiments").rglob("*.md")})


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `word`, or two\n[a](#a-word-or-two) [b](#other) [c](page.md#a-word-or-two) [d](no.md) [e](https://f.g)"
    )
    assert broken_links(page) == ["#other", "no.md"]


def test_the_first_screen_holds_the_commands_the_table_and_the_drop_in_diff() -> None:
    screen = "\n".join((REPOSITORY / "README.md").read_text().splitlines()[:65])
    for wanted in ("memdml fit", "make demo", "```python", "| Recall@1 %", "```diff"):
        assert wanted in screen


def test_the_reference_has_every_public_name() -> None:
    reference = "".join(page.read_text() for page in (REPOSITORY / "docs/api").glob("*.md"))
    assert [name for name in lightning_memdml.__all__ if f".{name}\n" not in reference] == []


# The checks themselves

WRONG_PAGES = {
    "another output": ("```python\nprint(1 + 1)\n```\n\n```text\n3\n```", "line 6: expected the code to print\n3"),
    "another comment": ("```python\nprint(2)  # -> 2\nprint(3)  # -> 4\n```", "to print\n2\n4\nbut got\n2\n3"),
    "an unknown option": ("```console\n$ memdml fit --trainer.max_stepping 3\n```", "cannot be parsed"),
    "an unknown option of a class": (
        "```console\n$ memdml test --ckpt_path last.ckpt \\\n    --data FolderDataModule --data.rot a\n```",
        "cannot be parsed",
    ),
    "an unknown option of a command of our own": ("```bash\nmemdml index --outputs here\n```", "cannot be parsed"),
    "an unknown command": ("```console\n$ python -m lightning_memdml fitt\n```", "cannot be parsed"),
    "a skipped block without a reason": ("<!-- not run: -->\n```python\nassert 1 > 2\n```", ""),
}


@pytest.mark.parametrize("name", WRONG_PAGES)
def test_a_wrong_page_fails(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, message = WRONG_PAGES[name]
    (tmp_path / "page.md").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError) as error:
        run_page(tmp_path / "page.md", tmp_path)
    assert message in str(error.value)


RIGHT_PAGE = """
A page.

```python title="doubled.py"
def double(number):
    return 2 * number
```

1. In a list:

    ```python
    from doubled import double

    for number in range(2):
        print("about", double(number))
    ```

    ```text
    about 0
    about ...
    ```

```python
print(double(4))  # -> 8
```

```text
8
```

```console
$ memdml fit --config glyphs_batch --model.loss ContrastiveLoss --model.loss.margin 0.3 \\
    --data FolderDataModule --data.root my/images   # a comment
trained
$ torchrun --nproc-per-node 2 -m lightning_memdml test --ckpt_path runs/last.ckpt
$ memdml study doubled.yaml --dry_run
$ memdml index --ckpt_path runs/last.ckpt --source my/images
$ memdml --help
```

<!-- not run: it needs a GPU with much memory -->
```python
raise RuntimeError
```
"""


def test_a_right_page_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.md").write_text(RIGHT_PAGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [block.language for block in read_blocks(RIGHT_PAGE)] == [
        "python", "python", "text", "python", "text", "console", "python",
    ]  # fmt: skip
    run_page(tmp_path / "page.md", tmp_path)
    assert not (tmp_path / "runs").exists()
