"""Indexes on disk: saving and loading, replacement, interruption and damage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.children import run_python
from support.indexes import clustered, named

from lightning_memdml.retrieval.index import build_index, load_index
from lightning_memdml.retrieval.index_folder import staged_folder
from lightning_memdml.retrieval.index_kinds import IVF, Flat, IndexKind, make_index_kind

faiss = pytest.importorskip("faiss", reason="an index is one of faiss")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw", "pq"])
def test_a_saved_index_finds_the_same(kind: str, tmp_path: Path) -> None:
    gallery, queries = clustered(600, 8), clustered(9, 8, seed=1)
    index = build_index(gallery, named(600), make_index_kind(kind, {}), about={"checkpoint": "x"})
    index.measure(k=(1,), queries=20)
    index.save(tmp_path / "index")
    loaded = load_index(tmp_path / "index")
    assert isinstance(loaded.embeddings, np.memmap)
    for one, other in zip(index.search(queries), loaded.search(queries), strict=True):
        assert torch.equal(one, other)
    assert (loaded.images, loaded.kind, loaded.about) == (index.images, index.kind, index.about)
    assert loaded.benchmark == index.benchmark


def test_saving_replaces_an_index_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "index"
    build_index(torch.eye(4)).save(target)
    build_index(torch.eye(5)).save(target)
    assert len(load_index(target)) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="It was not overwritten"):
        build_index(torch.eye(4)).save(precious)
    assert contents(precious) == {"thesis.tex": b"years"}


def test_an_error_while_saving_leaves_the_index_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "index"
    build_index(torch.eye(4)).save(target)
    before = contents(target)

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(faiss, "write_index", killed)
    with pytest.raises(KeyboardInterrupt):
        build_index(torch.eye(5), kind=IVF(nlist=1)).save(target)
    assert contents(target) == before
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_an_index_is_found_wherever_a_replacement_is_killed(renames: int, tmp_path: Path) -> None:
    """Killed before the old index is set aside, between the two renames, and before the old one is removed."""
    target = tmp_path / "index"
    build_index(torch.eye(4)).save(target)
    killed = """
import os, shutil, sys
import torch
from lightning_memdml.retrieval import build_index
count = int(sys.argv[1])
def dying(real):
    def call(*args, **kwargs):
        global count
        if count == 0:
            os._exit(9)
        count -= 1
        return real(*args, **kwargs)
    return call
os.replace = dying(os.replace)
if count == 2:  # both renames are done
    shutil.rmtree = dying(shutil.rmtree)
    count = 3
build_index(torch.eye(6)).save("index")
"""
    run_python("-c", killed, renames, cwd=tmp_path, code=9)
    assert len(load_index(target)) == (6 if renames == 2 else 4)
    build_index(torch.eye(5)).save(target)
    assert len(load_index(target)) == 5
    assert list(tmp_path.iterdir()) == [target]


def test_two_writers_of_one_index_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "index"
    with staged_folder(target, resume=True) as staged:
        with pytest.raises(OSError, match="only process that writes"), staged_folder(target, resume=True):
            pass
        build_index(torch.eye(3)).save(target)  # a whole index of its own, in another folder
        (staged / "index.json").write_text("{}")
    assert [path.name for path in target.iterdir()] == ["index.json"]
    assert list(tmp_path.iterdir()) == [target]


def test_an_interrupted_folder_is_yielded_again(tmp_path: Path) -> None:
    def interrupted() -> None:
        with staged_folder(tmp_path / "index", resume=True) as staged:
            (staged / "rows").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not (tmp_path / "index").exists()
    with staged_folder(tmp_path / "index", resume=True) as staged:
        assert (staged / "rows").read_text() == "half"


def test_the_working_directory_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (".", "..", str(tmp_path)):
        with pytest.raises(ValueError, match="contains the working directory"):
            build_index(torch.eye(4)).save(folder)
    assert not list(tmp_path.iterdir())


FILES = ["embeddings.npy", "index.faiss", "images.parquet", "index.json"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Flat(), name) for name in FILES if name != "index.faiss"] + [(IVF(), name) for name in FILES],
    ids=str,
)
@pytest.mark.parametrize("damage", ["cut", "missing", "of another index"])
def test_damage_is_named(kind: IndexKind, name: str, damage: str, tmp_path: Path) -> None:
    build_index(clustered(40, 8), named(40), kind).save(tmp_path / "index")
    build_index(clustered(50, 8), named(50), kind).save(tmp_path / "other")
    file = tmp_path / "index" / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises((ValueError, FileNotFoundError), match=r"is damaged|Expected an index in"):
        load_index(tmp_path / "index")


def test_an_index_of_a_later_format_is_refused(tmp_path: Path) -> None:
    build_index(torch.eye(4)).save(tmp_path)
    description = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**description, "format": 99}))
    with pytest.raises(ValueError, match="expected format 2 or older but got 99"):
        load_index(tmp_path)
