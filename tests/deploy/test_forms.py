"""`score`, `index`, `search` and `predict` with averages over mirrored images, whitening and re-ranking."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.command_line import Command, answer
from support.workshop import DATA, LAST, draw

from lightning_memdml.data.images import ImageDataset
from lightning_memdml.data.transforms import EvaluationTransform
from lightning_memdml.deploy import embedding
from lightning_memdml.deploy.predictions import read_embeddings, write_embeddings
from lightning_memdml.deploy.score import score_files
from lightning_memdml.deploy.trained import load_learner
from lightning_memdml.inference.evaluation import embed_images
from lightning_memdml.retrieval import rank_queries, rank_reranked
from lightning_memdml.retrieval.index import build_index, load_index
from lightning_memdml.whitening import Whitening


def embed_files(files: list[Path], flip: bool) -> torch.Tensor:
    prepare = EvaluationTransform(28)
    images = torch.stack([prepare(Image.open(file).convert("RGB")) for file in files])
    with torch.inference_mode():
        return embed_images(load_learner(LAST), images, flip)


def embedded(classes: range, flip: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of the pictures of some classes, and their labels."""
    files = [file for file in sorted(Path("pictures").rglob("*.png")) if int(file.parent.name[0]) in classes]
    return embed_files(files, flip), torch.tensor([int(file.parent.name[0]) for file in files])


