"""``memdml predict`` and ``memdml score``: embeddings in files, and exact scores of them."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_memdml.cli import main
from lightning_memdml.deploy.predictions import columns_of, read_embeddings, write_embeddings
from lightning_memdml.deploy.score import score_files
from lightning_memdml.retrieval import normalized_mutual_information, rank_queries, rank_reranked, retrieval_scores

K = [1, 2, 5]


def sample(count: int, seed: int, classes: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, 6, generator=torch.Generator().manual_seed(0))
    return centres[labels] + torch.randn(count, 6, generator=generator), labels


@pytest.fixture
def memdml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    monkeypatch.chdir(tmp_path)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["memdml"])
    return lambda line: main(line.split())


# Files


@pytest.mark.parametrize("file_format", ["parquet", "npy"])
def test_what_is_written_is_read_again(file_format: Any, tmp_path: Path) -> None:
    embeddings, labels = sample(7, seed=1)
    columns = {
        "path": ["a,b.jpg", 'quote".jpg', "line\nbreak.jpg", "ü.jpg", "", "6", "7"],
        "label": labels.tolist(),
        "index": [2**62, *range(6)],
    }
    files = write_embeddings(tmp_path / "new" / "embeddings", embeddings.double(), columns, file_format)
    assert [file.suffix for file in files] == ([".parquet"] if file_format == "parquet" else [".npy", ".csv"])
    assert sorted(files) == sorted((tmp_path / "new").iterdir())
    read, found = read_embeddings(files[0])
    assert torch.equal(read, embeddings)
    assert found == columns


@pytest.mark.parametrize("file_format", ["parquet", "npy"])
def test_files_of_several_ranks_are_read_as_one(
    file_format: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second rank saw two images of the first too."""
    embeddings, labels = sample(40, seed=1)
    numbers = torch.randperm(40)

    def write(name: str, rows: list[int]) -> Path:
        columns = {"label": labels[rows].tolist(), "index": numbers[rows].tolist()}
        return write_embeddings(tmp_path / name, embeddings[rows], columns, file_format)[0]

    whole = write("whole", [*range(40)])
    with pytest.raises(FileNotFoundError, match=r"no file .*embeddings.*. `memdml predict` writes it"):
        read_embeddings(tmp_path / f"embeddings{whole.suffix}")
    write("embeddings_rank0", [*range(20)])
    write("embeddings_rank1", [3, *range(20, 40), 19])
    pattern = tmp_path / f"embeddings_rank*{whole.suffix}"
    (read, columns), (wanted, wanted_columns) = read_embeddings(pattern), read_embeddings(whole)
    assert torch.equal(read, wanted)
    assert columns == wanted_columns
    assert score_files(str(pattern), k=K)[str(pattern)] == score_files(str(whole), k=K)[str(whole)]
    with pytest.raises(FileNotFoundError, match=r"Pass those of all ranks, '.*embeddings_rank\*"):
        read_embeddings(tmp_path / f"embeddings{whole.suffix}")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*other"):
        read_embeddings(tmp_path / f"other*{whole.suffix}")
    write_embeddings(tmp_path / "embeddings_rank2", embeddings[:2], {"label": [0, 1]}, file_format)
    with pytest.raises(ValueError, match="Expected files of one dimension and the same columns"):
        read_embeddings(pattern)


def test_files_are_those_other_programs_read(tmp_path: Path) -> None:
    embeddings, labels = sample(5, seed=2)
    columns = {"path": list("abcde"), "label": labels.tolist()}
    (table,) = write_embeddings(tmp_path / "e", embeddings, columns, "parquet")
    frame = pd.read_parquet(table)
    np.testing.assert_array_equal(np.stack(frame.embedding.to_list()), embeddings.numpy())
    assert frame.path.tolist() == list("abcde")
    array, beside = write_embeddings(tmp_path / "e", embeddings, columns, "npy")
    np.testing.assert_array_equal(np.load(array), embeddings.numpy())
    assert pd.read_csv(beside).label.tolist() == labels.tolist()


