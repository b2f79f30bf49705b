"""Neighbours against full sorting, examples against hand-made sets, pictures and pages by their content."""

from __future__ import annotations

import base64
import io
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lightning_memdml.retrieval import (
    gallery_figure,
    gallery_html,
    nearest_neighbours,
    retrieval_examples,
    save_gallery,
)
from lightning_memdml.retrieval.cells import as_picture

# On a circle: 0 and 2 degrees are of class 0, 3 and 90 of class 1, 4.5 of class 2 alone.
DEGREES = torch.tensor([0.0, 2.0, 3.0, 90.0, 4.5]).deg2rad()
CIRCLE, LABELS = torch.stack([DEGREES.cos(), DEGREES.sin()], dim=1), torch.tensor([0, 0, 1, 1, 2])


def coloured(position: int) -> Image.Image:
    return Image.new("RGB", (40, 30), (position * 40, 0, 0))


def sample(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


# Nearest neighbours


@pytest.mark.parametrize("tile", [7, 2048])
def test_neighbours_equal_a_full_sort_without_oneself(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr("lightning_memdml.retrieval.neighbours._TILE", tile)
    embeddings = sample(40, 5, seed=0)
    expected = F.normalize(embeddings, dim=1) @ F.normalize(embeddings, dim=1).T
    expected.fill_diagonal_(-torch.inf)
    value, position = expected.sort(dim=1, descending=True)
    similarity, found = nearest_neighbours(embeddings, k=10)
    torch.testing.assert_close(similarity, value[:, :10])
    assert torch.equal(found, position[:, :10])


def test_chosen_queries_search_a_gallery_and_skip_their_own_number() -> None:
    queries, gallery = sample(6, 4, seed=1), sample(20, 4, seed=2)
    gallery[3] = queries[5]
    chosen = torch.tensor([5, 0])
    similarity, found = nearest_neighbours(queries, gallery, k=2, queries=chosen)
    assert found[0, 0] == 3
    assert similarity[0, 0] == pytest.approx(1)
    numbers = torch.arange(6) + 100
    gallery_numbers = torch.arange(20)
    gallery_numbers[3] = 105
    _, others = nearest_neighbours(
        queries, gallery, k=1, queries=chosen, indices=numbers, gallery_indices=gallery_numbers
    )
    assert others[0, 0] == found[0, 1]
    assert others[1, 0] == found[1, 0]


def test_neighbours_are_searched_in_float32_under_autocast() -> None:
    embeddings = sample(40, 64, seed=4)
    expected = nearest_neighbours(embeddings, k=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        similarity, found = nearest_neighbours(embeddings, k=3)
    assert similarity.dtype == torch.float32
    assert torch.equal(similarity, expected[0])
    assert torch.equal(found, expected[1])


def test_missing_neighbours_are_minus_one() -> None:
    similarity, found = nearest_neighbours(torch.eye(3)[:2], k=5)
    assert found.tolist() == [[1, -1], [0, -1]]
    assert similarity.tolist() == [[0, -torch.inf], [0, -torch.inf]]
    assert nearest_neighbours(torch.zeros(0, 3), torch.eye(3), k=2)[1].shape == (0, 2)


# Examples


def test_hardest_queries_come_first_with_what_they_should_have_found() -> None:
    examples = retrieval_examples(CIRCLE, LABELS, neighbours=2)
    assert [(example.position, example.best_rank) for example in examples] == [(2, 4), (1, 2), (3, 2), (0, 1)]
    hardest = examples[0]  # at 3 degrees: 2, 4.5 and 0 degrees are all nearer than 90
    assert [(neighbour.position, neighbour.right) for neighbour in hardest.neighbours] == [
        (1, False),
        (4, False),
    ]
    assert hardest.best_match is not None
    assert (hardest.best_match.position, hardest.best_match.right) == (3, True)
    assert hardest.best_match.similarity == pytest.approx(math.cos(math.radians(87)), abs=1e-6)


def test_queries_without_a_match_are_drawn_only_on_request() -> None:
    drawn = {example.position for example in retrieval_examples(CIRCLE, LABELS, order="random", count=10)}
    assert drawn == {0, 1, 2, 3}
    (lonely,) = retrieval_examples(CIRCLE, LABELS, queries=[4])
    assert lonely.best_match is None
    assert [neighbour.right for neighbour in lonely.neighbours] == [False] * 4


def test_a_random_draw_repeats_with_its_seed() -> None:
    embeddings, labels = sample(50, 4, seed=3), torch.arange(50) % 10
    draws = [
        [example.position for example in retrieval_examples(embeddings, labels, order="random", seed=seed)]
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_a_separate_gallery_may_hold_the_query_at_any_position() -> None:
    (example,) = retrieval_examples(CIRCLE[:1], LABELS[:1], CIRCLE, LABELS, neighbours=1)
    assert [(neighbour.position, neighbour.right) for neighbour in example.neighbours] == [(0, True)]


def test_a_query_that_is_in_the_gallery_too_does_not_find_its_own_number() -> None:
    """The gallery is the circle backwards; queries 2 and 0 are in it under their numbers."""
    numbers = torch.tensor([14, 13, 12, 11, 10])
    hardest, other = retrieval_examples(
        CIRCLE[[2, 0]], LABELS[[2, 0]], CIRCLE.flip(0), LABELS.flip(0), neighbours=2,
        indices=torch.tensor([12, 10]), gallery_indices=numbers,
    )  # fmt: skip
    assert [(neighbour.position, neighbour.right) for neighbour in hardest.neighbours] == [(3, False), (0, False)]
    assert hardest.best_match is not None
    assert (hardest.position, hardest.best_match.position, hardest.best_rank) == (0, 1, 4)
    assert [(neighbour.position, neighbour.right) for neighbour in other.neighbours] == [(3, True), (2, False)]
    twice = {"indices": torch.tensor([12, 12]), "gallery_indices": numbers}
    with pytest.raises(ValueError, match="each image once"):
        retrieval_examples(CIRCLE[[2, 2]], LABELS[[2, 2]], CIRCLE.flip(0), LABELS.flip(0), **twice)


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="'hardest' or 'random' but got 'worst'"):
        retrieval_examples(CIRCLE, LABELS, order="worst")  # type: ignore[arg-type]


# Figure


def test_the_figure_shows_every_picture_framed_by_its_truth() -> None:
    examples = retrieval_examples(CIRCLE, LABELS, neighbours=2, queries=[2, 0])
    figure = gallery_figure(examples, coloured, class_names=["ant", "bee", "cat"], title="Circle")
    pictures = [int(axes.images[0].get_array()[20, 20, 0]) // 40 for axes in figure.axes]
    assert pictures == [
        2,
        1,
        4,
        3,
        0,
        1,
        2,
    ]  # query 2, its two neighbours, its first right one; query 0 and its two
    frames = [axes.spines["left"].get_linestyle() for axes in figure.axes]
    dashed = [frame not in ("-", "solid") for frame in frames]
    assert dashed == [False, True, True, False, False, False, True]
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts.count("\u2713 1.00") == 1
    assert "rank 4" in texts
    assert {"ant", "bee"} <= set(texts)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_figure_is_written_and_can_be_read(tmp_path: Path, ending: str) -> None:
    path = save_gallery(tmp_path / "new" / f"gallery.{ending}", retrieval_examples(CIRCLE, LABELS), coloured)
    assert path.stat().st_size > 1000
    if ending == "png":
        assert min(Image.open(path).size) > 300


def test_an_unknown_ending_or_nothing_to_show_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ending in \.html"):
        save_gallery(tmp_path / "gallery.gif", retrieval_examples(CIRCLE, LABELS), coloured)
    with pytest.raises(ValueError, match="at least one example to show"):
        gallery_figure([], coloured)


# Page


class Page(HTMLParser):
    """Collects tags with their attributes and the text between them, and that what opens also closes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text, self.open = "", []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("img", "input", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_needs_nothing_from_outside() -> None:
    examples = retrieval_examples(CIRCLE, LABELS, neighbours=2, queries=[2, 0])
    text = gallery_html(examples, coloured, class_names={0: "ant"}, title="Circle")
    page = Page(text)
    assert page.open == []
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 7
    kind, data = pictures[0]["src"].split(",")
    assert kind == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").getpixel((5, 5)) == (80, 0, 0)
    assert not {"script", "link"} & {tag for tag, _ in page.tags}
    assert "http" not in text
    assert "url(" not in text
    kinds = [attributes["class"] for tag, attributes in page.tags if tag == "figure"]
    assert kinds == ["query", "wrong", "wrong", "right first", "query", "right", "wrong"]
    assert "first right one: rank 4" in page.text


def test_names_cannot_become_markup() -> None:
    name = "<script>alert('x')</script> & \"more\""
    text = gallery_html(retrieval_examples(CIRCLE, LABELS), coloured, class_names={0: name, 1: "{braces}"}, title=name)
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert name in page.text
    assert "{braces}" in page.text
    assert any(attributes.get("alt") == f"right: {name}" for _, attributes in page.tags)


def test_large_pictures_are_shrunk_on_the_page() -> None:
    examples = retrieval_examples(CIRCLE, LABELS, queries=[0], neighbours=1)
    page = Page(gallery_html(examples, lambda position: np.zeros((900, 1200, 3), np.uint8)))
    source = next(attributes["src"] for tag, attributes in page.tags if tag == "img")
    assert Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).size == (224, 168)


# Pictures


@pytest.mark.parametrize(
    "image",
    [
        Image.new("L", (3, 2), 255),
        np.full((2, 3), 255, np.uint8),
        np.ones((2, 3, 1)),
        np.full((2, 3, 3), 1.7),
        torch.ones(1, 2, 3),
        torch.full((3, 2, 3), 255, dtype=torch.uint8),
        torch.ones(2, 3, dtype=torch.bfloat16),
    ],
)
def test_all_kinds_of_pictures_become_rgb(image: object) -> None:
    picture = as_picture(image)
    assert (picture.mode, picture.size, picture.getpixel((2, 1))) == ("RGB", (3, 2), (255, 255, 255))


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(TypeError, match="got str"):
        as_picture("bird.jpg")
    with pytest.raises(ValueError, match="shape"):
        as_picture(np.zeros((2, 3, 5)))


def test_a_picture_that_cannot_be_read_leaves_what_was_there(tmp_path: Path) -> None:
    path = save_gallery(tmp_path / "gallery.html", retrieval_examples(CIRCLE, LABELS), coloured)
    before = path.read_text()

    def damaged(position: int) -> Image.Image:
        raise OSError("damaged")

    with pytest.raises(OSError, match="damaged"):
        save_gallery(path, retrieval_examples(CIRCLE, LABELS), damaged)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["gallery.html"]
