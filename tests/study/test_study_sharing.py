"""What the runs of a study share: it changes no number, keys of runs stay, and no process waits without need."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from support.studies import BASE, MEMORY, Write
from tqdm import tqdm

from lightning_memdml import head_fitting
from lightning_memdml.data import GlyphDataModule
from lightning_memdml.lightning_cli import MemdmlCLI
from lightning_memdml.study import runner, sharing
from lightning_memdml.study.agenda import Agenda
from lightning_memdml.study.plan import KnownRuns, Plan, Run
from lightning_memdml.study.run_folder import RunFolder
from lightning_memdml.study.runner import run_all
from lightning_memdml.study.sharing import SharedCLI
from lightning_memdml.study.study_file import read_study
from lightning_memdml.study.training import train

RATE = {"rate": {"model.optimizer.init_args.lr": [0.001, 0.01, 0.1]}}
# What differs from run to run.
TIMED = ("seconds", "ms_per_step", "finished", "made_by")


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    """What a run found, without its times."""
    return json.loads(json.dumps({name: value for name, value in record.items() if name not in TIMED}))


def test_a_run_that_shares_has_the_numbers_of_a_run_that_does_not(write: Write, tmp_path: Path) -> None:
    """Bit for bit: other seeds, other batches and another arm in the same process leave nothing behind."""
    larger = {"data": {"init_args": {"batch_size": 16}}}
    arms = {"batch": {}, "memory": MEMORY, "larger": larger}
    control = {"compare": "memory"}  # with shuffled labels, which must not reach the other arms
    runs = Plan(read_study(write(arms=arms, claims={}, control=control, equal="steps")), MemdmlCLI).test_runs([])
    shared = SharedCLI(MemdmlCLI)
    together = {run.key: train(run, shared, tmp_path) for run in [*runs, runs[1]]}
    for run in runs:
        assert numbers(together[run.key]) == numbers(train(run, MemdmlCLI, tmp_path))


def test_images_are_read_once_and_of_two_data_sets_only(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int | None] = []
    records = GlyphDataModule.records
    monkeypatch.setattr(GlyphDataModule, "records", lambda self: read.append(self.num_classes) or records(self))
    data = {f"of{number}": {"data": {"init_args": {"num_classes": number}}} for number in (30, 31, 32)}
    runs = Plan(read_study(write(data=data, claims={})), MemdmlCLI).test_runs([])
    shared = SharedCLI(MemdmlCLI)
    for run in runs[:4] * 2:  # two arms of one seed on the first two data sets
        shared(run=False, args=run.config)
    assert read == [30, 31]
    for run in (runs[4], runs[0]):
        shared(run=False, args=run.config)
    assert read == [30, 31, 32, 30], "the first one had to make room"
    assert sharing.DATA_SETS == 2


def test_a_network_that_expects_other_images_does_not_share_them(glyph_cache: str) -> None:
    """The configuration leaves their size open; the network of an arm decides it."""
    shared, config = SharedCLI(MemdmlCLI), {"class_path": "GlyphDataModule", "init_args": {"image_size": None}}
    small, large, again = (
        GlyphDataModule(num_classes=30, image_size=size, cache_dir=glyph_cache) for size in (28, 32, 28)
    )
    for data in (small, large, again):
        shared._share_images(data, config)
    assert [data.train_set[0][0].shape[-1] for data in (small, large, again)] == [28, 32, 28]
    assert again.read_images is small.read_images


def test_features_are_computed_once_for_each_network_and_labels(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fitted heads, and with them all numbers, are those of runs that compute their own features."""
    base = {**BASE, "model": {**BASE["model"], "head_init": "whitening"}}
    study = read_study(write(base, claims={}, control={"compare": "batch"}))
    runs = Plan(study, MemdmlCLI).test_runs([])
    computed: list[int] = []
    sum_features = head_fitting._sum_features
    monkeypatch.setattr(
        head_fitting,
        "_sum_features",
        lambda *given: computed.append(1) or sum_features(*given),  # type: ignore[func-returns-value]
    )
    shared = SharedCLI(MemdmlCLI)
    together = [train(run, shared, tmp_path) for run in runs]
    assert len(computed) == 2 * 2, "two seeds, whose networks differ, each with true and with shuffled labels"
    for run, record in zip(runs, together, strict=True):
        assert numbers(record) == numbers(train(run, MemdmlCLI, tmp_path))


def test_data_modules_of_the_user_are_made_anew(write: Write, tmp_path: Path) -> None:
    """They may keep what belongs to one run."""
    (tmp_path / "counted_glyphs.py").write_text(
        "from lightning_memdml import GlyphDataModule\n\n\nclass Counted(GlyphDataModule):\n    pass\n"
    )
    sys.path.append(str(tmp_path))
    base = {**BASE, "data": {**BASE["data"], "class_path": "counted_glyphs.Counted"}}
    (run, *_) = Plan(read_study(write(base, claims={})), MemdmlCLI).test_runs([])
    built = SharedCLI(MemdmlCLI)(run=False, args=run.config)
    assert built.datamodule.read_images is None


