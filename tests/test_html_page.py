"""Pages hold text as text, and pictures inside."""

from __future__ import annotations

import base64
from html import unescape

from lightning_memdml.html_page import html_page, html_picture
from lightning_memdml.picture_style import as_label


def test_a_title_and_an_alternative_text_cannot_become_markup() -> None:
    name = "<script>alert('x')</script> & \"more\" {braces}"
    page = html_page(name, "", html_picture(b"content", "png", name), "")
    assert "<script" not in page
    assert page.count("{braces}") == 3  # window title, heading, alternative text
    assert unescape(page).count(name) == 3
    assert f"data:image/png;base64,{base64.b64encode(b'content').decode()}" in page


def test_a_page_asks_for_nothing_and_has_a_light_and_a_dark_form() -> None:
    page = html_page("t", "", "", "")
    assert "prefers-color-scheme: dark" in page
    assert not [word for word in ("http", "url(", "<link", "<script") if word in page]


def test_a_label_is_drawn_as_it_is() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    figure.text(0, 0, as_label("$x_{ and \x1b[31m$$ \\alpha"))
    figure.canvas.draw()  # an unfinished formula would raise
