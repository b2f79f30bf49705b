"""The retrieval benchmark, small: every method it compares gives the same scores, by whole sets and by parts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments/benchmarks/retrieval.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("retrieval_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("queries", [1300, 200])
@pytest.mark.parametrize("name", ["pml", "faiss", "topk"])
def test_every_peer_gives_our_scores(benchmark: ModuleType, name: str, queries: int) -> None:
    pytest.importorskip({"pml": "pytorch_metric_learning"}.get(name, "faiss"))
    samples = benchmark.make_samples(1300, 200, 32, 1.6)
    ours, theirs = (benchmark.METHODS[method](*samples, queries) for method in ("ours", name))
    assert 0.3 < ours["recall_at_1"] < 0.99  # neither hopeless nor trivial
    assert set(theirs) & set(ours) >= {"recall_at_1", "map_at_r"}
    assert {key: ours[key] for key in theirs} == pytest.approx(theirs, abs=1e-6)


def test_the_float64_check_finds_no_difference_and_would_find_one(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = SimpleNamespace(samples=1300, classes=200, noise=1.6, check=150)
    found = benchmark.check_against_float64(32, arguments)
    assert (found["best_ranks"], found["average_precisions"]) == (0, 0)
    right = benchmark.rank_queries
    monkeypatch.setattr(
        benchmark, "rank_queries", lambda rows, labels, depth: right(rows.bfloat16(), labels, depth=depth)
    )
    assert benchmark.check_against_float64(32, arguments)["best_ranks"] > 0


def test_all_against_all_shows_how_far_it_is_and_is_checked(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = SimpleNamespace(samples=1300, classes=200, noise=1.6, check=50, queries=100, threads=1)
    (floor, ours), ranks = benchmark.measure_self(32, arguments)
    assert "similarities: 100%" in capsys.readouterr().err
    assert (floor["queries"], ours["queries"]) == (100, 1300)
    assert floor["full_s"] == pytest.approx(13 * floor["measured_s"])
    assert ours["scores"] == benchmark.rank_queries(*benchmark.make_samples(1300, 200, 32, 1.6)).scores()
    assert "1,300" in benchmark.as_table([floor, ours])
    found = benchmark.check_against_float64(32, arguments, ranks)
    assert (found["best_ranks"], found["average_precisions"]) == (0, 0)
