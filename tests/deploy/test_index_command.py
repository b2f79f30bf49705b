"""``memdml index`` and ``memdml search``: from a checkpoint and images to the nearest of an image file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from lightning_memdml import GlyphDataModule, MetricLearner
from lightning_memdml.cli import main
from lightning_memdml.data.images import ImageDataset
from lightning_memdml.data.transforms import EvaluationTransform
from lightning_memdml.deploy import embedding
from lightning_memdml.deploy.trained import load_learner
from lightning_memdml.retrieval.index import build_index, load_index
from lightning_memdml.retrieval.index_folder import staged_folder
from lightning_memdml.retrieval.index_kinds import IVF

pytest.importorskip("faiss", reason="an index is one of faiss")

COLOURS = ["red", "orange", "gold", "green", "teal", "blue", "purple", "gray"]
NET = "--model.backbone=SmallConvNet --model.backbone.in_channels=3 --model.backbone.width=4 --model.embedding_dim=8"
DATA = "--data=FolderDataModule --data.root=pictures --data.image_size=28 --data.num_workers=0 --data.batch_size=8"
RUN = "--trainer.accelerator=cpu --trainer.max_steps=2 --trainer.enable_progress_bar=false --data.val_fraction=0"
FIT = f"fit {NET} --model.loss=ContrastiveLoss {DATA} {RUN}"
LAST = "runs/memdml/version_0/checkpoints/last.ckpt"

Command = Callable[[str], None]
RunIn = Callable[[Path], AbstractContextManager[None]]


def draw(path: Path, colour: str, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", (40 + number, 36), colour)
    ImageDraw.Draw(picture).ellipse((2 * number, 3, 2 * number + 12, 15 + number), fill="white")
    picture.save(path)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, run_in: RunIn) -> Iterator[Path]:
    """A folder with pictures of eight classes, the later four of which were not trained on, and a checkpoint."""
    folder = tmp_path_factory.mktemp("workshop")
    for label, colour in enumerate(COLOURS):
        for number in range(6):
            draw(folder / "pictures" / f"{label} {colour}" / f"{number}.png", colour, number)
    with run_in(folder):
        main(FIT.split())
        yield folder


@pytest.fixture
def memdml(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.chdir(workshop)
    monkeypatch.setattr(sys, "argv", ["memdml"])
    return lambda line: main(line.split())


def answer(memdml: Command, line: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        memdml(line)
    said = capsys.readouterr().err
    assert stop.value.code not in (0, None)
    assert "Traceback" not in said
    return said if isinstance(stop.value.code, int) else str(stop.value.code)


def embedded(learner: MetricLearner, files: list[str]) -> torch.Tensor:
    """What the network says of image files, prepared as its test images were."""
    prepare = EvaluationTransform(28)
    with torch.inference_mode():
        return learner(torch.stack([prepare(Image.open(file).convert("RGB")) for file in files]))


# Index


def test_index_holds_the_test_classes_as_the_network_embeds_them(
    memdml: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memdml(f"index --ckpt_path {LAST} --output {tmp_path}/index")
    said = capsys.readouterr().out
    assert "24 images of 4 classes, flat index: recall against exact search of 24 images: @1 1.0000" in said
    index = load_index(tmp_path / "index")
    assert index.images.classes == [f"{label} {COLOURS[label]}" for label in range(4, 8) for _ in range(6)]
    assert index.images.paths[7] == str(Path("pictures/5 blue/1.png").absolute())
    expected = embedded(load_learner(LAST), index.images.paths)
    np.testing.assert_allclose(index.embeddings, expected, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [
        "embeddings.npy", "images.parquet", "index.json",
    ]  # fmt: skip


@pytest.mark.parametrize("images", ["query", "train"])
def test_other_parts_of_the_data_are_prepared_as_test_images(images: str, memdml: Command, tmp_path: Path) -> None:
    memdml(f"index --ckpt_path {LAST} --images {images} --output {tmp_path}/index")
    index = load_index(tmp_path / "index")
    assert len(index) == 24
    assert index.images.classes[0] == {"query": "4 teal", "train": "0 red"}[images]
    np.testing.assert_allclose(index.embeddings, embedded(load_learner(LAST), index.images.paths), atol=1e-6)


def test_other_data_and_other_kinds_of_index_can_be_given(memdml: Command, tmp_path: Path) -> None:
    data = "--data FolderDataModule --data.root pictures --data.split_by alternate --data.image_size 28"
    memdml(f"index --ckpt_path {LAST} {data} --kind ivf --nlist 4 --nprobe 1 --output {tmp_path}/index")
    index = load_index(tmp_path / "index")
    assert sorted(set(index.images.classes)) == ["1 orange", "3 green", "5 blue", "7 gray"]
    assert index.kind == IVF(nlist=4, nprobe=1)
    assert (index.faiss_index.nlist, index.faiss_index.nprobe) == (4, 1)


@pytest.mark.filterwarnings("ignore:.* are no images of a class")
def test_a_folder_is_taken_with_all_its_images_at_any_depth(memdml: Command, tmp_path: Path) -> None:
    source = tmp_path / "album"
    for name in ("one.png", "trip/two.JPG", "trip/sea/three.png", ".hidden/four.png", "trip/.five.png"):
        draw(source / name, "teal", 3)
    (source / "trip" / "notes.txt").write_text("not an image")
    with pytest.warns(UserWarning, match=r"1 files in .* are not used: .txt"):
        memdml(f"index --ckpt_path {LAST} --source {source} --output {tmp_path}/index")
    index = load_index(tmp_path / "index")
    found = [(str(Path(path).relative_to(source)), name) for path, name in zip(*index.images[::2], strict=True)]
    assert found == [("one.png", "album"), ("trip/sea/three.png", "trip"), ("trip/two.JPG", "trip")]


@pytest.mark.parametrize("ending", ["csv", "npz"])
def test_a_table_or_archive_is_taken_whole(ending: str, memdml: Command, tmp_path: Path) -> None:
    files = [Path(f"pictures/{label} {COLOURS[label]}/2.png").resolve() for label in range(8)]
    source = tmp_path / f"catalogue.{ending}"
    if ending == "csv":
        rows = [f"{file.relative_to('/')},item{row}" for row, file in enumerate(files)]
        (source.parent / Path(*files[0].parts[1:2])).symlink_to(Path("/", files[0].parts[1]))
        source.write_text("\n".join(["path,label", *rows]))
    else:
        contents = [file.read_bytes() for file in files]
        ends = np.cumsum([0, *map(len, contents)])
        names = np.array([f"item{row}" for row in range(8)])
        jpeg = np.frombuffer(b"".join(contents), np.uint8)
        np.savez(source, jpeg=jpeg, offset=ends, label=np.arange(8), classes=names)
    memdml(f"index --ckpt_path {LAST} --source {source} --output {tmp_path}/index")
    index = load_index(tmp_path / "index")
    assert index.images.classes == [f"item{row}" for row in range(8)]
    np.testing.assert_allclose(index.embeddings, embedded(load_learner(LAST), list(map(str, files))), atol=1e-6)


def test_a_killed_run_goes_on_where_it_stopped(
    memdml: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memdml(f"index --ckpt_path {LAST} --output {tmp_path}/whole")
    opened: list[int] = []
    whole = ImageDataset.open

    def dying(self: ImageDataset, position: int) -> Any:
        opened.append(position)
        if len(opened) == 18:
            raise KeyboardInterrupt
        return whole(self, position)

    monkeypatch.setattr(embedding, "BATCHES_PER_SAVE", 1)
    monkeypatch.setattr(ImageDataset, "open", dying)
    data = f"{DATA} --data.eval_batch_size=4"
    with pytest.raises(KeyboardInterrupt):
        memdml(f"index --ckpt_path {LAST} {data} --output {tmp_path}/index")
    assert not (tmp_path / "index").exists()
    done = json.loads((tmp_path / ".index.partial/progress.json").read_text())["done"]
    assert done == 16  # four batches; the fifth was not finished
    opened.clear()
    memdml(f"index --ckpt_path {LAST} {data} --output {tmp_path}/index".replace("size=4", "size=3"))
    assert opened == list(range(16, 24))
    one, other = load_index(tmp_path / "whole"), load_index(tmp_path / "index")
    np.testing.assert_allclose(one.embeddings, other.embeddings, atol=1e-6)
    assert not (tmp_path / ".index.partial").exists()


def test_what_was_embedded_for_something_else_is_not_taken_up(memdml: Command, tmp_path: Path) -> None:
    """A partial folder of other images, of another checkpoint or another transform, or a damaged one."""
    learner, images = (
        load_learner(LAST),
        ImageDataset(lambda row: Image.new("RGB", (28, 28)), ["a", "b"], torch.ones(2)),
    )
    images.transform = EvaluationTransform(28)
    first = embedding.fingerprint(images, "digest")
    assert first == embedding.fingerprint(images, "digest")
    assert first != embedding.fingerprint(images, "another")
    for change in ({"paths": ["a", "c"]}, {"labels": torch.zeros(2)}, {"transform": EvaluationTransform(20)}):
        other = images.part(torch.arange(2), images.transform)
        for name, value in change.items():
            setattr(other, name, value)
        assert first != embedding.fingerprint(other, "digest")
    expected = np.array(embedding.embed(learner, images, tmp_path, "digest"))
    (tmp_path / "progress.json").write_text('{"fingerprint": "of another", "done": 2}')
    (rows := np.lib.format.open_memmap(tmp_path / "embeddings.npy", "r+"))[:] = 9
    rows.flush()
    np.testing.assert_array_equal(embedding.embed(learner, images, tmp_path, "digest"), expected)
    (tmp_path / "embeddings.npy").write_bytes(b"damaged")
    np.testing.assert_array_equal(embedding.embed(learner, images, tmp_path, "digest"), expected)


# Search


def test_an_image_file_finds_itself_and_its_class(
    memdml: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memdml(f"index --ckpt_path {LAST} --output {tmp_path}/index")
    draw(tmp_path / "new.png", "blue", 4)  # as pictures/5 blue/4.png, but another file
    capsys.readouterr()
    main(["search", str(tmp_path / "new.png"), "pictures/4 teal/1.png", "--index", f"{tmp_path}/index", "--k", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[4]) == (str(tmp_path / "new.png"), "pictures/4 teal/1.png")
    assert lines[1].split() == ["1", "1.0000", "5", "blue", f"{Path.cwd()}/pictures/5", "blue/4.png"]
    assert lines[5].split()[1:] == ["1.0000", "4", "teal", f"{Path.cwd()}/pictures/4", "teal/1.png"]
    scores = [float(line.split()[1]) for line in lines[1:4]]
    assert scores == sorted(scores, reverse=True)
    similarities = (
        embedded(load_learner(LAST), [str(tmp_path / "new.png")])
        @ embedded(load_learner(LAST), load_index(tmp_path / "index").images.paths).T
    )
    assert scores == pytest.approx(similarities[0].topk(3).values.tolist(), abs=1e-4)
    assert "24 images, flat index:" in lines[8]
    assert "ms per search" in lines[8]
    assert lines[8].endswith("recall@3 against exact search 1.0000")


class Pictures(HTMLParser):
    """The kinds and captions of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.kinds: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag == "figure":
            self.kinds.append(dict(attributes)["class"])

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_what_is_found_can_be_seen_on_a_page_and_in_a_picture(memdml: Command, tmp_path: Path) -> None:
    memdml(f"index --ckpt_path {LAST} --output {tmp_path}/index")
    query = tmp_path / "<b>new.png"
    draw(query, "blue", 4)
    show = ["--html", str(tmp_path / "found.html"), "--png", str(tmp_path / "found.png")]
    main(["search", str(query), "--index", f"{tmp_path}/index", "--k", "4", *show])
    page = Pictures((tmp_path / "found.html").read_text())
    assert page.kinds == ["query", *["found"] * 4]
    assert {"<b>new.png", "5 blue", "1.00"} <= set(page.words)
    assert not {"✓ solid", "✗ dashed"} & set(page.words)  # nobody knows the class of the query
    assert Image.open(tmp_path / "found.png").width > 400


