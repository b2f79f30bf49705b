"""The base of all HTML pages: one file with its pictures, without scripts and outside addresses, in light and dark."""

from __future__ import annotations

import base64
from html import escape


def html_page(title: str, introduction: str, body: str, style: str) -> str:
    """Return a whole page.

    Args:
        title: Text of the heading; it is escaped here.
        introduction: HTML below the heading.
        body: HTML of the page.
        style: CSS of this kind of page, after the common one.

    Example:
        >>> "<h1>a &lt; b</h1>" in html_page("a < b", "", "", "")
        True
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p>{introduction}</p>
</header>
<main>
{body}
</main>
</body>
</html>
"""


def html_picture(content: bytes, kind: str, alternative: str) -> str:
    """Return a picture that lies in the page, and fills the window while it is clicked or chosen by the space key.

    Args:
        content: The picture's file.
        kind: `png` or `jpeg`.
        alternative: What the picture shows, as text; it is escaped here.
    """
    address = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    words = escape(alternative)
    return (
        f'<label class="zoom"><input type="checkbox" aria-label="enlarge"><img src="{address}" alt="{words}"></label>'
    )


_STYLE = """
:root {
  --paper: #f7f8fa; --card: #fff; --ink: #1d2433; --faint: #6b7486; --line: #e3e6ec;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171d; --card: #1c2129; --ink: #e6e9ef; --faint: #98a1b3; --line: #2e3541;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 1500px;
  background: var(--paper); color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere;
}
h1 { margin: 0 0 .25rem; font-size: 1.5rem; letter-spacing: -.01em; }
header p { margin: 0 0 1.5rem; color: var(--faint); }
section { background: var(--card); border-radius: 12px; box-shadow: 0 1px 3px rgb(0 0 0 / .12); }
.zoom { display: block; position: relative; cursor: zoom-in; }
.zoom input { position: absolute; opacity: 0; pointer-events: none; }
.zoom input:focus-visible + img { outline: 3px solid var(--faint); outline-offset: 2px; }
.zoom input:checked + img {
  position: fixed; inset: 0; z-index: 1; width: 100vw; height: 100vh; max-width: none; margin: 0; padding: 2vmin;
  border: 0; border-radius: 0; object-fit: contain; background: rgb(0 0 0 / .85); cursor: zoom-out;
}
"""
