"""An index as a table, and what vector databases find in it: the same images as `memdml search`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from support.command_line import Command, answer
from support.indexes import clustered, named
from support.pages import REPOSITORY, read_blocks, run_block
from support.workshop import LAST

from lightning_memdml import MetricLearner
from lightning_memdml.deploy.predictions import read_embeddings
from lightning_memdml.retrieval import embedding_table
from lightning_memdml.retrieval.index import build_index, load_index

PAGE = REPOSITORY / "docs" / "vector_databases.md"
# Database -> what has to be installed for its program.
DATABASES = {"Qdrant": ("qdrant_client",), "LanceDB": ("lancedb",), "Milvus": ("pymilvus", "milvus_lite")}


def test_the_table_holds_the_index_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_table, "_BLOCK", 16)  # 40 rows are three blocks
    index = build_index(clustered(40, 6), named(40))
    index.save(tmp_path / "index")
    path = load_index(tmp_path / "index").to_parquet(tmp_path / "new" / "index.parquet")
    file = parquet.ParquetFile(path)
    assert file.num_row_groups == 3
    text, number = pyarrow.string(), pyarrow.int64()
    assert {field.name: field.type for field in file.schema_arrow} == {
        "path": text, "label": number, "class": text, "index": number,
        "embedding": pyarrow.list_(pyarrow.float32(), 6),
    }  # fmt: skip
    embeddings, columns = read_embeddings(path)
    np.testing.assert_array_equal(embeddings.numpy(), index.embeddings)
    assert columns["path"] == index.images.paths
    assert columns["label"] == index.images.labels
    assert columns["class"] == index.images.classes
    assert columns["index"] == list(range(40))
    assert sorted(file.name for file in path.parent.iterdir()) == ["index.parquet"]


def test_a_table_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build_index(torch.eye(3)).to_parquet(tmp_path / "index.parquet")
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise RuntimeError("stopped")

    monkeypatch.setattr(embedding_table, "row_slices", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        build_index(torch.eye(4)).to_parquet(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_command_writes_the_table(memdml: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_index(clustered(12, 6), named(12)).save(tmp_path / "index")
    memdml(f"export-index {tmp_path}/index {tmp_path}/index.parquet")
    assert capsys.readouterr().out == f"12 rows of 6 numbers in {tmp_path}/index.parquet\n"
    assert len(parquet.read_table(tmp_path / "index.parquet")) == 12
    for line, expected in (
        ("index index.csv", "Expected a file that ends in .parquet as output but got index.csv. Pass index.parquet."),
        ("nowhere a.parquet", "Expected an index in nowhere but there is no index.json. Make one with `memdml index`."),
        ("index s3://a.parquet", "Expected `output` to be a path on this machine but got 's3://a.parquet'. Copy or"),
    ):
        assert expected in answer(memdml, f"export-index {line}", capsys)


@pytest.mark.parametrize("database", DATABASES)
@pytest.mark.filterwarnings("ignore")  # those of the database
def test_a_vector_database_finds_what_the_search_finds(
    database: str, memdml: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in DATABASES[database]:
        pytest.importorskip(library, reason=f"the program for {database} needs {library}")
    (block,) = (block for block in read_blocks(PAGE.read_text()) if DATABASES[database][0] in block.code)
    memdml(f"index --ckpt_path {LAST} --source pictures --output {tmp_path}/index")
    memdml(f"export-index {tmp_path}/index {tmp_path}/index.parquet")
    learner = MetricLearner.load(LAST)
    monkeypatch.chdir(tmp_path)
    index = load_index("index")
    for number, path in enumerate(index.images.paths[::11]):
        query = learner.embed(path, progress=False)[0]
        similarity, position = (found[0].tolist() for found in index.search(query[None], k=5))
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "index.parquet").symlink_to(tmp_path / "index.parquet")
        monkeypatch.chdir(folder)
        printed = run_block(block, PAGE, {"query": query.tolist()}).splitlines()
        scores, paths = zip(*(line.split(" ", 1) for line in printed), strict=True)
        assert list(paths) == [index.images.paths[row] for row in position]
        np.testing.assert_allclose([float(score) for score in scores], similarity, atol=1e-4)