@pytest.mark.filterwarnings("ignore:.* are no images of a class")
def test_glyphs_are_searched_by_a_picture_of_one(
    tmp_path: Path, glyph_cache: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their data module holds a tensor, so a file is brought to its channels and size first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_MEMDML_CACHE", glyph_cache)
    monkeypatch.setattr(sys, "argv", ["memdml"])
    net = "--model.backbone=SmallConvNet --model.backbone.width=4 --model.embedding_dim=8 --model.loss=ContrastiveLoss"
    main(f"fit {net} --data.num_classes=20 --data.batch_size=8 {RUN}".split())
    main(f"index --ckpt_path {LAST}".split())
    glyphs = GlyphDataModule(num_classes=20)
    glyphs.setup()
    glyphs.gallery_set.picture(5).convert("RGB").save("glyph.png")
    capsys.readouterr()
    main(["search", "glyph.png", "--k", "1", "--html", "found.html"])
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["1", "1.0000"]
    assert load_index("runs/index").images.paths[5] in glyphs.gallery_set.paths[5]
    assert Pictures(Path("found.html").read_text()).kinds == ["query", "found"]
    with pytest.warns(UserWarning, match="are not used"):
        main(f"index --ckpt_path {LAST} --source . --output files".split())
    assert load_index("files").search(torch.from_numpy(load_index("runs/index").embeddings[[5]]))[0][0, 0] > 0.9999


# What is wrong


def test_what_is_wrong_is_said_in_a_sentence(
    memdml: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memdml(f"index --ckpt_path {LAST} --output {tmp_path}/index")
    query = "pictures/0"
    build_index(torch.eye(3)).save(tmp_path / "plain")
    for line, sentence in (
        ("index --ckpt_path none.ckpt", "got none.ckpt: there is no such file"),
        (f"index --ckpt_path {LAST} --source nowhere", "Expected a folder, or a table (.csv, .parquet, .npz), but got"),
        (f"index --ckpt_path {LAST} --images val", "Expected val images but FolderDataModule has none"),
        (f"index --ckpt_path {LAST} --output pictures", "It was not overwritten"),
        (f"index --ckpt_path {LAST} --kind pq --output {tmp_path}/other", "at least 256 images"),
        (f"index --ckpt_path {LAST} --knd pq", "Did you mean '--kind'?"),
        (f"index --ckpt_path {LAST} --kind tree", "Expected `kind` to be one of flat, ivf, hnsw, pq"),
        (f"index --ckpt_path {LAST} --nprobe 4", "no option with `kind=flat` but got `nprobe`, an option of ivf"),
        (f"index --ckpt_path {LAST} --kind ivf --probes=4", "Expected `--nprobe` but got `--probes`"),
        (f"search {query} --index {tmp_path}/index", f"Expected an image file but there is no {query}"),
        (f"search {LAST} --index {tmp_path}/index", f"Cannot read the image {LAST}"),
        (f"search {LAST}", "Make one with `memdml index`"),
        (f"search {LAST} --index {tmp_path}/plain", "which records its network, but this one records none"),
        (f"search {LAST} --index {tmp_path}/index --ckpt_path none.ckpt", "Pass its path as `--ckpt_path`"),
    ):
        assert sentence in answer(memdml, line, capsys), line


def test_features_are_indexed_and_images_beside_them_refused(
    memdml: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    labels = np.arange(40) // 4
    rows = np.random.default_rng(0).normal(size=(40, 2, 6)).astype(np.float32)
    np.savez("features.npz", feature=rows, label=labels, train=labels < 5)
    memdml(
        "fit --data FeatureDataModule --data.path features.npz --data.batch_size 4 --data.images_per_class 2 "
        "--data.val_fraction 0 --model.backbone torch.nn.Identity --model.num_features 6 --model.loss ContrastiveLoss "
        "--trainer.max_steps 2 --trainer.accelerator cpu --trainer.enable_progress_bar false"
    )
    capsys.readouterr()
    memdml(f"index --ckpt_path {LAST} --output index")
    assert "Next: memdml search" not in capsys.readouterr().out
    _, position = load_index("index").search(load_learner(LAST)(torch.from_numpy(rows[20:, 0])), k=1)
    assert position[:, 0].tolist() == list(range(20))
    draw(Path("pictures/a/1.png"), "red", 1)
    for line in (
        "search pictures/a/1.png --index index",
        f"index --ckpt_path {LAST} --source pictures --output other",
        f"export --ckpt_path {LAST} --formats [torch]",
    ):
        assert "but this one was trained on features of them" in answer(memdml, line, capsys), line


@pytest.mark.parametrize("device", ["nowhere", pytest.param("cuda:99")])
def test_a_device_that_is_not_there_is_named(
    device: str, memdml: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = answer(memdml, f"index --ckpt_path {LAST} --device {device} --output {tmp_path}/index", capsys)
    assert f"Expected `device` to be one of this machine, such as cpu, but got {device!r}" in said


def test_an_index_is_searched_with_its_own_checkpoint_only(
    memdml: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memdml(f"index --ckpt_path {LAST} --output {tmp_path}/index")
    checkpoint = torch.load(LAST, weights_only=True)
    checkpoint["state_dict"]["model.head.bias"] += 1
    torch.save(checkpoint, tmp_path / "another.ckpt")
    said = answer(memdml, f"search {LAST} --index {tmp_path}/index --ckpt_path {tmp_path}/another.ckpt", capsys)
    assert "embeddings of two networks cannot be compared" in said


def test_a_damaged_image_is_named_and_nothing_is_lost(
    memdml: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        draw(tmp_path / f"album/{number}.png", "teal", number)
    (tmp_path / "album/2.png").write_bytes(b"no picture")
    said = answer(memdml, f"index --ckpt_path {LAST} --source {tmp_path}/album --output {tmp_path}/index", capsys)
    assert f"Cannot read the image {tmp_path}/album/2.png" in said
    assert not (tmp_path / "index").exists()


def test_a_full_disk_is_an_error_that_names_the_file_and_keeps_the_old_index(
    workshop: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A map of a sparse file would end the process with SIGBUS instead."""
    monkeypatch.chdir(workshop)
    build_index(torch.eye(4)).save(small_disk / "index")
    images = ImageDataset(
        lambda row: torch.zeros(3, 8, 8), [str(row) for row in range(400)], torch.zeros(400, dtype=torch.long)
    )

    class Wide(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return torch.randn(len(batch), 1024)

    with (
        pytest.raises(OSError, match="no space left") as raised,
        staged_folder(small_disk / "index", resume=True) as to,
    ):
        embedding.embed(Wide(), images, to, "digest")
    assert f"for {small_disk}/index but" in str(raised.value)
    assert len(load_index(small_disk / "index")) == 4


def test_two_runs_that_index_to_one_folder_exclude_each_other(
    memdml: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with staged_folder(tmp_path / "index", resume=True) as staged:
        said = answer(memdml, f"index --ckpt_path {LAST} --output {tmp_path}/index", capsys)
        (staged / "index.json").write_text("{}")
    assert f"only process that writes {tmp_path}/index but another one does" in said
    assert [path.name for path in (tmp_path / "index").iterdir()] == ["index.json"]


def test_a_wrong_type_in_the_description_of_an_index_is_named(
    memdml: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memdml(f"index --ckpt_path {LAST} --output {tmp_path}/index")
    file = tmp_path / "index" / "index.json"
    description = json.loads(file.read_text())
    for name, value in (("ckpt_path", 5), ("data", None), ("tensor_shape", "3"), ("images", ["gallery"])):
        file.write_text(json.dumps({**description, "about": {**description["about"], name: value}}))
        said = answer(memdml, f"search {LAST} --index {tmp_path}/index", capsys)
        assert f"it is damaged: its {name} is {value!r}" in said
