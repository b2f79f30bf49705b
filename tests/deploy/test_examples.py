"""The programs in `examples/`: short, and what they do is what the commands do."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from support.children import load
from support.command_line import Command
from support.pages import REPOSITORY
from support.workshop import LAST

from lightning_memdml.deploy.search_command import search_images

EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))


@pytest.fixture
def example() -> ModuleType:
    return load(str(REPOSITORY / "examples" / "search_by_image.py"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_an_example_is_short_and_says_how_it_is_run(file: Path) -> None:
    text = file.read_text()
    code = text.partition('"""\n\n')[2]  # after what it says of itself
    assert code.count("\n") <= 40
    assert f"\n    python examples/{file.name}" in text
    assert f"(../examples/{file.name})" in (REPOSITORY / "docs" / "evaluation.md").read_text()


def test_the_page_finds_what_the_command_finds(example: ModuleType, memdml: Command, tmp_path: Path) -> None:
    memdml(f"index --ckpt_path {LAST} --output {tmp_path}/index")
    search = example.Search(f"{tmp_path}/index")
    path = "pictures/5 blue/2.png"
    with Image.open(path) as picture:
        found = search(picture, 4)
    similarity, position = search_images([path], f"{tmp_path}/index", k=4)
    named = search.index.images
    for (picture, caption), row, score in zip(found, position[0].tolist(), similarity[0].tolist(), strict=True):
        assert caption == f"{named.classes[row]}, {score:.3f}"
        with Image.open(named.paths[row]) as file:
            assert picture.tobytes() == file.convert("RGB").tobytes()
    assert found[0][1] == "5 blue, 1.000"
    assert search(None) == []


@pytest.mark.filterwarnings("ignore")  # those of Gradio
def test_the_page_can_be_made(example: ModuleType) -> None:
    pytest.importorskip("gradio", reason="the page is one of Gradio, which is not installed")
    page = example.make_page(lambda picture, count: [])
    kinds = [block.get_block_name() for block in page.blocks.values()]
    assert {"image", "slider", "gallery"} <= set(kinds)
