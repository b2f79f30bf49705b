"""Arms that differ in one number: how far they are above the first, drawn and in a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.studies import results

from lightning_memdml.study.pictures import plot_trend
from lightning_memdml.study.report import write_report
from lightning_memdml.study.tables import trend_table

TREND = {"over": "Size of the memory", "arms": {512: "b", 0: "a", 2048.5: "c"}}
MEANS = {"birds": {"a": 10, "b": 12, "c": 15}}


def test_gains_are_paired_by_seed_and_ordered_by_number(tmp_path: Path) -> None:
    found = results(tmp_path, MEANS, trend=TREND)
    scores = {arm: [100 * one["scores"]["map_at_r"] for one in found.of(arm, "birds")] for arm in "abc"}
    gain = found.gain("b", "a", "birds", "map_at_r")
    assert gain is not None
    assert gain[0] == pytest.approx(np.subtract(scores["b"], scores["a"]).tolist())
    table = trend_table(found, "birds")
    assert [row[:2] for row in table.rows] == [["0", "a"], ["512", "b"], ["2048.5", "c"]]
    low, high = gain[1].interval(0.95)
    assert table.rows[1][2] == f"{np.mean(gain[0]):+.1f} ({low:+.1f} to {high:+.1f})"
    assert table.rows[0][2:] == ["0", "0", "0"]
    assert table.head[:3] == ["Size of the memory", "arm", "MAP@R, points above a"]


def test_picture_shows_every_seed_and_names_every_number(tmp_path: Path) -> None:
    figure = plot_trend(results(tmp_path, MEANS, trend=TREND), "birds", "map_at_r")
    assert figure is not None
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "512", "2048.5"]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [len(line.get_ydata()) for line in dots] == [5, 5]
    assert axes.get_xlabel() == "Size of the memory"


def test_report_has_the_trend_of_each_data_set(tmp_path: Path) -> None:
    found = results(tmp_path, {**MEANS, "groceries": {"a": 1, "b": 2, "c": 3}}, trend=TREND)
    markdown, _ = write_report(found, tmp_path / "out")
    text = markdown.read_text()
    for data in ("birds", "groceries"):
        assert f"## Size of the memory on {data}" in text
        assert (tmp_path / "out" / "pictures" / f"{data}_trend.png").is_file()


def test_nothing_is_drawn_without_a_trend_or_with_missing_runs(tmp_path: Path) -> None:
    assert plot_trend(results(tmp_path, MEANS), "birds", "map_at_r") is None
    unfinished = results(tmp_path, MEANS, trend=TREND)
    unfinished.records.pop()
    assert plot_trend(unfinished, "birds", "map_at_r") is None
    assert "Size of the memory" not in write_report(unfinished, tmp_path / "out")[0].read_text()


@pytest.mark.parametrize(
    ("trend", "answer"),
    [
        ([1], "trend: expected a mapping with over, arms but got \\[1\\]"),
        ({**TREND, "arm": {}}, "trend: expected one of the keys over, arms but got 'arm'. Did you mean 'arms'?"),
        ({"arms": TREND["arms"]}, "trend: expected `over`, what the number is in words, but got None. Write"),
        ({**TREND, "arms": {0: "a"}}, "at least two numbers"),
        ({**TREND, "arms": {"0": "a", "1": "b"}}, "mapping from at least two numbers to arms, such as {0: batch, 512:"),
        ({**TREND, "arms": {0: "a", float("nan"): "b"}}, "at least two numbers"),
        ({**TREND, "arms": {0: "a", 1: "d"}}, "trend: expected one of the arms a, b, c but got 'd'"),
    ],
)
def test_wrong_trends_are_refused(trend: Any, answer: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=answer):
        results(tmp_path, MEANS, trend=trend)
