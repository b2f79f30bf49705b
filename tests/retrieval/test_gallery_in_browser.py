"""The gallery page in a real browser: everything on it is drawn, and nothing is asked of the network."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_memdml.retrieval import gallery_html, retrieval_examples

# The page has no script; the test adds one that measures what the browser has made of it.
MEASURE = """<script>
window.onload = () => {
  const boxes = [...document.querySelectorAll("figure")].map(figure => figure.getBoundingClientRect());
  const say = (name, value) => { document.body.dataset[name] = value; };
  say("loaded", [...document.images].filter(image => image.complete && image.naturalWidth > 0).length);
  say("wide", document.documentElement.scrollWidth - window.innerWidth);
  say("rows", new Set(boxes.map(box => box.top)).size);
  say("frame", getComputedStyle(document.querySelector(".wrong img")).borderTopStyle);
  say("requests", performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:")).length);
};
</script>"""
Browse = Callable[..., str]
COLOURS = [(200, 30, 30), (30, 160, 60), (40, 60, 200), (230, 190, 20)]


def picture(position: int) -> Image.Image:
    return Image.new("RGB", (300, 200), COLOURS[position])


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Four queries of two classes, each of which finds one of the other class first."""
    degrees = torch.tensor([0.0, 30.0, 10.0, 40.0]).deg2rad()
    embeddings = torch.stack([degrees.cos(), degrees.sin()], dim=1)
    examples = retrieval_examples(embeddings, torch.tensor([0, 0, 1, 1]), neighbours=3, queries=[0, 1, 2, 3])
    path = tmp_path / "gallery.html"
    path.write_text(gallery_html(examples, picture, class_names=["ant", "<b>bee"], title="Insects"), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [1280, 500])
def test_every_picture_is_drawn_and_the_page_fits_the_window(page: Path, width: int, browse: Browse) -> None:
    page.write_text(page.read_text().replace("</body>", f"{MEASURE}</body>"))
    shown = browse(page, f"--window-size={width},1000", "--virtual-time-budget=5000", "--dump-dom")
    said = dict(re.findall(r'data-(\w+)="([^"]*)"', re.search(r"<body[^>]*>", shown)[0]))  # type: ignore[index]
    assert said["loaded"] == "16"
    assert int(said["wide"]) <= 0  # rows scroll by themselves where the window is narrow
    assert (said["rows"], said["frame"], said["requests"]) == ("4", "dashed", "0")


def test_what_is_seen_has_the_pictures_and_the_colours_of_right_and_wrong(
    page: Path, tmp_path: Path, browse: Browse
) -> None:
    browse(page, "--window-size=1280,1000", f"--screenshot={tmp_path}/seen.png")
    seen = np.asarray(Image.open(tmp_path / "seen.png").convert("RGB")).astype(int)

    def pixels(colour: tuple[int, int, int]) -> int:
        return int((np.abs(seen - colour).max(axis=2) <= 6).sum())

    # Each picture is shown four times, 112 pixels wide and two thirds as high.
    for colour in COLOURS:
        assert pixels(colour) == pytest.approx(4 * 112 * 75, rel=0.1)
    frame = 4 * 3 * 124 * 4  # of one reference per query that is right, two are wrong and dashed
    assert pixels((0x1A, 0x7F, 0x4B)) == pytest.approx(frame, rel=0.2)
    assert 0.7 * frame < pixels((0xC8, 0x32, 0x3C)) < 2 * frame