def test_losses_are_not_logged_unless_something_may_read_them(write: Write, tmp_path: Path) -> None:
    """`callback_metrics` of a run holds them for a callback of the user and for a monitor, and costs time otherwise."""
    (tmp_path / "watching.py").write_text(
        "from lightning import Callback\n\nseen = []\n\n\nclass Watch(Callback):\n"
        "    def on_train_batch_end(self, trainer, *_):\n"
        "        seen.append(float(trainer.callback_metrics['train/loss']))\n"
    )
    sys.path.append(str(tmp_path))
    arms = {"batch": {}, "watched": {"trainer": {"callbacks": [{"class_path": "watching.Watch"}]}}}
    plain, watched = Plan(read_study(write(arms=arms, claims={}, seeds=[0])), MemdmlCLI).test_runs([])
    found = [train(run, MemdmlCLI, tmp_path)["training"] for run in (plain, watched)]
    import watching  # type: ignore[import-not-found]

    assert found[0] == found[1]
    assert watching.seen == pytest.approx([row["loss"] for row in found[0]], rel=1e-5)


CONFIG = {
    "seed_everything": 3,
    "trainer": {"max_steps": 10, "max_epochs": -1, "logger": True, "limit_test_batches": 4, "callbacks": None},
    "model": {"backbone": {"class_path": "SmallConvNet"}, "optimizer": {"init_args": {"lr": 0.001}}},
    "data": {"class_path": "GlyphDataModule", "init_args": {"batch_size": 8, "seed": 3, "cache_dir": "here"}},
}
KEYS = {
    "search": "86b8306f634007f2ba1b0938753ac66b37a6090221a2d826aea84a0df3917382",
    "test": "382eb8ea9dcd637561adbb47a119cc74617969aa61abac50ab1dce875b8a3be5",
}


@pytest.mark.parametrize("stage", ["search", "test"])
def test_keys_of_finished_runs_stay(stage: Literal["search", "test"], write: Write) -> None:
    """Another key would train every finished run again. These are keys of the version that made the published runs."""
    plan = Plan(read_study(write(claims={})), MemdmlCLI)
    assert plan.key(stage, CONFIG) == KEYS[stage]
    run = Run(stage, "arm", "birds", 3, {}, CONFIG, KEYS[stage])
    assert run.file_name == f"{stage}-birds-arm-seed3-{KEYS[stage][:10]}.json"


def finish(folder: RunFolder, run: Run, seconds: float, score: float = 0.5) -> None:
    """Keep a run as finished, with a made-up time and score."""
    fields = {name: getattr(run, name) for name in ("stage", "arm", "data", "seed", "choice", "key")}
    done = {"scores": {"map_at_r": score}, "seconds": seconds, "steps": 6, "images_per_step": 8}
    folder.save(run, {**fields, **done})


def test_the_longest_run_of_a_seed_starts_first(write: Write) -> None:
    """Longest first by the times of the search, and no run of a later seed before one of an earlier seed."""
    arms = {"quick": {}, "slow": MEMORY, "middle": {"model": {"memory_weight": 2.0}}}
    plan = Plan(read_study(write(arms=arms, claims={}, search={"options": RATE})), MemdmlCLI)
    folder = RunFolder("out")
    for run in plan.search_runs():
        finish(folder, run, {"quick": 1.0, "middle": 3.0, "slow": 9.0}[run.arm])
    agenda, order = Agenda(plan.known_runs, folder), []
    while (run := agenda.next()) is not None:
        order.append(run)
    assert order[0].stage == "reference"
    expected = [("slow", 0), ("middle", 0), ("quick", 0), ("slow", 1), ("middle", 1), ("quick", 1)]
    assert [(run.arm, run.seed) for run in order[1:]] == expected


def test_an_arm_does_not_wait_for_the_search_of_another(write: Write) -> None:
    """Its test runs are known once its own search is finished; they come after all search runs that can start."""
    plan = Plan(read_study(write(claims={}, search={"options": RATE, "extend": 1})), MemdmlCLI)
    folder = RunFolder("out")
    agenda = Agenda(plan.known_runs, folder)
    assert {run.stage for run in agenda.runs} == {"reference", "search"}
    assert len(agenda.planned) == 1 + 6 + 4
    started: list[Run] = []
    while (run := agenda.next()) is not None:
        started.append(run)
        rate = run.choice.get("model.optimizer.init_args.lr", 0)
        if run.stage == "search" and (run.arm == "batch" or rate > 0.1):
            finish(folder, run, 1.0, score=rate if run.arm == "batch" else 0.0)
            agenda.finish(run)
    tested = [run.arm for run in started if run.stage == "test"]
    assert tested == ["batch", "batch"], "of memory, no search run is finished"
    assert sum(run.stage == "search" for run in started) == 3 + 4, "the grid of batch was extended at its end"
    assert [run.stage for run in started][-2:] == ["test", "test"]
    assert not agenda.is_complete
    assert isinstance(plan.known_runs([]), KnownRuns)


def test_the_bar_of_a_study_that_continues_begins_at_the_finished_runs(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a bar that counts them as made now shows a rate that is far too high."""
    plan = Plan(read_study(write(claims={})), MemdmlCLI)
    folder = RunFolder("out")
    first, *_ = plan.test_runs([])
    finish(folder, first, 1.0)
    bars: list[tqdm[Any]] = []

    def kept(**options: Any) -> tqdm[Any]:
        bars.append(tqdm(**options))
        return bars[-1]

    monkeypatch.setattr(runner, "tqdm", kept)
    run_all(plan.known_runs, MemdmlCLI, folder, deadline=0.0)
    (bar,) = bars
    assert bar.initial == bar.n == first.images > 0
    assert bar.total > bar.n
    assert bar.desc == "1 of 5 runs: "
