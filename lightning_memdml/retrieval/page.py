"""The retrieval gallery as one HTML page that needs nothing from outside."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

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
    """Write the gallery as one HTML page: pictures inside, no script, no outside address, light and dark.

    Args:
        examples: From `retrieval_examples`.
        image: Gives the picture of a query by its position.
        gallery_image: Gives that of a reference; the same as `image` in self-retrieval.
        class_names: Name of each label; the label itself where there is none.
        title: A heading.

    Raises:
        ValueError: If there is no example.
    """
    rows = gallery_rows(examples, image, gallery_image, class_names)
    sections = "\n".join(f"<section>{''.join(map(_figure, row))}</section>" for row in rows)
    heading = escape(title or "Retrieval gallery")
    judged = any(cell.kind in ("right", "wrong") for row in rows for cell in row)
    count = f"{len(rows)} {'query' if len(rows) == 1 else 'queries'}"
    return _PAGE.format(title=heading, count=count, legend=_LEGEND if judged else "", sections=sections, style=_STYLE)


def _figure(cell: Cell) -> str:
    name = escape(cell.name)
    facts = "" if cell.kind == "query" else f"<b>{cell.facts}</b>"
    rank = f"<small>first right one: {cell.rank}</small>" if cell.rank else ""
    return (
        f'<figure class="{cell.kind}{" first" if cell.rank else ""}">'
        f'<img src="{_data_address(cell.picture)}" alt="{cell.kind}: {name}">'
        f"<figcaption>{facts}<span>{name}</span>{rank}</figcaption></figure>"
    )


def _data_address(picture: Image.Image) -> str:
    """The picture inside an address; small ones without loss, since glyphs suffer from JPEG."""
    picture = picture.copy()
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    kind = "png" if max(picture.size) <= 64 else "jpeg"
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p>{count}, each with its nearest neighbours by cosine similarity.{legend}</p>
</header>
<main>
{sections}
</main>
</body>
</html>
"""

_LEGEND = """
<b class="right">✓ solid</b> same class <b class="wrong">✗ dashed</b> another class"""

_STYLE = """
:root {
  --paper: #f7f8fa; --card: #fff; --ink: #1d2433; --faint: #6b7486;
  --query: #33415c; --right: #1a7f4b; --wrong: #c8323c; --found: #8a93a5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171d; --card: #1c2129; --ink: #e6e9ef; --faint: #98a1b3;
    --query: #9fb3da; --right: #4fc487; --wrong: #ff7b81; --found: #6f7a8e;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 1500px;
  background: var(--paper); color: var(--ink);
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { margin: 0 0 .25rem; font-size: 1.5rem; letter-spacing: -.01em; }
header p { margin: 0 0 1.5rem; color: var(--faint); }
header b { margin-left: .75rem; color: var(--edge); }
.query { --edge: var(--query); }
.right { --edge: var(--right); }
.wrong { --edge: var(--wrong); }
.found { --edge: var(--found); }
.found b { color: var(--ink); }
section {
  display: flex; gap: .75rem; align-items: flex-start; overflow-x: auto;
  margin-bottom: 1rem; padding: .9rem; background: var(--card);
  border-radius: 12px; box-shadow: 0 1px 3px rgb(0 0 0 / .12);
}
figure { flex: 0 0 124px; margin: 0; }
figure.query { margin-right: 1rem; }
figure.first { margin-left: 1rem; }
img {
  display: block; width: 124px; height: 124px; padding: 3px; object-fit: contain;
  border: 3px solid var(--edge); border-radius: 8px; background: var(--card);
}
.wrong img { border-style: dashed; }
figcaption { margin-top: .35rem; font-size: 12px; color: var(--ink); overflow-wrap: anywhere; }
figcaption b, .query span { color: var(--edge); font-weight: 600; font-variant-numeric: tabular-nums; }
figcaption span, small { display: block; }
small { color: var(--faint); }
"""
