"""The report of a run: what stands on it, that names stay text, and that it needs nothing from outside."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from support.command_line import LOSS, MEMORY, QUIET, TINY, Command

from lightning_memdml import ContrastiveLoss, InfoNCELoss
from lightning_memdml.data.images import ImageDataset
from lightning_memdml.retrieval.metrics import Samples
from lightning_memdml.run_report.charts import Line, line_chart, nice_ticks, scatter, shortened
from lightning_memdml.run_report.duplicates import near_duplicates
from lightning_memdml.run_report.recorder import Evaluation, RunRecorder
from lightning_memdml.run_report.report import report_page

BAD = "<img src=x onerror=alert(1)> & \"'"  # a name that would break out of the page
NAMES = [BAD, "כיתה " * 12, "漢字" * 20, "x" * 80]


def picture(position: int) -> Image.Image:
    image = Image.new("RGB", (48, 40), (60 * (position % 4), 20 * position, 90))
    ImageDraw.Draw(image).ellipse((3 * position, 4, 3 * position + 9, 20), fill="white")
    return image


@pytest.fixture
def page() -> str:
    """A report of eight images of four classes, one confused with another."""
    labels = torch.arange(8) // 2
    images = ImageDataset(picture, [f"folder/{BAD}{number}.jpg" for number in range(8)], labels)
    embeddings = torch.nn.functional.one_hot(labels, 4).float() + 0.01 * torch.arange(32).reshape(8, 4)
    embeddings[7] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    rows = torch.arange(8)
    samples = Samples(embeddings, labels, rows, None, rows, rows, torch.full((8,), -2))
    recorder = RunRecorder()
    recorder.evaluation = Evaluation("val", 20, samples, (images, images), True)
    recorder.losses = {"batch loss per pair": [(10, 0.5), (20, 0.25)]}
    recorder.scores = {"recall_at_1": [(10, 0.5), (20, 0.75)], "map_at_r": [(10, 0.25), (20, float("nan"))]}
    data = SimpleNamespace(classes=NAMES, train_set=images, val_set=images, query_set=images, gallery_set=images)
    learner = torch.nn.Linear(2, 2)
    learner.loss, learner.memory_loss = ContrastiveLoss(), InfoNCELoss()  # type: ignore[assignment]
    learner.val_metrics = SimpleNamespace(k=(1, 10))  # type: ignore[assignment]
    trainer: Any = SimpleNamespace(global_step=20)
    reference = {"frozen features": {"recall_at_1": 0.5, "map_at_r": 0.2}}
    return report_page(recorder, trainer, learner, data, f"data: {BAD}", reference)


def test_every_section_is_there(page: str) -> None:
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Scores of the validation classes at step 20 of 20",
        "Hardest queries first",
        "Training",
        "Classes",
        "Map of the embeddings",
        "Weights of the pairs",
        "Data",
        "Configuration",
    ]
    text = unescape(re.sub(r"<[^>]+>", " ", page))
    assert "frozen features  50.0  20.0" in text
    assert re.search(r"this network\s+62\.5\s+\d+\.\d to \d+\.\d", text)
    assert "Recall@10" not in text  # of 8 images it is always 100 %
    assert re.search(r"Pairs of pictures that look the same: \d+, among 24 images", text)


def test_names_stay_text_and_nothing_is_asked_of_the_network(page: str) -> None:
    assert "<img src=x" not in page
    assert unescape(page).count(BAD) > 10
    for name in NAMES[1:]:
        assert name.strip() in page
    assert not [
        word for word in ("http://", "https://", "<script", "<link", "url(") if word in page.replace("xmlns", "")
    ]
    assert "prefers-color-scheme: dark" in page


@pytest.mark.parametrize("width", [390, 1280, 1920])
def test_the_page_fits_the_window(width: int, page: str, tmp_path: Path, browse: Callable[..., str]) -> None:
    # A window of the browser is at least 500 pixels wide, so the page stands in a frame.
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    script = """<script>onload = () => { const d = frames[0].document; document.body.dataset.wide =
      d.documentElement.scrollWidth - d.documentElement.clientWidth;
      document.body.dataset.loaded = [...d.images].every(image => image.naturalWidth > 0); }</script>"""
    frame = f'<iframe src="report.html" style="width:{width}px;height:900px;border:0"></iframe>'
    (tmp_path / "frame.html").write_text(f"<body>{frame}{script}")
    shown = browse(
        tmp_path / "frame.html", "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom",
        f"--window-size={max(500, width + 20)},1000",
    )  # fmt: skip
    assert 'data-wide="0"' in shown
    assert 'data-loaded="true"' in shown


def test_fit_and_test_write_a_report_unless_told_not_to(
    memdml: Command, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    memdml(TINY)
    memdml("test --ckpt_path runs/latest/checkpoints/last.ckpt")
    memdml("test --ckpt_path runs/latest/checkpoints/last.ckpt --report false")
    reports = [Path(f"runs/memdml/version_{version}/report.html") for version in range(3)]
    assert [report.is_file() for report in reports] == [True, True, False]
    assert [message for message in caplog.messages if message.startswith("Report: ")] == [
        f"Report: {reports[0]}",
        f"Report: {reports[1]}",
    ]
    training, test = (report.read_text(encoding="utf-8") for report in reports[:2])
    assert "<h1>Training report</h1>" in training
    assert "at step 3 of 3" in training
    for line in ("batch loss per pair", "memory loss per pair", "Recall@1"):
        assert line in training
    assert "<h1>Test report</h1>" in test
    assert "GlyphDataModule" in test
    shown = re.search(r"Recall@1 +(\d+\.\d) %", capsys.readouterr().out)
    assert shown is not None
    assert f"<b>{shown[1]}</b>" in test


def test_a_run_without_validation_classes_has_a_report_too(memdml: Command) -> None:
    memdml(f"{TINY} --data.val_fraction=0")
    assert "There were no validation classes" in Path("runs/memdml/version_0/report.html").read_text(encoding="utf-8")


def test_a_run_that_ends_before_its_first_validation_is_scored_for_its_report(memdml: Command) -> None:
    memdml(f"{TINY} --trainer.val_check_interval=100 --trainer.check_val_every_n_epoch=null")
    report = Path("runs/memdml/version_0/report.html").read_text(encoding="utf-8")
    assert "There were no validation classes" not in report
    assert "<h2>Scores of the validation classes at step 3 of 3</h2>" in report
    assert "<h2>Hardest queries first</h2>" in report


def test_queries_and_gallery_may_be_two_sets(memdml: Command) -> None:
    for number in range(32):
        role = ("train", "query", "gallery", "gallery")[number % 4]
        file = Path(f"pictures/{role}/{'train' if role == 'train' else 'test'}{number // 8}/{number}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(number % 8).save(file)
    memdml(
        f"fit --model.backbone=SmallConvNet --model.backbone.width=4 --model.backbone.in_channels=3 {LOSS} {MEMORY} "
        f"{QUIET} --model.embedding_dim=8 --data=FolderDataModule --data.root=pictures --data.image_size=28 "
        "--data.num_workers=0 --data.val_fraction=0 --data.batch_size=8 --data.images_per_class=2 --trainer.max_steps=2"
    )
    memdml("test --ckpt_path runs/latest/checkpoints/last.ckpt")
    shown = Path("runs/memdml/version_1/report.html").read_text(encoding="utf-8")
    assert "8 queries of 4 classes among 16 images" in shown
    assert "<th>query</th><td>8</td>" in shown
    assert "<th>gallery</th><td>16</td>" in shown


@pytest.mark.usefixtures("offline_wandb")
def test_wandb_receives_the_report(memdml: Command) -> None:
    memdml(
        f"{TINY} --trainer.logger WandbLogger --trainer.logger.offline true --trainer.logger.save_dir runs "
        "--trainer.logger.project tiny"
    )
    (logged,) = Path("runs/wandb").glob("offline-run-*/files/media/html/report_*.html")
    assert "<h1>Training report</h1>" in logged.read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore")  # those of TensorBoard
def test_tensorboard_receives_scores_curves_pictures_and_the_path_of_the_report(memdml: Command) -> None:
    pytest.importorskip("tensorboard", reason="an optional logger, which is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    memdml(
        f"{TINY} --trainer.logger TensorBoardLogger --trainer.logger.save_dir runs --trainer.callbacks+=GalleryLogger "
        "--trainer.callbacks+=WeightCurveLogger --trainer.callbacks.every_n_steps=2 --trainer.callbacks+=MemoryReport "
        "--trainer.callbacks.every_n_steps=2"
    )
    memdml("test --ckpt_path runs/latest/checkpoints/last.ckpt --trust")  # or the logger is not taken from it
    folders = [Path(f"runs/memdml/version_{number}") for number in (0, 1)]
    train, test = (EventAccumulator(str(folder)).Reload() for folder in folders)
    assert [event.step for event in train.Scalars("train/loss")] == [0, 1, 2]
    for events, stage, folder in ((train, "val", folders[0]), (test, "test", folders[1])):
        assert f"{stage}/map_at_r" in events.Tags()["scalars"]
        (text,) = (event.tensor_proto.string_val[0].decode() for event in events.Tensors("report/text_summary"))
        recall = 100 * events.Scalars(f"{stage}/recall_at_1")[-1].value
        assert text.startswith(f"Recall@1 {recall:.1f}  MAP@R ")
        assert text.endswith(f" in percent. The report: `{folder}/report.html`")
        assert (folder / "report.html").is_file()
    assert {"gallery/val", "gallery/val_map", "weights/batch", "weights/memory", "memory/report"} <= set(
        train.Tags()["images"]
    )
    (shown,) = train.Images("gallery/val")
    with Image.open(next(folders[0].glob("gallery/val_0*.png"))) as written:
        assert (shown.width, shown.height) == written.size
    assert "num_classes: 20" in (folders[0] / "hparams.yaml").read_text()


def test_pictures_that_look_the_same_are_found() -> None:
    images = ImageDataset(lambda row: picture(row % 3), list("abcde"), torch.arange(5))  # 0 and 3, 1 and 4 are copies
    blank = ImageDataset(lambda row: Image.new("L", (9, 9), 40 * row), list("ab"), torch.arange(2))
    pairs, compared = near_duplicates([images, blank])
    assert compared == 7
    assert sorted((pair.first, pair.second) for pair in pairs) == [((0, 0), (0, 3)), ((0, 1), (0, 4))]
    assert near_duplicates([]) == ([], 0)


def test_a_gap_interrupts_a_line() -> None:
    drawn = line_chart("t", [Line("a", [0, 1, 2, 3], [1, float("nan"), 1, 2])], "x")
    assert re.search(r'class="line" d="M[\d.]+ [\d.]+M[\d.]+ [\d.]+L[\d.]+ [\d.]+"', drawn)
    assert line_chart("t", [Line("a", [0], [float("nan")])], "x") == ""


def test_numbers_of_axes_are_round_and_long_names_keep_both_ends() -> None:
    assert nice_ticks(0, 0.07) == [0, 0.02, 0.04, 0.06, 0.08]
    assert nice_ticks(3, 3) == [3, 3.2, 3.4, 3.6, 3.8, 4]
    assert shortened("x" * 40 + "end", 9) == "xxxx…xend"
    assert "&lt;b&gt;" in scatter([SimpleNamespace(x=0, y=0, group=0, lines=("<b>", ""))], ["<b>"])  # type: ignore[list-item]
