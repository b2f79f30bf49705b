"""The retrieval gallery as one HTML page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape

from lightning_memdml.html_page import html_page, html_picture
from lightning_memdml.retrieval.cells import Cell, ClassNames, ImageSource, gallery_rows
from lightning_memdml.retrieval.examples import RetrievalExample

_THUMBNAIL = 224  # pixels; larger pictures are shrunk, smaller ones kept as they are


def gallery_html(
    examples: Sequence[RetrievalExample],
    image: ImageSource,
    gallery_image: ImageSource | None = None,
    *,
    class_names: ClassNames = None,
    title: str = "",
) -> str:
    """Return the gallery as one HTML page: with its pictures, without scripts and outside addresses.

    Args:
        examples: From `retrieval_examples`.
        image: Returns the picture of a query by its position.
        gallery_image: Returns that of a reference; by default `image`.
        class_names: Name of each label; the label itself where there is none.
        title: A heading.

    Raises:
        ValueError: If there is no example.
    """
    rows = gallery_rows(examples, image, gallery_image, class_names)
    judged = any(cell.kind in ("right", "wrong") for row in rows for cell in row)
    count = f"{len(rows)} {'query' if len(rows) == 1 else 'queries'}"
    introduction = f"{count}, each with its nearest neighbours by cosine similarity.{GALLERY_LEGEND if judged else ''}"
    return html_page(title or "Retrieval gallery", introduction, gallery_sections(rows), GALLERY_STYLE)


def gallery_sections(rows: Sequence[Sequence[Cell]]) -> str:
    """Return the rows of a gallery as HTML, for a page with `GALLERY_STYLE`."""
    return "\n".join(f'<section class="row">{"".join(map(_figure, row))}</section>' for row in rows)


def _figure(cell: Cell) -> str:
    facts = "" if cell.kind == "query" else f"<b>{escape(cell.facts)}</b>"
    name = escape(cell.name)
    rank = f"<small>first right one: {escape(cell.rank)}</small>" if cell.rank else ""
    return (
        f'<figure class="{cell.kind}{" first" if cell.rank else ""}">{_picture(cell)}'
        f'<figcaption>{facts}<span title="{name}">{name}</span>{rank}</figcaption></figure>'
    )


def _picture(cell: Cell) -> str:
    """Return the picture; a small one without loss, since characters suffer from JPEG."""
    picture = cell.picture.copy()
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    kind = "png" if max(picture.size) <= 64 else "jpeg"
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, quality=88)
    return html_picture(buffer.getvalue(), kind, f"{cell.kind}: {cell.name}")


GALLERY_LEGEND = """
<b class="right">✓ solid</b> same class <b class="wrong">✗ dashed</b> another class"""

GALLERY_STYLE = """
:root { --query: #33415c; --right: #1a7f4b; --wrong: #c8323c; --found: #8a93a5; }
@media (prefers-color-scheme: dark) {
  :root { --query: #9fb3da; --right: #4fc487; --wrong: #ff7b81; --found: #6f7a8e; }
}
header b { margin-left: .75rem; color: var(--edge); }
.query { --edge: var(--query); }
.right { --edge: var(--right); }
.wrong { --edge: var(--wrong); }
.found { --edge: var(--found); }
.found b { color: var(--ink); }
.row { display: flex; flex-wrap: wrap; gap: .75rem; align-items: flex-start; margin-bottom: 1rem; padding: .9rem; }
figure { flex: 0 0 124px; margin: 0; }
figure.query { margin-right: 1rem; }
figure.first { margin-left: 1rem; }
figure img {
  display: block; width: 124px; height: 124px; padding: 3px; object-fit: contain;
  border: 3px solid var(--edge); border-radius: 8px; background: var(--card);
}
.wrong img { border-style: dashed; }
figcaption { margin-top: .35rem; font-size: 12px; color: var(--ink); }
figcaption b, .query span { color: var(--edge); font-weight: 600; font-variant-numeric: tabular-nums; }
figcaption span, small { display: block; }
figcaption span { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 7; overflow: hidden; }
/* On a phone a row scrolls; the cut picture at the edge shows that it does. */
@media (max-width: 640px) { .row { flex-wrap: nowrap; overflow-x: auto; } }
small { color: var(--faint); }
"""