def test_damaged_files_are_told(tmp_path: Path) -> None:
    embeddings, labels = sample(5, seed=3)
    (table,) = write_embeddings(tmp_path / "e", embeddings, {"label": labels.tolist()}, "parquet")
    array, beside = write_embeddings(tmp_path / "e", embeddings, {"label": labels.tolist()}, "npy")
    table.write_bytes(table.read_bytes()[:-20])
    pd.DataFrame({"label": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="Expected embeddings of the layout"):
        read_embeddings(table)
    with pytest.raises(ValueError, match="no column `embedding` among label"):
        read_embeddings(tmp_path / "other.parquet")
    beside.write_text("label\n1\n2\n")
    with pytest.raises(ValueError, match=r"got \(5, 6\) and {'label': 2}"):
        read_embeddings(array)
    beside.unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*e\.csv"):
        read_embeddings(array)
    with pytest.raises(ValueError, match=r"\.parquet or \.npy"):
        read_embeddings(tmp_path / "e.npz")


def test_queries_and_gallery_are_written_with_their_own_paths(memdml: Callable[[str], None]) -> None:
    """An image of both has one number in both files, by which it is kept from finding itself."""
    rows = ["path,label,split,is_query,is_gallery"]
    for row in range(24):
        Image.new("RGB", (20, 20), (10 * row, 0, 200)).save(f"{row}.png")
        split = "train" if row < 12 else "test"
        rows.append(f"{row}.png,item{row // 3},{split},{row % 3 != 1},{row % 3 != 0}")
    Path("table.csv").write_text("\n".join(rows))
    net = (
        "--model.backbone=SmallConvNet --model.backbone.in_channels=3 --model.backbone.width=4 --model.embedding_dim=8"
    )
    data = "--data=TableDataModule --data.path=table.csv --data.image_size=20 --data.num_workers=0 "
    data += "--data.batch_size=9 --data.images_per_class=3"
    run = "--trainer.accelerator=cpu --trainer.max_steps=1 --data.val_fraction=0 --trainer.enable_progress_bar=false"
    memdml(f"fit {net} {data} {run} --model.loss=ContrastiveLoss")
    memdml("predict --ckpt_path runs/memdml/version_0/checkpoints/last.ckpt --trainer.enable_progress_bar=false")
    files = [Path(f"runs/memdml/version_1/{name}_embeddings.parquet") for name in ("query", "gallery")]
    (query, query_columns), (gallery, gallery_columns) = (read_embeddings(file) for file in files)
    assert [Path(path).name for path in query_columns["path"]] == [
        f"{row}.png" for row in range(12, 24) if row % 3 != 1
    ]
    assert [Path(p).name for p in gallery_columns["path"]] == [f"{row}.png" for row in range(12, 24) if row % 3 != 0]
    assert query_columns["class"] == [f"item{int(Path(path).stem) // 3}" for path in query_columns["path"]]
    both = {path: row for row, path in enumerate(query_columns["path"]) if path in gallery_columns["path"]}
    assert len(both) == 4
    for path, row in both.items():
        other = gallery_columns["path"].index(path)
        assert query_columns["index"][row] == gallery_columns["index"][other]
        torch.testing.assert_close(query[row], gallery[other], atol=1e-6, rtol=0)
    scores = score_files(str(files[0]), str(files[1]), k=[1])[str(files[1])]
    assert scores["queries"] == 8  # had an image found itself, all four of both would be right


# Scores


def test_scores_of_a_file_are_those_of_its_rows(
    memdml: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    embeddings, labels = sample(60, seed=4)
    columns = {"label": labels.tolist(), "class": [f"kind {label}" for label in labels], "index": list(range(60))}
    repeated = [*range(60), 3, 5]  # as ranks pad
    padded = {name: [values[row] for row in repeated] for name, values in columns.items()}
    write_embeddings(Path("e"), embeddings[repeated], padded, "parquet")
    memdml("score --embeddings e.parquet --k [1,2,5] --intervals true --mean_average_precision true --nmi true "
           "--per_class classes.csv --map map.png")  # fmt: skip
    said = capsys.readouterr().out
    ranks = rank_queries(embeddings, labels, mean_average_precision=True)
    limits = ranks.confidence_intervals(K)
    for name, value in ranks.scores(K).items():
        (line,) = (line for line in said.splitlines() if line.split()[0] == name)
        assert line.split()[1] == (f"{value:,}" if name in ("queries", "excluded") else f"{value:.4f}")
        if name in limits:
            assert f"[{limits[name][0]:.4f}, {limits[name][1]:.4f}]" in line
    nmi = normalized_mutual_information(embeddings[repeated], labels[repeated])
    assert f"{nmi:.4f}" in next(line for line in said.splitlines() if "nmi" in line)
    with Path("classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    table = ranks.per_class(K)
    assert [row["class"] for row in rows] == [f"kind {label}" for label in table["label"].tolist()]
    assert [float(row["map_at_r"]) for row in rows] == table["map_at_r"].tolist()
    assert Image.open("map.png").width > 500


def test_scores_after_re_ranking_stand_beside_the_plain_ones(
    memdml: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    embeddings, labels = sample(60, seed=4)
    repeated = [*range(60), 3, 5]  # as ranks pad
    columns = {"label": labels[repeated].tolist(), "index": repeated}
    write_embeddings(Path("e"), embeddings[repeated], columns, "parquet")
    memdml("score --embeddings e.parquet --k [1,2,5] --intervals true --rerank true --k1 9 --k2 3 --lambda_value 0.4")
    printed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    plain, reranked = rank_queries(embeddings, labels), rank_reranked(embeddings, labels, k1=9, k2=3, lambda_value=0.4)
    limits = reranked.confidence_intervals(K)
    assert plain.scores(K)["map_at_r"] != reranked.scores(K)["map_at_r"]
    for name, (low, high) in limits.items():
        cells = printed[name].split()
        assert cells[1] == f"{plain.scores(K)[name]:.4f}"
        assert cells[4:] == [f"{reranked.scores(K)[name]:.4f}", f"[{low:.4f},", f"{high:.4f}]"]
    assert printed["queries"].split() == ["queries", "60"]
    assert printed["plain"].split() == ["plain", "re-ranked"]

    write_embeddings(Path("gallery"), *_rows_and_labels(40, seed=5), "parquet")
    (scores,) = score_files("e.parquet", "gallery.parquet", k=[1], rerank=True, lambda_value=1).values()
    assert {f"reranked_{name}" for name in ("recall_at_1", "map_at_r", "r_precision")} < scores.keys()
    assert scores["reranked_map_at_r"] == pytest.approx(scores["map_at_r"])


def _rows_and_labels(count: int, seed: int) -> tuple[Tensor, dict[str, list[Any]]]:
    embeddings, labels = sample(count, seed)
    return embeddings, {"label": labels.tolist(), "index": list(range(100, 100 + count))}


def test_several_galleries_groups_and_texts_for_labels(tmp_path: Path) -> None:
    embeddings, labels = sample(60, seed=5)
    cameras = [f"camera {row % 3}" for row in range(60)]
    files = []
    for name, rows in (("query", range(20)), ("small", range(20, 35)), ("large", range(20, 60))):
        # No index: nothing says that images of two files are the same.
        columns = {"label": [f"item {labels[row]}" for row in rows], "camera": [cameras[row] for row in rows]}
        files += write_embeddings(tmp_path / name, embeddings[list(rows)], columns, "parquet")
    scores = score_files(str(files[0]), [str(file) for file in files[1:]], k=K, groups="camera")
    groups = torch.arange(60) % 3
    for file, end in ((files[1], 35), (files[2], 60)):
        expected = retrieval_scores(
            embeddings[:20], labels[:20], embeddings[20:end], labels[20:end], k=K,
            groups=groups[:20], gallery_groups=groups[20:end],
        )  # fmt: skip
        assert scores[str(file)] == pytest.approx(expected, nan_ok=True)


def test_what_cannot_be_scored_is_explained(memdml: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    embeddings, labels = sample(6, seed=6)
    write_embeddings(Path("plain"), embeddings, {"label": labels.tolist()}, "parquet")
    write_embeddings(Path("nameless"), embeddings, {"path": list("abcdef")}, "npy")
    embeddings[2] = torch.nan
    write_embeddings(Path("nan"), embeddings, {"label": labels.tolist()}, "parquet")
    for line, sentence in (
        ("score --embeddings none.parquet", "`memdml predict` writes"),
        (
            "score --embeddings plain.parquet --groups camera",
            "Expected the column `camera` of `groups` but got label",
        ),
        ("score --embeddings nameless.npy", "Expected a column `label` but got path"),
        ("score --embeddings nan.parquet", "NaN or infinity in 1 of 6 rows: 2"),
    ):
        with pytest.raises(SystemExit, match="error: ") as stop:
            memdml(line)
        assert sentence in str(stop.value.code), line


def test_an_image_of_unknown_index_has_no_path() -> None:
    class Images:
        indices, paths = torch.tensor([4, 7]), ["four.png", "seven.png"]

    columns = columns_of(torch.tensor([0, 0, 1]), torch.tensor([7, -1, 4]), Images())
    assert columns["path"] == ["seven.png", "", "four.png"]
