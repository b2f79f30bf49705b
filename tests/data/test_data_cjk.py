"""The Chinese and Korean characters: fonts found or named, exact counts, and pictures that are drawn once."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.font_manager
import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from lightning_memdml.data import cjk
from lightning_memdml.data.cjk import HAN, HANGUL, CJKDataModule, Font, class_sizes, common_characters, find_fonts

OWN = (
    Font("First", "first.ttf", 0, (HAN, HANGUL), "none", "fonts-first"),
    Font("Second", "second.ttf", 0, (HAN, HANGUL), "none", "fonts-second"),
    Font("Third", "third.ttf", 0, (HAN,), "none", "fonts-third"),
)


def draw_font(path: Path, codes: list[int], slant: int) -> None:
    """Write a font in which each character is a box of its own width, with a slant."""
    glyphs = {".notdef": TTGlyphPen(None).glyph()}
    for code in codes:
        pen = TTGlyphPen(None)
        width = 200 + 37 * (code % 17)
        corners = [(100, 0), (100 + width, 0), (100 + width + slant, 700), (100 + slant, 700)]
        pen.moveTo(corners[0])
        for corner in corners[1:]:
            pen.lineTo(corner)
        pen.closePath()
        glyphs[f"c{code:04X}"] = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([*glyphs])
    builder.setupCharacterMap({code: f"c{code:04X}" for code in codes})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupPost()
    builder.save(path)


@pytest.fixture
def fonts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the fonts `OWN`; the system has no others."""
    folder = tmp_path / "fonts"
    folder.mkdir()
    han, hangul = [*HAN[:30]], [*HANGUL[:20]]
    draw_font(folder / "first.ttf", han + hangul, 0)
    draw_font(folder / "second.ttf", han[1:] + hangul, 60)
    draw_font(folder / "third.ttf", han[:-2], 120)
    monkeypatch.setattr(cjk, "FONTS", OWN)
    monkeypatch.setattr(matplotlib.font_manager, "findSystemFonts", lambda: [str(file) for file in folder.iterdir()])
    return folder


def made(tmp_path: Path, **options: object) -> CJKDataModule:
    data = CJKDataModule(cache_dir=str(tmp_path / "cache"), **{"num_classes": 40, "batch_size": 8, **options})
    data.setup()
    return data


def test_the_sizes_of_the_classes_sum_to_those_of_stanford_online_products() -> None:
    train, test = class_sizes(11_318, 59_551 / 11_318), class_sizes(11_316, 60_502 / 11_316)
    assert (train.sum(), test.sum()) == (59_551, 60_502)
    for sizes in (train, test):
        assert (sizes.min(), sizes.max()) == (2, 12)
        assert np.bincount(sizes)[2:].tolist() == sorted(np.bincount(sizes)[2:], reverse=True)


def test_a_character_needs_all_fonts_of_its_script(fonts: Path) -> None:
    found = common_characters(find_fonts())
    assert [*found] == [*HAN[1:28], *HANGUL[:20]]
    assert {len(having) for code, having in found.items() if code in HAN} == {3}
    assert {len(having) for code, having in found.items() if code in HANGUL} == {2}


def test_counts_and_labels_of_the_sets(fonts: Path, tmp_path: Path) -> None:
    data = made(tmp_path, val_fraction=0.2)
    sets = (data.train_set, data.val_set, data.query_set)
    assert [len(part.labels.unique()) for part in sets] == [16, 4, 20]
    assert sum(map(len, sets)) == round(20 * 59_551 / 11_318) + round(20 * 60_502 / 11_316)
    assert data.gallery_set is data.query_set
    sizes = torch.cat([part.labels.unique(return_counts=True)[1] for part in sets])
    assert 2 <= sizes.min() < sizes.max() <= 12
    image, label, index = data.query_set[3]
    assert (image.shape, image.dtype, image.max() > 0.9) == ((1, 32, 32), torch.float32, True)
    assert data.classes[label] == chr(int(data.query_set.paths[index].partition("/")[0][2:], 16))


def test_pictures_of_a_character_use_every_font_before_one_is_used_again(fonts: Path, tmp_path: Path) -> None:
    _, codes, names, _ = made(tmp_path).pictures
    for code in set(codes):
        used = [name for one, name in zip(codes, names, strict=True) if one == code]
        having = 3 if code in HAN else 2
        assert len(set(used[:having])) == min(having, len(used))


def test_pictures_are_the_same_on_every_machine_and_drawn_once(
    fonts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = made(tmp_path / "a").pictures, made(tmp_path / "b").pictures
    assert first.images.equal(again.images)
    assert first[1:] == again[1:]
    assert not first.images.equal(made(tmp_path / "a", distortion=0).pictures.images)
    monkeypatch.setattr(cjk, "draw_pictures", lambda *arguments: pytest.fail("drawn again"))
    assert made(tmp_path / "a").pictures.images.equal(first.images)


def test_other_versions_of_the_fonts_are_drawn_anew(fonts: Path, tmp_path: Path) -> None:
    made(tmp_path)
    draw_font(fonts / "first.ttf", [*HAN[:30], *HANGUL[:21]], 0)
    made(tmp_path)
    assert len(list((tmp_path / "cache").glob("cjk-40-*.npz"))) == 2


def test_a_damaged_cache_is_drawn_again(fonts: Path, tmp_path: Path) -> None:
    images = made(tmp_path).pictures.images
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="are damaged"):
        assert made(tmp_path).pictures.images.equal(images)


def test_missing_fonts_are_named_with_their_packages(fonts: Path, tmp_path: Path) -> None:
    (fonts / "third.ttf").unlink()
    message = (
        "Expected the fonts of `CJKDataModule` but did not find Third. On Debian or Ubuntu, install fonts-third; "
        "elsewhere, copy third.ttf to a folder for fonts. Or draw another data set with the fonts that there are: "
        "allow_missing_fonts=True."
    )
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        made(tmp_path)
    with pytest.warns(UserWarning, match="missing: Third.*do not compare scores"):
        assert len(made(tmp_path, allow_missing_fonts=True).train_set)


def test_too_few_fonts_are_refused_even_if_missing_ones_are_allowed(fonts: Path, tmp_path: Path) -> None:
    (fonts / "second.ttf").unlink()
    with pytest.raises(FileNotFoundError, match=r"did not find Second.*to a folder for fonts\.$"):
        made(tmp_path, allow_missing_fonts=True)


def test_fonts_with_too_few_characters_are_refused(fonts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fonts with 50 characters in common but got 47"):
        made(tmp_path, num_classes=50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 3}, r"`num_classes` in \[4, 22634\] but got 3"),
        ({"num_classes": 22_635}, r"`num_classes` in \[4, 22634\] but got 22635"),
        ({"distortion": -0.1}, "`distortion` of at least 0 but got -0.1"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CJKDataModule(**options)
