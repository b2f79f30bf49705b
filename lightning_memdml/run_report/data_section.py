"""The section about the data: sizes of the sets, and pictures that look the same."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import PurePath
from typing import Any

from torch import Tensor

from lightning_memdml.html_page import html_picture
from lightning_memdml.retrieval.cells import name_of
from lightning_memdml.run_report.duplicates import ALIKE, Pair, near_duplicates

PAIRS_SHOWN = 6


def data_section(sets: Mapping[str, Any], classes: Sequence[str] | None) -> str:
    """Return the sizes of the sets of a data module, and pictures that look the same.

    Args:
        sets: What a set is for -> its images; none is empty.
        classes: Name of each label.
    """
    rows = []
    for name, images in sets.items():
        counts: Tensor = images.labels.unique(return_counts=True)[1]
        spread = f"{int(counts.min()):,} to {int(counts.max()):,}, median {float(counts.median()):g}"
        rows.append(
            f"<tr><th>{escape(name)}</th><td>{len(images):,}</td><td>{len(counts):,}</td><td>{spread}</td></tr>"
        )
    head = "<tr><th>set</th><th>images</th><th>classes</th><th>images per class</th></tr>"
    table = f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'
    if not all(getattr(images, "has_pictures", False) for images in sets.values()):
        return table
    return table + _duplicates(sets, classes)


def _duplicates(sets: Mapping[str, Any], classes: Sequence[str] | None) -> str:
    names, images = list(sets), list(sets.values())
    pairs, compared = near_duplicates(images)
    total = sum(map(len, images))
    among = f"{compared:,} images" if compared == total else f"{compared:,} of {total:,} images"
    if not pairs:
        return f"<p>No near-duplicates among {among}.</p>"

    def is_harmful(pair: Pair) -> bool:
        return pair.first[0] != pair.second[0] or _label(images, pair.first) != _label(images, pair.second)

    harmful = sum(map(is_harmful, pairs))
    shown = sorted(pairs, key=lambda pair: not is_harmful(pair))[:PAIRS_SHOWN]
    sides = [[_side(names, images, place, classes) for place in (pair.first, pair.second)] for pair in shown]
    cells = "".join(f'<div class="pair">{"".join(pair)}</div>' for pair in sides)
    return (
        f"<h3>Near-duplicates</h3><p>Pairs of pictures that look the same: {len(pairs):,}, among {among}. Pairs "
        f"that lie in two sets or in two classes, which spoil scores or labels: {harmful:,}. Compared are grey "
        f'thumbnails of 16 x 16 pixels, which correlate by at least {ALIKE}.</p><div class="pairs">{cells}</div>'
    )


def _label(images: Sequence[Any], place: tuple[int, int]) -> int:
    return int(images[place[0]].labels[place[1]])


def _side(names: Sequence[str], images: Sequence[Any], place: tuple[int, int], classes: Sequence[str] | None) -> str:
    picture = images[place[0]].picture(place[1]).convert("RGB")
    picture.thumbnail((160, 160))
    buffer = io.BytesIO()
    picture.save(buffer, format="png" if max(picture.size) <= 64 else "jpeg", quality=85)
    kind = "png" if max(picture.size) <= 64 else "jpeg"
    name, file = name_of(_label(images, place), classes), PurePath(images[place[0]].paths[place[1]]).name
    words = f"{names[place[0]]}: {name}"
    return (
        f"<figure>{html_picture(buffer.getvalue(), kind, words)}<figcaption>{escape(words)}"
        f"<small>{escape(file)}</small></figcaption></figure>"
    )
