"""`memdml index` and `memdml search`: from a checkpoint to what is found, on a page and in a picture."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.command_line import Command
from support.workshop import COLOURS, DATA, LAST, RUN, draw

from lightning_memdml import GlyphDataModule, MetricLearner
from lightning_memdml.cli import main
from lightning_memdml.data.images import ImageDataset
from lightning_memdml.data.transforms import EvaluationTransform
from lightning_memdml.deploy import embedding
from lightning_memdml.deploy.trained import load_learner
from lightning_memdml.retrieval.index import load_index
from lightning_memdml.retrieval.index_kinds import IVF

pytest.importorskip("faiss", reason="an index is one of faiss")


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
    with pytest.raises(SystemExit) as ended:
        memdml(f"index --ckpt_path {LAST} {data} --output {tmp_path}/index")
    assert ended.value.code == 130
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
    expected = np.array(embedding.embed_to_file(learner, images, tmp_path, "digest"))
    (tmp_path / "progress.json").write_text('{"fingerprint": "of another", "done": 2}')
    (rows := np.lib.format.open_memmap(tmp_path / "embeddings.npy", "r+"))[:] = 9
    rows.flush()
    np.testing.assert_array_equal(embedding.embed_to_file(learner, images, tmp_path, "digest"), expected)
    (tmp_path / "embeddings.npy").write_bytes(b"damaged")
    np.testing.assert_array_equal(embedding.embed_to_file(learner, images, tmp_path, "digest"), expected)


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
