"""Scores as a run prints them."""

from __future__ import annotations

from lightning_memdml.run_display.score_lines import rounded
from lightning_memdml.run_display.score_table import score_line, score_table, scores_of


def test_table_of_two_galleries_counts_what_is_left_out() -> None:
    scores = {"recall_at_10": 0.9, "recall_at_1": 0.5, "small/map_at_r": float("nan"), "queries": 1200, "excluded": 3}
    assert score_table("Test classes", scores) == (
        "Test classes, 1,200 queries, 3 more without a match left out\n"
        "  Recall@1         50.0 %\n"
        "  Recall@10        90.0 %\n"
        "  MAP@R (small)       - %"
    )


def test_a_recall_among_all_images_is_left_out() -> None:
    metrics = {"test/recall_at_1": 0.2, "test/recall_at_100": 1.0, "val/recall_at_1": 0.3}
    assert scores_of(metrics, "test", gallery_size=100) == {"recall_at_1": 0.2}
    assert scores_of(metrics, "test", gallery_size=101) == {"recall_at_1": 0.2, "recall_at_100": 1.0}
    assert scores_of(metrics, "test") == {"recall_at_1": 0.2, "recall_at_100": 1.0}


def test_the_line_starts_with_the_smallest_recall() -> None:
    assert score_line({"map_at_r": 0.1, "recall_at_30": 0.7, "recall_at_20": 0.6}) == "Recall@20 60.0  MAP@R 10.0"


def test_large_numbers_are_rounded_as_a_person_does() -> None:
    assert [rounded(count) for count in (9_999, 10_000, 999_499, 999_500)] == [
        "9,999", "10 thousand", "999 thousand", "1.0 million",
    ]  # fmt: skip
