"""`memdml study` from file to report: what it leaves, its claims, searches and questions of the user."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from support.studies import ARMS, BASE, CLAIMS, MEMORY, STUDY, Write, finished, write_study

from lightning_memdml.cli import main
from lightning_memdml.data import GlyphDataModule
from lightning_memdml.lightning_cli import MemdmlCLI
from lightning_memdml.study import runner
from lightning_memdml.study.plan import KnownRuns, Plan
from lightning_memdml.study.references import limit_test_images
from lightning_memdml.study.report import write_report
from lightning_memdml.study.results import Results
from lightning_memdml.study.run_folder import RunFolder
from lightning_memdml.study.runner import FailedRunsError
from lightning_memdml.study.study_command import run_study
from lightning_memdml.study.study_file import read_study


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory, glyph_cache: str) -> tuple[Path, Results]:
    """A study of two arms and two seeds, run whole."""
    folder = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_MEMDML_CACHE", glyph_cache)
        patch.setattr(sys, "path", [*sys.path])
        return folder, run_study(write_study(folder, STUDY, BASE), MemdmlCLI, output=folder / "out")


def test_every_run_leaves_one_file_that_says_what_made_it(smoke: tuple[Path, Results]) -> None:
    folder, _ = smoke
    runs = finished(folder / "out")
    assert [(run["arm"], run["seed"]) for run in runs.values()] == [
        ("batch", 0), ("batch", 1), ("memory", 0), ("memory", 1),
    ]  # fmt: skip
    for run in runs.values():
        assert run["steps"] == 6
        assert run["images_per_step"] == 8
        assert run["config"]["seed_everything"] == run["config"]["data"]["init_args"]["seed"] == run["seed"]
        assert run["config"]["model"]["embedding_dim"] == 8
        assert run["made_by"]["versions"]["torch"]
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", run["made_by"]["commit"] or "0" * 40)
        assert 0 < run["ms_per_step"] < 60_000
        assert [row["step"] for row in run["validation"]] == [3, 6]
        assert [row["step"] for row in run["training"]] == [1, 2, 3, 4, 5, 6]
    reported = [[row["step"] for row in run["memory"]] for run in runs.values()]
    assert reported == [[], [], [3, 6], [3, 6]], "drift, where there is a memory"


def test_scores_per_class_and_similarities_belong_to_the_scores(smoke: tuple[Path, Results]) -> None:
    folder, _ = smoke
    for run in finished(folder / "out").values():
        table, queries = run["per_class"], run["per_class"]["queries"]
        assert len(table["label"]) == 12, "40 % of the characters are tested"
        for score in ("map_at_r", "recall_at_1", "r_precision"):
            assert np.average(table[score], weights=queries) == pytest.approx(run["scores"][score], abs=1e-4)
        assert sum(run["similarity"]["positive"]) == 144 * 11
        assert sum(run["similarity"]["negative"]) == 144 * 132


def test_weights_are_those_of_the_losses(smoke: tuple[Path, Results]) -> None:
    """The contrastive loss is a step at its margin; Multi-Similarity is measured on pairs with the memory."""
    _, results = smoke
    curve = np.array(results.of("batch", "Glyph")[0]["weights"]["batch"]["negative"]["curve"])
    assert curve.tolist() == [float(s > 0.5) for s in np.linspace(-1, 1, 201).round(6)]
    memory = results.of("memory", "Glyph")[0]["weights"]["memory"]
    assert memory["loss"].startswith("MultiSimilarityLoss")
    assert memory["negative"]["curve"] is None
    assert 0 < sum(memory["negative"]["pairs"]) <= 8 * 32


def test_arms_of_a_seed_start_alike(smoke: tuple[Path, Results]) -> None:
    """Both arms see the same first batch with the same weights; the memory is empty then."""
    _, results = smoke
    first = {arm: [run["training"][0]["loss"] for run in results.of(arm, "Glyph")] for arm in ARMS}
    assert first["batch"] == first["memory"]
    assert first["batch"][0] != first["batch"][1]


def test_six_steps_do_not_beat_the_features_they_start_from(smoke: tuple[Path, Results]) -> None:
    folder, results = smoke
    assert {one.verdict for one in results.claims()} == {"not able to tell"}
    assert "no arm beats the frozen features" in (folder / "out/report.md").read_text()


def test_claims_are_decided_and_reported(smoke: tuple[Path, Results], tmp_path: Path) -> None:
    """Without the references, which six steps do not beat."""
    _, complete = smoke
    results = Results(complete.study, complete.records)
    write_report(results, tmp_path)
    helps, harmless = results.claims()
    expected = np.mean([
        100 * (memory["scores"]["map_at_r"] - batch["scores"]["map_at_r"])
        for memory, batch in zip(results.of("memory", "Glyph"), results.of("batch", "Glyph"), strict=True)
    ])  # fmt: skip
    assert helps.joint is not None
    assert helps.joint.estimate.mean == pytest.approx(expected)
    low, high = helps.over_classes or (0, 0)
    assert low <= expected <= high
    text = (tmp_path / "report.md").read_text()
    for claim, one in zip(CLAIMS, (helps, harmless), strict=True):
        says = CLAIMS[claim].get("says", claim)
        assert f"| {says} | {one.verdict} |" in text
    assert "memory against batch: more than +90 points of MAP@R" in text


def test_the_network_before_the_training_is_scored_once_for_all_arms(smoke: tuple[Path, Results]) -> None:
    """Both arms have the same network and data: the references are scored once, and stand in the table of scores."""
    folder, results = smoke
    (file,) = (folder / "out/references").glob("*.json")
    names = ["untrained network", "frozen features", "frozen features, whitened"]
    assert [*json.loads(file.read_text())["references"]] == [*results.references("Glyph")] == names
    assert all(0 < row["map_at_r"] < 100 for row in results.references("Glyph").values())
    text = (folder / "out/report.md").read_text()
    assert all(f"| {name} (no training) |" in text for name in names)
    assert results.able_to_tell()["Glyph"] is not None


@pytest.mark.parametrize(("limit", "kept"), [(None, 144), (1.0, 144), (0.56, 80), (3, 24), (3.0, 24), (100, 144)])
def test_references_are_scored_on_the_test_images_of_the_arms(limit: float | None, kept: int, glyph_cache: str) -> None:
    data = GlyphDataModule(num_classes=30, batch_size=8, images_per_class=2, eval_batch_size=8, cache_dir=glyph_cache)
    data.setup()
    before = data.query_set
    limit_test_images(data, limit)
    assert len(data.query_set) == kept
    assert data.gallery_set is data.query_set
    assert data.query_set.labels.equal(before.labels[:kept])


def test_a_run_on_another_network_has_references_of_its_own(write: Write) -> None:
    wider = {"model": {"backbone": {"init_args": {"width": 6}}}}
    faster = {"model": {"optimizer": {"init_args": {"lr": 0.1}}}, "data": {"init_args": {"batch_size": 8}}}
    plan = Plan(read_study(write(arms={"batch": {}, "faster": faster, "wider": wider}, claims={})), MemdmlCLI)
    assert [run.arm for run in plan.reference_runs()] == ["batch", "wider"]


def test_table_of_runs_has_a_line_for_each(smoke: tuple[Path, Results]) -> None:
    table = pd.read_csv(smoke[0] / "out/runs.csv")
    runs = finished(smoke[0] / "out")
    assert sorted(table.key) == sorted(run["key"] for run in runs.values())
    scores = {run["key"]: run["scores"]["map_at_r"] for run in runs.values()}
    assert table.map_at_r.tolist() == pytest.approx([scores[key] for key in table.key])
    assert set(table.columns) >= {"arm", "data", "seed", "steps", "ms_per_step", "commit", "torch"}


def test_page_holds_its_pictures_and_asks_nothing_of_the_network(smoke: tuple[Path, Results]) -> None:
    folder, _ = smoke
    page = (folder / "out/report.html").read_text()
    assert not re.findall(r"<script|https?://|<link|@import", page)
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 4, "scores, training, similarities, drift; no claim is decided"
    for picture in pictures:
        width, height = Image.open(io.BytesIO(base64.b64decode(picture))).size
        assert width > 1000
        assert height > 100
    text = (folder / "out/report.md").read_text()
    shown = re.findall(r"\]\((pictures/\S+\.png)\)", text)
    assert len(shown) == 4
    assert all((folder / "out" / name).is_file() for name in shown)


MEASURE = """<script>
window.onload = () => {
  const say = (name, value) => { document.body.dataset[name] = value; };
  say("loaded", [...document.images].filter(image => image.complete && image.naturalWidth > 0).length);
  say("narrow", Math.min(...[...document.images].map(image => image.width)));
  say("wide", document.documentElement.scrollWidth - window.innerWidth);
  say("verdicts", [...document.querySelectorAll("td b")].map(mark => getComputedStyle(mark).backgroundColor).length);
};
</script>"""


@pytest.mark.parametrize("width", [1280, 480])
def test_page_in_a_browser_shows_every_picture_and_fits(
    smoke: tuple[Path, Results], width: int, tmp_path: Path, browse: Callable[..., str]
) -> None:
    page = tmp_path / "report.html"
    page.write_text((smoke[0] / "out/report.html").read_text().replace("</body>", f"{MEASURE}</body>"))
    shown = browse(page, f"--window-size={width},900", "--dump-dom")
    (body,) = re.findall(r"<body[^>]*>", shown)
    said = {name: float(value) for name, value in re.findall(r'data-(\w+)="(-?[\d.]+)"', body)}
    assert said["loaded"] == 4
    assert said["verdicts"] == 2
    assert said["wide"] <= 0, "nothing sticks out to the right"
    assert said["narrow"] > 0.7 * min(width, 1200)


def test_study_that_is_stopped_goes_on_where_it_was(
    smoke: tuple[Path, Results], write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is finished is kept as it is, and the end is that of a study which was never stopped."""
    train, trained = runner.train, []

    def until_the_third(run: Any, *args: Any, **kwargs: Any) -> Any:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(run.file_name)
        return train(run, *args, **kwargs)

    path = write()
    monkeypatch.setattr(runner, "train", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_study(path, MemdmlCLI, output="out")
    kept = {file: file.stat().st_mtime_ns for file in Path("out/runs").iterdir()}
    assert sorted(file.name for file in kept) == sorted(trained)
    monkeypatch.setattr(runner, "train", train)
    run_study(path, MemdmlCLI, output="out")
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    uninterrupted = finished(smoke[0] / "out")
    assert {name: run["scores"] for name, run in finished(Path("out")).items()} == {
        name: run["scores"] for name, run in uninterrupted.items()
    }


UNSEEN = """
from lightning_memdml import GlyphDataModule


class Guarded(GlyphDataModule):
    looked = []

    def test_dataloader(self):
        self.looked.append("test")
        return super().test_dataloader()

    def val_dataloader(self):
        self.looked.append("val")
        return super().val_dataloader()
"""


def test_search_never_touches_test_classes_and_the_test_is_made_once(write: Write, tmp_path: Path) -> None:
    (tmp_path / "guarded_glyphs.py").write_text(UNSEEN)
    sys.path.append(str(tmp_path))
    from guarded_glyphs import Guarded  # type: ignore[import-not-found]

    base = {**BASE, "data": {**BASE["data"], "class_path": "guarded_glyphs.Guarded"}}
    options = {"rate": {"model.optimizer.init_args.lr": [0.001, 0.03]}}
    path = write(base, search={"options": options, "seeds": [7]}, claims={}, seeds=[0])
    plan, folder = Plan(read_study(path), MemdmlCLI), RunFolder("out")
    with pytest.raises(ValueError, match="Expected a finished search of"):
        plan.test_runs([])
    agenda = runner.run_all(lambda finished: KnownRuns(plan.search_runs(finished), []), MemdmlCLI, folder)
    searched = [*agenda.records.values()]
    assert "val" in Guarded.looked
    assert "test" not in Guarded.looked
    assert [(run["seed"], run["stage"]) for run in searched] == [(7, "search")] * 4
    best = {
        arm: max((run for run in searched if run["arm"] == arm), key=lambda run: run["scores"]["map_at_r"])["choice"]
        for arm in ARMS
    }
    results = run_study(path, MemdmlCLI, output="out")
    assert Guarded.looked.count("test") == len(ARMS), "one look for each run that is scored"
    assert {run["arm"]: run["choice"] for run in results.records} == best
    for run in results.records:
        rate = run["config"]["model"]["optimizer"]["init_args"]["lr"]
        assert rate == best[run["arm"]]["model.optimizer.init_args.lr"]
    assert "## Search" in Path("out/report.md").read_text()


def test_search_needs_validation_classes(write: Write) -> None:
    base = {**BASE, "data": {**BASE["data"], "init_args": {**BASE["data"]["init_args"], "val_fraction": 0}}}
    options = {"rate": {"model.optimizer.init_args.lr": [0.01]}}
    path = write(base, arms={"batch": {}}, search={"options": options}, claims={}, seeds=[0])
    with pytest.raises(
        FailedRunsError, match=r"Set `data.val_fraction` above 0.*The search never uses the test classes"
    ):
        run_study(path, MemdmlCLI, output="out")


def test_wrong_option_of_an_arm_is_told_before_anything_runs(write: Write) -> None:
    wrong = {"model": {"memory_loss": {"init_args": {"epsilom": 0.1}}}}
    with pytest.raises(ValueError, match=r"Arm 'wrong' on 'Glyph': .*no option 'epsilom'. Did you mean 'epsilon'\?"):
        run_study(write(arms={"batch": {}, "wrong": [MEMORY, wrong]}, claims={}), MemdmlCLI, output="out")
    assert not Path("out").exists()


def test_changed_claim_is_told_in_the_report(smoke: tuple[Path, Results], write: Write) -> None:
    """Who changes the rule after having seen scores cannot hide it."""
    claims = {**CLAIMS, "helps": {**CLAIMS["helps"], "by": 0}}
    assert "CHANGED" not in (smoke[0] / "out/report.md").read_text()
    run_study(write(claims=claims), MemdmlCLI, output=smoke[0] / "out", report_only=True)
    assert "CHANGED after 4 of the runs" in (smoke[0] / "out/report.md").read_text()


def test_dry_run_lists_runs_and_costs_and_trains_none(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"rate": {"model.optimizer.init_args.lr": [0.001, 0.03]}}
    main(["study", str(write(search={"options": options})), "--output", "out", "--dry_run"])
    said = capsys.readouterr().out
    assert len(re.findall(r"^search +\d+\.\d s", said, re.MULTILINE)) == 4
    assert (
        len(re.findall(r"^test +\d+\.\d s +(?:batch|memory) on Glyph, seed [01], as searched$", said, re.MULTILINE))
        == 4
    )
    assert "8 runs, about" in said
    assert "There is no control: nothing shows that these data sets can detect a difference." in said
    assert not Path("out/runs").exists()


MY_WEIGHTS = """
def hardest(similarity):
    return (similarity - 0.2).clamp_min(0) ** 2
"""
QUESTION = """
base: base.yaml
arms:
  threshold: {}
  mine: {model: {loss: {init_args: {negative: mine_weights.hardest}}}}
seeds: [0, 1]
claims:
  mine_helps: {compare: mine, with: threshold, expects: more, by: 0.5}
"""


def test_question_of_the_user_in_one_file(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A weight function of one's own against `Threshold`, on one's own folder of images, from the command line."""
    draw = np.random.default_rng(0)
    for name in "abcdefgh":
        (tmp_path / "images" / name).mkdir(parents=True)
        color = draw.integers(0, 256, 3)
        for number in range(4):
            pixels = (color + draw.integers(-20, 20, (24, 24, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    base = {
        **BASE,
        "model": {
            **BASE["model"],
            "backbone": {"class_path": "SmallConvNet", "init_args": {"width": 4, "in_channels": 3}},
            "loss": {"class_path": "DirectWeightLoss", "init_args": {"negative": {"class_path": "Threshold"}}},
        },
        "data": {"class_path": "FolderDataModule", "init_args": {
            "root": "to be given", "batch_size": 8, "images_per_class": 2, "image_size": 24, "num_workers": 0,
            "val_fraction": 0}},
    }  # fmt: skip
    write(base)
    (tmp_path / "question").mkdir()
    (tmp_path / "base.yaml").rename(tmp_path / "question/base.yaml")
    (tmp_path / "question/mine.yaml").write_text(QUESTION)
    (tmp_path / "question/mine_weights.py").write_text(MY_WEIGHTS)
    main(["study", "question/mine.yaml", "--data.root", "images"])
    said = capsys.readouterr().out
    assert re.search(r"(supported|contradicted|undecided|not able to tell): mine_helps", said)
    assert "runs/study/mine/report.html" in said
    runs = finished(Path("runs/study/mine"))
    assert [(run["arm"], run["seed"]) for run in runs.values()] == [
        ("mine", 0), ("mine", 1), ("threshold", 0), ("threshold", 1),
    ]  # fmt: skip
    curve = np.array(next(iter(runs.values()))["weights"]["batch"]["negative"]["curve"])
    np.testing.assert_allclose(curve, np.clip(np.linspace(-1, 1, 201) - 0.2, 0, None) ** 2, atol=1e-5)


def test_tables_go_to_wandb_if_it_is_the_logger(
    write: Write, offline_wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: dict[str, Any] = {}
    monkeypatch.setattr(offline_wandb.sdk.wandb_run.Run, "log", lambda self, found, **_: logged.update(found))
    logger = {"class_path": "WandbLogger", "init_args": {"save_dir": "wandb_logs", "offline": True}}
    base = {**BASE, "trainer": {**BASE["trainer"], "logger": logger}}
    run_study(write(base, seeds=[0]), MemdmlCLI, output="out")
    assert set(logged) >= {"study/report", "study/scores_Glyph", "study/claims", "study/Glyph_scores"}
    arms = [row[0] for row in logged["study/scores_Glyph"].data]
    assert arms[:2] == ["batch", "memory"]
    assert all(name.endswith("(no training)") for name in arms[2:])
    assert len(arms) == 5
