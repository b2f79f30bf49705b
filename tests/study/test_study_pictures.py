"""The pictures of a study, from made-up records: what is drawn, and what is left out."""

from __future__ import annotations

from pathlib import Path

from matplotlib.text import Annotation
from support.studies import results

from lightning_memdml.study.pictures import plot_claims, plot_training
from lightning_memdml.study.report import write_report
from lightning_memdml.study.results import Results


def with_curves(folder: Path, validated: dict[str, list[int]], trained: int = 3) -> Results:
    """Results with the loss of each of the first steps, and a validation of each arm at its steps."""
    found = results(folder, {"birds": {"a": 15, "b": 10}})
    for record in found.records:
        record["training"] = [{"step": step, "loss": 1 / step} for step in range(1, trained + 1)]
        record["validation"] = [{"step": step, "map_at_r": 0.1} for step in validated[record["arm"]]]
    return found


def test_the_picture_of_claims_draws_no_interval_that_hides_a_difference(tmp_path: Path) -> None:
    for birds, drawn in ((7, 2), (15, 3)):
        means = {"birds": {"a": birds, "b": 10}, "groceries": {"a": 40, "b": 20}}
        figure = plot_claims(results(tmp_path, means).claims())
        assert figure is not None
        assert len(figure.axes) == 3
        assert sum(any(line.get_marker() == "o" for line in axes.lines) for axes in figure.axes) == drawn


def test_a_difference_that_would_squeeze_the_others_is_an_arrow_at_the_edge(tmp_path: Path) -> None:
    differences = {"w": 1, "x": 2, "y": 3, "z": 60}
    means = {name: {"a": 10 + difference, "b": 10} for name, difference in differences.items()}
    figure = plot_claims(results(tmp_path, means).claims())
    assert figure is not None
    _joint, *parts = figure.axes
    assert parts[0].get_xlim()[1] < 5
    assert [any(line.get_marker() == "o" for line in axes.lines) for axes in parts] == [True, True, True, False]
    for axes, difference in zip(parts, differences.values(), strict=True):
        (written,) = (text.get_text() for text in axes.texts if text.get_text().startswith("+"))
        assert abs(float(written.split()[0]) - difference) < 1
    assert [any(isinstance(text, Annotation) for text in axes.texts) for axes in parts] == [False, False, False, True]


def test_runs_that_validate_once_have_no_curve_of_the_validation(tmp_path: Path) -> None:
    """All points would lie at one step."""
    found = with_curves(tmp_path, {"a": [3], "b": [3]})
    figure = plot_training(found, "birds", "map_at_r")
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == ["training loss"]
    text = write_report(found, tmp_path / "out")[0].read_text()
    assert "![Loss over the steps](pictures/birds_training.png)" in text
    assert "alidation" not in text


def test_runs_that_validate_twice_have_a_curve_also_where_other_arms_do_not(tmp_path: Path) -> None:
    found = with_curves(tmp_path, {"a": [2, 3], "b": [3]})
    figure = plot_training(found, "birds", "map_at_r")
    assert figure is not None
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]
    text = write_report(found, tmp_path / "out")[0].read_text()
    assert "![Loss and validation score over the steps](pictures/birds_training.png)" in text
    assert "validation scores can." in text


def test_without_any_curve_there_is_no_picture_of_the_training(tmp_path: Path) -> None:
    found = with_curves(tmp_path, {"a": [1], "b": [1]}, trained=1)
    assert plot_training(found, "birds", "map_at_r") is None
    text = write_report(found, tmp_path / "out")[0].read_text()
    assert "## Training" not in text
    assert not (tmp_path / "out/pictures/birds_training.png").exists()
