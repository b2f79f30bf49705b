"""The search of a study: equal numbers of tries, no option set by halves, and no unfairness without a word."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_memdml.lightning_cli import MemdmlCLI
from lightning_memdml.study.plan import Plan, Run
from lightning_memdml.study.report import freedoms_in_words
from lightning_memdml.study.results import Results
from lightning_memdml.study.search import Search, missing_freedoms, spread
from lightning_memdml.study.study_file import Study, read_study
from lightning_memdml.study.tables import search_table

BASE: dict[str, Any] = {
    "trainer": {"max_steps": 10, "max_epochs": -1},
    "model": {
        "backbone": "SmallConvNet",
        "loss": {"class_path": "ContrastiveLoss", "init_args": {"margin": 0.5}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}},
    },
    "data": {"class_path": "GlyphDataModule", "init_args": {"batch_size": 16, "images_per_class": 2}},
}
MEMORY = {"model": {"memory_loss": {"class_path": "ContrastiveLoss", "init_args": {"margin": 0.7}}}}
TRIPLET = {"model": {"loss": "TripletLoss"}}
BATCH_MARGIN = {"model.loss.ContrastiveLoss.margin": [0.4, 0.5, 0.6], "model.loss.TripletLoss.margin": [0.05, 0.1, 0.2]}
MEMORY_MARGIN = {"model.memory_loss.ContrastiveLoss.margin": [0.5, 0.65, 0.8]}


def search(tries: int | None = None, seeds: tuple[int, ...] = (7,), extend: int = 0, **options: Any) -> Search:
    return Search(options, seeds, tries, extend, "map_at_r")


def arm(over: dict[str, Any]) -> dict[str, Any]:
    return {"model": {**BASE["model"], **over.get("model", {})}}


def study(folder: Path, **changes: Any) -> Study:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    content = {"base": "base.yaml", "arms": {"batch": {}, "memory": MEMORY}, "seeds": [0, 1], **changes}
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return read_study(folder / "study.yaml")


def test_a_batch_size_that_is_not_set_is_the_default_in_every_arm(tmp_path: Path) -> None:
    """By itself it would shrink where classes are few, and budgets that look equal would not be."""
    arms = {"unset": {"data": {"init_args": {"batch_size": None, "images_per_class": 4}}}, "set": {}}
    arms["set"] = {"data": {"init_args": {"batch_size": 64, "images_per_class": 4}}}
    plan = Plan(study(tmp_path, arms=arms), MemdmlCLI)
    sizes = [plan.resolve(name, "Glyph", {})["data"]["init_args"]["batch_size"] for name in arms]
    assert sizes == [64, 64]


def record(run: Run, score: float) -> dict[str, Any]:
    fields = {name: getattr(run, name) for name in ("stage", "arm", "data", "seed", "choice", "key")}
    return {**fields, "scores": {"map_at_r": score}}


def test_an_option_sets_every_key_that_an_arm_has() -> None:
    """Never only the first one, which would leave the other term at its default."""
    both = search(margin={**BATCH_MARGIN, **MEMORY_MARGIN})
    expected = {"model.loss.init_args.margin": 0.4, "model.memory_loss.init_args.margin": 0.5}
    assert both.grid(arm(MEMORY))[0] == expected
    assert both.grid(arm({})) == [{"model.loss.init_args.margin": value} for value in (0.4, 0.5, 0.6)]
    assert [*both.grid(arm(TRIPLET))[0].values()] == [0.05], "values of its own class"


def test_an_arm_that_lacks_a_searched_option_is_named(tmp_path: Path) -> None:
    options = {"margin in the batch": BATCH_MARGIN, "margin against the memory": MEMORY_MARGIN}
    found = missing_freedoms(search(**options), {"batch": arm({}), "memory": arm(MEMORY)})
    assert found == {"batch": ["margin against the memory"]}
    named = {"batch_margin": BATCH_MARGIN, "memory_margin": MEMORY_MARGIN}
    content = study(tmp_path, search={"options": named, "tries": 3})
    assert freedoms_in_words(content, Plan(content, MemdmlCLI).missing_freedoms()) == [
        "Searched: batch_margin, memory_margin.",
        "The arm batch has no memory_margin to search.",
    ]


def test_arms_that_lack_the_same_options_are_named_together(tmp_path: Path) -> None:
    named = {"batch_margin": BATCH_MARGIN, "memory_margin": MEMORY_MARGIN}
    arms = {"small": {}, "memory": MEMORY, "triplet": TRIPLET}
    content = study(tmp_path, arms=arms, search={"options": named, "tries": 3})
    assert freedoms_in_words(content, Plan(content, MemdmlCLI).missing_freedoms()) == [
        "Searched: batch_margin, memory_margin.",
        "The arms small, triplet have no memory_margin to search.",
    ]


def test_arms_with_grids_of_different_size_need_a_number_of_tries(tmp_path: Path) -> None:
    options = {"batch_margin": BATCH_MARGIN, "memory_margin": MEMORY_MARGIN}
    with pytest.raises(ValueError, match=r"Expected the same number of search runs in every arm but .* memory 9"):
        Plan(study(tmp_path, search={"options": options}), MemdmlCLI)
    plan = Plan(study(tmp_path, search={"options": options, "tries": 5, "seeds": [7, 8]}), MemdmlCLI)
    assert Counter(run.arm for run in plan.search_runs()) == {"batch": 10, "memory": 10}
    assert len({run.key for run in plan.search_runs()}) == 20, "no run is counted twice"


def test_the_arm_with_shuffled_labels_has_the_search_of_its_arm(tmp_path: Path) -> None:
    """It differs in one callback, after those of the arm, and leaves the runs of all others as they were."""
    options = {"batch_margin": BATCH_MARGIN, "memory_margin": MEMORY_MARGIN}
    memory = {**MEMORY, "trainer": {"callbacks": [{"class_path": "MemoryCallback", "init_args": {"size": 32}}]}}
    changes: dict[str, Any] = {"arms": {"batch": {}, "memory": memory}, "search": {"options": options, "tries": 4}}
    before = Plan(study(tmp_path, **changes), MemdmlCLI).search_runs()
    runs = Plan(study(tmp_path, **changes, control={"compare": "memory"}), MemdmlCLI).search_runs()
    assert [run.key for run in runs[:8]] == [run.key for run in before]
    shuffled, same = runs[8:], runs[4:8]
    assert {run.arm for run in shuffled} == {"memory with shuffled labels"}
    assert [(run.choice, run.seed) for run in shuffled] == [(run.choice, run.seed) for run in same]
    assert not {run.key for run in shuffled} & {run.key for run in runs[:8]}
    for run, plain in zip(shuffled, same, strict=True):
        *callbacks, last = run.config["trainer"]["callbacks"]
        assert callbacks == plain.config["trainer"]["callbacks"]
        assert last["class_path"].endswith(".ShuffleLabels")
        assert " " not in run.file_name


def test_a_smaller_grid_is_repeated_with_further_seeds() -> None:
    runs = search(tries=4, seeds=(7, 8), margin=BATCH_MARGIN).schedule(arm({}))
    assert [seed for _, seed in runs] == [7, 7, 7, 8, 8, 8, 9, 9]
    assert {repr(choice) for choice, _ in runs} == {
        repr(choice) for choice in search(margin=BATCH_MARGIN).grid(arm({}))
    }


def test_a_larger_grid_is_covered_evenly() -> None:
    grid = search(batch=BATCH_MARGIN, memory=MEMORY_MARGIN).grid(arm(MEMORY))
    assert len(grid) == 9
    chosen = spread(grid, 6)
    assert len({repr(choice) for choice in chosen}) == 6
    for place in chosen[0]:
        assert set(Counter(choice[place] for choice in chosen).values()) == {2}
    assert spread(grid, 6) == chosen
    assert spread(grid, 9) == grid


def test_the_best_choice_is_the_best_mean_over_search_seeds(tmp_path: Path) -> None:
    plan = Plan(
        study(tmp_path, arms={"batch": {}}, search={"options": {"m": BATCH_MARGIN}, "seeds": [7, 8]}), MemdmlCLI
    )
    scores = {(0.4, 7): 0.9, (0.4, 8): 0.1, (0.5, 7): 0.6, (0.5, 8): 0.6, (0.6, 7): 0.3, (0.6, 8): 0.3}
    key = "model.loss.init_args.margin"
    searched = [record(run, scores[run.choice[key], run.seed]) for run in plan.search_runs()]
    assert {run.choice[key] for run in plan.test_runs(searched)} == {0.5}
    results = Results(plan.study, [], searched)
    assert results.search_noise() == pytest.approx(100 * (0.5 * 0.8**2 / 3) ** 0.5)
    with pytest.raises(ValueError, match="Expected a finished search of 'batch'"):
        plan.test_runs(searched[1:])


@pytest.mark.parametrize(("best", "ends"), [(0.4, "m"), (0.5, ""), (0.6, "m")])
def test_a_choice_at_an_end_of_the_grid_is_marked(best: float, ends: str, tmp_path: Path) -> None:
    plan = Plan(study(tmp_path, arms={"batch": {}}, search={"options": {"m": BATCH_MARGIN}}), MemdmlCLI)
    key = "model.loss.init_args.margin"
    searched = [record(run, float(run.choice[key] == best)) for run in plan.search_runs()]
    (row,) = search_table(Results(plan.study, [], searched)).rows
    assert row[4] == ends
    assert f"**model.loss.margin={best}: 100.0**" in row[2]
    assert row[3] == "100.0", "the lead of the best"


def test_an_arm_without_a_searched_option_has_one_row_without_a_lead(tmp_path: Path) -> None:
    search = {"options": {"m": MEMORY_MARGIN}, "tries": 3}
    plan = Plan(study(tmp_path, arms={"batch": {}, "memory": MEMORY}, search=search), MemdmlCLI)
    searched = [record(run, 0.5) for run in plan.search_runs()]
    (row, _) = search_table(Results(plan.study, [], searched)).rows
    assert row[1:] == ["batch", "**nothing to choose: 50.0**", "", ""]


def test_an_extended_search_goes_on_beyond_the_end_until_the_best_is_inside(tmp_path: Path) -> None:
    """The score rises up to a margin of 0.8: two steps beyond the grid, and one that shows the fall."""
    plan = Plan(study(tmp_path, arms={"batch": {}}, search={"options": {"m": BATCH_MARGIN}, "extend": 5}), MemdmlCLI)
    key = "model.loss.init_args.margin"
    searched: list[dict[str, Any]] = []
    for _ in range(9):
        runs = plan.search_runs(searched)
        searched = [record(run, 1 - abs(run.choice[key] - 0.8)) for run in runs]
    assert [run.choice[key] for run in runs] == [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert {run.choice[key] for run in plan.test_runs(searched)} == {0.8}


def test_an_extended_search_stays_inside_the_range_of_an_option(tmp_path: Path) -> None:
    """A margin above 1 is refused by the loss: the search ends at the last value that it takes."""
    margins = {"model.loss.ContrastiveLoss.margin": [0.6, 0.8, 1.0]}
    plan = Plan(study(tmp_path, arms={"batch": {}}, search={"options": {"m": margins}, "extend": 3}), MemdmlCLI)
    searched = [record(run, run.choice["model.loss.init_args.margin"]) for run in plan.search_runs()]
    assert len(plan.search_runs(searched)) == 3


def test_an_option_at_the_end_of_its_range_leaves_the_extension_to_the_next_one(tmp_path: Path) -> None:
    options = {
        "margin": {"model.loss.ContrastiveLoss.margin": [0.5, 0.8]},  # 1.1 is refused
        "rate": {"model.optimizer.AdamW.lr": [0.001, 0.002]},
    }
    plan = Plan(study(tmp_path, arms={"batch": {}}, search={"options": options, "extend": 1}), MemdmlCLI)
    margin, rate = "model.loss.init_args.margin", "model.optimizer.init_args.lr"
    searched = [record(run, run.choice[margin] + run.choice[rate]) for run in plan.search_runs()]
    assert [run.choice for run in plan.search_runs(searched)][4:] == [{margin: 0.8, rate: 0.004}]


def test_an_extended_search_prints_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whether a value beyond the grid can be used is found by building the run, of which Lightning tells much."""
    plan = Plan(study(tmp_path, arms={"batch": {}}, search={"options": {"m": BATCH_MARGIN}, "extend": 1}), MemdmlCLI)
    searched = [record(run, 1.0) for run in plan.search_runs()]
    caplog.clear()
    with caplog.at_level("INFO"):
        assert len(plan.search_runs(searched)) > len(searched)
    assert caplog.messages == []


def test_keys_of_one_option_have_equally_many_values(tmp_path: Path) -> None:
    uneven = {"model.loss.ContrastiveLoss.margin": [0.4], "model.loss.TripletLoss.margin": [0.1, 0.2]}
    with pytest.raises(ValueError, match="expected the same number of values for every key"):
        study(tmp_path, search={"options": {"m": uneven}})
    for name, value in (("tries", 0), ("extend", -1), ("tries", 1.5)):
        with pytest.raises(ValueError, match=f"expected `{name}` to be a whole number"):
            study(tmp_path, search={"options": {"m": MEMORY_MARGIN}, name: value})
