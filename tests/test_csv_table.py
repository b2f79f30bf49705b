"""Tables are read back as they were written, and hold no formulas."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lightning_memdml.csv_table import write_csv


def read(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file, strict=True))


@pytest.mark.parametrize("text", ["<script>", 'a "b", c', "one\ntwo", "a|b", "café שלום", ""])
def test_any_text_is_read_back(text: str, tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", ["name", "value"], [[text, 1]])
    assert read(tmp_path / "t.csv") == [["name", "value"], [text, "1"]]


@pytest.mark.parametrize("text", ['=HYPERLINK("http://x")', "+1", "-1", "@x", "\tx"])
def test_a_text_that_looks_like_a_formula_is_marked_as_text(text: str, tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", [text], [[text]])
    assert read(tmp_path / "t.csv") == [[f"'{text}"], [f"'{text}"]]


def test_numbers_keep_their_sign_and_missing_ones_are_empty(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", ["a", "b", "c", "d"], [[-0.1234567891, float("nan"), None, -3]], ".7g")
    assert read(tmp_path / "t.csv")[1] == ["-0.1234568", "", "", "-3"]
    write_csv(tmp_path / "t.csv", ["a"], [[-0.1234567891]])
    assert read(tmp_path / "t.csv")[1] == ["-0.1234567891"]