def test_every_form_stands_in_one_table(memdml: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memdml(
        f"score --ckpt_path {LAST} --flip --whiten --rerank --k1 5 --k2 2 --k [1,3] --per_class {tmp_path}/classes.csv"
    )
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == LAST
    forms = ["plain", "flip", "whitened", "re-ranked", "flip+whitened+re-ranked"]
    assert printed[1].split() == forms
    cells = {line.split()[0]: line.split()[1:] for line in printed[2:]}
    assert cells["queries"] == ["24"]
    expected = {}
    reranking = {"k1": 5, "k2": 2}
    for flip in (False, True):
        rows, labels = embedded(range(4, 8), flip)
        whitened = Whitening.fit(embedded(range(4), flip)[0])(rows)
        if flip:
            expected["flip"] = rank_queries(rows, labels)
            expected[forms[-1]] = rank_reranked(whitened, labels, **reranking)
        else:
            expected |= {"plain": rank_queries(rows, labels), "whitened": rank_queries(whitened, labels)}
            expected["re-ranked"] = rank_reranked(rows, labels, **reranking)
    for score in ("recall_at_1", "recall_at_3", "map_at_r", "r_precision"):
        assert cells[score] == [f"{expected[form].scores((1, 3))[score]:.4f}" for form in forms], score
    assert printed[-2] == "Whitened on 24 training images, 8 to 8 dimensions."
    with (tmp_path / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    for form in forms:
        found = [float(row["map_at_r"]) for row in rows if row["form"] == form]
        assert found == pytest.approx(expected[form].per_class((1, 3))["map_at_r"].tolist(), abs=1e-6)


def test_a_file_is_whitened_by_that_of_the_training_images(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, training, labels = torch.randn(40, 6, generator=generator), torch.randn(50, 6, generator=generator), []
    labels = (torch.arange(40) % 5).tolist()
    (file,) = write_embeddings(tmp_path / "e", rows, {"label": labels}, "parquet")
    (known,) = write_embeddings(tmp_path / "t", training, {"label": [0] * 50}, "parquet")
    (scores,) = score_files(str(file), k=[1], whiten=True, train=str(known), whiten_dim=3, shrinkage=0.1).values()
    whitened = Whitening.fit(training, 3, 0.1)(rows)
    assert scores["whitened_map_at_r"] == pytest.approx(
        rank_queries(whitened, torch.tensor(labels)).scores([1])["map_at_r"]
    )
    assert scores["map_at_r"] == pytest.approx(rank_queries(rows, torch.tensor(labels)).scores([1])["map_at_r"])
    assert not {name for name in scores if name.startswith(("reranked_", "flip_"))}


def test_predictions_are_averages(memdml: Command) -> None:
    memdml(f"predict --ckpt_path {LAST} --flip --trainer.enable_progress_bar=false")
    (file,) = Path("runs").rglob("embeddings.parquet")
    torch.testing.assert_close(read_embeddings(file)[0], embedded(range(4, 8), flip=True)[0], atol=1e-5, rtol=0)


def test_an_index_of_averages_is_searched_by_averages(
    memdml: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memdml(f"index --ckpt_path {LAST} --flip --whiten --whiten_dim 5 --output {tmp_path}/index")
    index = load_index(tmp_path / "index")
    whitening = Whitening.fit(embedded(range(4), flip=True)[0], 5)
    rows = whitening(embedded(range(4, 8), flip=True)[0])
    np.testing.assert_allclose(index.embeddings, rows, atol=1e-4)
    assert index.about["flip"] is True
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [
        "embeddings.npy", "images.parquet", "index.json", "whitening.npy",
    ]  # fmt: skip
    query = tmp_path / "new.png"
    draw(query, "blue", 9)
    expected = (whitening(embed_files([query], flip=True)) @ rows.T)[0].sort(descending=True)
    paths = ["/".join(Path(path).parts[-2:]) for path in index.images.paths]
    capsys.readouterr()
    memdml(f"search {query} --index {tmp_path}/index --k 4")
    lines = capsys.readouterr().out.splitlines()[1:5]
    assert [float(line.split()[1]) for line in lines] == pytest.approx(expected.values[:4].tolist(), abs=1e-3)
    assert [line.rpartition("pictures/")[2] for line in lines] == [paths[row] for row in expected.indices[:4]]

    memdml(f"search {query} --index {tmp_path}/index --k 4 --rerank --candidates 20 --k1 6 --k2 2")
    lines = capsys.readouterr().out.splitlines()[1:5]
    reranked = index.search_reranked(embed_files([query], flip=True), 4, 20, k1=6, k2=2)[1][0].tolist()
    before = expected.indices.tolist()
    for place, (line, row) in enumerate(zip(lines, reranked, strict=True), start=1):
        assert line.split()[:2] == [str(place), f"({before.index(row) + 1})"]
        assert line.endswith(f"pictures/{paths[row]}")


def test_a_killed_index_keeps_the_embeddings_of_the_training_images(
    memdml: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memdml(f"index --ckpt_path {LAST} --whiten --output {tmp_path}/whole")
    opened: list[int] = []
    whole = ImageDataset.open

    def dying(self: ImageDataset, position: int) -> Any:
        opened.append(position)
        if len(opened) == 33:  # 24 training images, two batches of 4, and one more
            raise KeyboardInterrupt
        return whole(self, position)

    monkeypatch.setattr(embedding, "BATCHES_PER_SAVE", 1)
    monkeypatch.setattr(ImageDataset, "open", dying)
    data = f"{DATA} --data.val_fraction=0 --data.eval_batch_size=4"
    command = f"index --ckpt_path {LAST} {data} --whiten --output {tmp_path}/index"
    with pytest.raises(SystemExit):
        memdml(command)
    opened.clear()
    memdml(command)
    assert opened == list(range(8, 24))
    one, other = load_index(tmp_path / "whole"), load_index(tmp_path / "index")
    np.testing.assert_allclose(one.embeddings, other.embeddings, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "whole"]


def test_re_ranking_in_a_search_is_that_of_the_score(tmp_path: Path) -> None:
    """With all images as candidates, a query alone has the order that `score` counts its ranks in."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(6, 5, generator=generator)
    labels = torch.arange(60) % 6
    gallery = centres[labels] + 1.2 * torch.randn(60, 5, generator=generator)
    (file,) = write_embeddings(tmp_path / "gallery", gallery, {"label": labels.tolist()}, "parquet")
    index, changed = build_index(gallery), 0
    for label in range(6):
        query = centres[[label]] + torch.randn(1, 5, generator=generator)
        (alone,) = write_embeddings(tmp_path / "query", query, {"label": [label]}, "parquet")
        options = {"k1": 8, "k2": 3, "lambda_value": 0.2}
        (scores,) = score_files(str(alone), str(file), k=[1], rerank=True, **options).values()
        hits = (labels[index.search_reranked(query, 60, 60, **options)[1][0, :10]] == label).double()
        assert scores["reranked_r_precision"] == pytest.approx(float(hits.mean()))
        precision = hits.cumsum(0) / torch.arange(1, 11)
        assert scores["reranked_map_at_r"] == pytest.approx(float((precision * hits).mean()))
        changed += scores["reranked_map_at_r"] != scores["map_at_r"]
        few = index.search_reranked(query, 5, 7, **options)[1]
        assert set(few[0].tolist()) <= set(index.search(query, 7)[1][0].tolist())
    assert changed
    with pytest.raises(ValueError, match="Expected") as error:
        index.search_reranked(query, 10, 9)
    assert str(error.value) == (
        "Expected at least as many candidates as neighbours, 10, but got 9. Pass more candidates."
    )


ALONE = (
    "Expected `--{0}`, without which `--{1}` does nothing, but got `--{1} {2}` alone. Add `--{0}`, or leave `--{1}` "
    "out."
)
MISTAKES = {
    "score --embeddings e.parquet --flip": (
        "Expected `--ckpt_path` with `--flip`, as mirrored images have to be embedded, but got embeddings in a file. "
        "Pass the checkpoint in place of the file, or write the file with `memdml predict --flip`."
    ),
    "score --embeddings e.parquet --whiten": (
        "Expected the embeddings of the training images with `--whiten` but got those to score alone. Add `--train "
        "FILE`, or pass `--ckpt_path` in place of the file."
    ),
    "score --embeddings e.parquet --ckpt_path last.ckpt": (
        "Expected either a checkpoint, whose own images are scored, or files but got `--ckpt_path` and `--embeddings`. "
        "Leave one out."
    ),
    "score --embeddings e.parquet --k1 30": ALONE.format("rerank", "k1", 30),
    "score --embeddings e.parquet --lambda_value 0.5": ALONE.format("rerank", "lambda_value", 0.5),
    "score --embeddings e.parquet --whiten_dim 64": ALONE.format("whiten", "whiten_dim", 64),
    "score --embeddings e.parquet --train t.parquet": ALONE.format("whiten", "train", "t.parquet"),
    "index --ckpt_path last.ckpt --shrinkage 0.1": ALONE.format("whiten", "shrinkage", 0.1),
    "search bird.jpg --k2 3": ALONE.format("rerank", "k2", 3),
    "search bird.jpg --candidates 500": ALONE.format("rerank", "candidates", 500),
}


@pytest.mark.parametrize("line", MISTAKES)
def test_an_option_that_does_nothing_is_refused(line: str, memdml: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(memdml, line, capsys).strip() == f"error: {MISTAKES[line]}"
