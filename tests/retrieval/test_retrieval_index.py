"""Indexes against full sorting: what they find, what they say they find, and what lies on disk afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_memdml.retrieval.index import IndexedImages, IndexOptions, build_index, load_index

faiss = pytest.importorskip("faiss", reason="an index is one of faiss")


def clustered(count: int, dim: int, seed: int = 0, classes: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=generator)
    rows = centres[torch.arange(count) % classes] + 0.7 * torch.randn(count, dim, generator=generator)
    return rows / rows.norm(dim=1, keepdim=True)


def named(count: int) -> IndexedImages:
    return IndexedImages(
        [f"{row}.jpg" for row in range(count)],
        [row % 40 for row in range(count)],
        [f"class {row % 40}" for row in range(count)],
    )


def full_sort(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    cosines = queries.double() / queries.double().norm(dim=1, keepdim=True)
    similarity, position = (cosines @ gallery.double().T).sort(dim=1, descending=True)
    return similarity[:, :k], position[:, :k]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# What is found


def test_flat_finds_what_a_full_sort_finds_at_any_norm() -> None:
    gallery, queries = clustered(300, 12), 3 * clustered(20, 12, seed=1)
    index = build_index(5 * gallery)
    for search in (index.search, index.search_exactly):
        similarity, position = search(queries, k=7)
        expected_similarity, expected = full_sort(queries, gallery, 7)
        torch.testing.assert_close(similarity.double(), expected_similarity, atol=1e-6, rtol=0)
        assert torch.equal(position, expected)
    assert index.recall(queries, k=7) == 1


@pytest.mark.parametrize(
    "options",
    [
        IndexOptions("ivf", lists=16, probes=2),
        IndexOptions("hnsw", links=4, beam=8),
        IndexOptions("pq", code_bytes=4),
        IndexOptions("pq", code_bytes=4, candidates=5),
    ],
    ids=str,
)
def test_recall_of_an_approximate_index_is_the_share_of_exact_neighbours(options: IndexOptions) -> None:
    gallery, queries = clustered(700, 16), clustered(50, 16, seed=1)
    index = build_index(gallery, options=options)
    similarity, position = index.search(queries, k=10)
    _, expected = full_sort(queries, gallery, 10)
    pairs = zip(position.tolist(), expected.tolist(), strict=True)
    share = sum(len(set(found) & set(right)) for found, right in pairs) / expected.numel()
    assert 0.05 < share < 1  # an index that misses something, or there is nothing to measure
    assert index.recall(queries, k=10) == pytest.approx(share, abs=1e-9)
    found = position >= 0
    exact = (queries.double() @ gallery.double().T).gather(1, position.clamp_min(0))
    torch.testing.assert_close(similarity.double()[found], exact[found], atol=1e-6, rtol=0)


def test_more_effort_finds_more() -> None:
    gallery, queries = clustered(700, 16), clustered(50, 16, seed=1)
    for low, high in (
        (IndexOptions("ivf", lists=16, probes=1), IndexOptions("ivf", lists=16, probes=16)),
        (IndexOptions("hnsw", links=4, beam=4), IndexOptions("hnsw", links=4, beam=400)),
        (IndexOptions("pq", code_bytes=2), IndexOptions("pq", code_bytes=2, candidates=50)),
    ):
        recalls = [build_index(gallery, options=options).recall(queries) for options in (low, high)]
        assert recalls[0] < recalls[1]
    assert build_index(gallery, options=IndexOptions("ivf", lists=16, probes=16)).recall(queries) == 1


def test_measured_recall_leaves_each_image_itself_out() -> None:
    """With one probe most images find themselves; counted, that would lift the recall at 1 to nearly 1."""
    gallery = clustered(700, 16)
    index = build_index(gallery, options=IndexOptions("pq", code_bytes=2))
    measured = index.measure(k=(1, 5), queries=700)
    similarity = (gallery.double() @ gallery.double().T).fill_diagonal_(-torch.inf)
    best = similarity.argsort(dim=1, descending=True)
    _, position = index.search(gallery, k=6)
    others = [[row for row in found if row != own] for own, found in enumerate(position.tolist())]
    for level in (1, 5):
        pairs = zip(others, best.tolist(), strict=True)
        expected = np.mean([len(set(found[:level]) & set(right[:level])) / level for found, right in pairs])
        assert measured.recall[level] == pytest.approx(expected, abs=1e-9)
    assert measured.recall[1] < 0.9
    assert measured.milliseconds > 0
    assert f"@1 {measured.recall[1]:.4f}" in str(measured)


def test_exact_indexes_measure_one_even_where_everything_is_equal() -> None:
    assert build_index(clustered(200, 8)).measure().recall == {1: 1.0, 10: 1.0, 100: 1.0}
    assert build_index(torch.ones(50, 4)).measure().recall == {1: 1.0, 10: 1.0}
    assert build_index(torch.ones(1, 4)).measure().recall == {}


def test_small_sets_and_many_neighbours_are_defined() -> None:
    similarity, position = build_index(torch.eye(3)).search(torch.eye(3)[:1], k=10)
    assert position.shape == (1, 3)
    assert position[0, 0] == 0
    index = build_index(clustered(30, 8), options=IndexOptions("ivf", lists=10, probes=1))
    similarity, position = index.search(clustered(2, 8, seed=1), k=30)
    missing = position < 0
    assert missing.any()
    assert torch.equal(missing, similarity.isinf())
    assert index.search(torch.zeros(0, 8))[1].shape[0] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_index(torch.zeros(0, 4)), "nothing to index"),
        (lambda: build_index(torch.full((3, 4), torch.nan)), "NaN or infinity in 3 of 3 rows: 0, 1, 2"),
        (lambda: build_index(torch.eye(4), named(3)), r"Expected 4 paths, labels and classes, got \[3, 3, 3\]"),
        (lambda: build_index(torch.eye(4)).search(torch.zeros(2, 5)), "dimension 4, as in the index, got 5"),
        (lambda: build_index(torch.eye(4), options=IndexOptions("pq")), "at least 256 images"),
        (lambda: build_index(clustered(300, 9), options=IndexOptions("pq", code_bytes=2)), "divide the dimension 9"),
        (lambda: build_index(torch.eye(4), options=IndexOptions("ivf", lists=5)), "at most 4 `lists`"),
        (lambda: IndexOptions("tree"), "one of flat, ivf, hnsw, pq but got 'tree'"),  # type: ignore[arg-type]
        (lambda: IndexOptions("ivf", probes=0), "`probes` of at least 1 but got 0"),
    ],
)
def test_what_cannot_be_is_explained(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="this is faiss-gpu: nothing is missing")
def test_without_a_gpu_faiss_says_how_to_get_one() -> None:
    with pytest.raises(ValueError, match=r"lightning-memdml\[gpu\]"):
        build_index(torch.eye(4), device="cuda")


@pytest.mark.skipif(
    not torch.cuda.is_available() or not hasattr(faiss, "StandardGpuResources"),
    reason="needs a GPU, and faiss-gpu in place of faiss-cpu",
)
@pytest.mark.parametrize("kind", ["flat", "ivf", "pq"])
def test_an_index_built_on_a_gpu_finds_what_one_of_the_cpu_finds(kind: str) -> None:
    gallery, queries = clustered(2000, 16), clustered(20, 16, seed=1)
    options = IndexOptions(kind, probes=10**6 if kind == "ivf" else None)  # type: ignore[arg-type]
    index = build_index(gallery, options=options, device="cuda")
    assert index.recall(queries) >= build_index(gallery, options=options).recall(queries) - 0.05


# On disk


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw", "pq"])
def test_a_saved_index_finds_the_same(kind: str, tmp_path: Path) -> None:
    gallery, queries = clustered(600, 8), clustered(9, 8, seed=1)
    index = build_index(gallery, named(600), IndexOptions(kind), about={"checkpoint": "x"})  # type: ignore[arg-type]
    index.measure(k=(1,), queries=20)
    index.save(tmp_path / "index")
    loaded = load_index(tmp_path / "index")
    assert isinstance(loaded.embeddings, np.memmap)
    for one, other in zip(index.search(queries), loaded.search(queries), strict=True):
        assert torch.equal(one, other)
    assert (loaded.images, loaded.options, loaded.about) == (index.images, index.options, index.about)
    assert loaded.measured == index.measured


def test_saving_replaces_an_index_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "index"
    build_index(torch.eye(4)).save(target)
    build_index(torch.eye(5)).save(target)
    assert len(load_index(target)) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="it is left alone"):
        build_index(torch.eye(4)).save(precious)
    assert contents(precious) == {"thesis.tex": b"years"}


def test_a_killed_save_leaves_the_index_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "index"
    build_index(torch.eye(4)).save(target)
    before = contents(target)

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(faiss, "write_index", killed)
    with pytest.raises(KeyboardInterrupt):
        build_index(torch.eye(5)).save(target)
    assert contents(target) == before


@pytest.mark.parametrize("name", ["embeddings.npy", "index.faiss", "images.parquet", "index.json"])
@pytest.mark.parametrize("damage", ["cut", "missing", "of another index"])
def test_damage_is_told(name: str, damage: str, tmp_path: Path) -> None:
    build_index(clustered(40, 8), named(40)).save(tmp_path / "index")
    build_index(clustered(50, 8), named(50)).save(tmp_path / "other")
    file = tmp_path / "index" / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises((ValueError, FileNotFoundError), match=r"is damaged|no index in|`memdml index`"):
        load_index(tmp_path / "index")


def test_an_index_of_a_later_format_is_refused(tmp_path: Path) -> None:
    build_index(torch.eye(4)).save(tmp_path)
    description = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**description, "format": 99}))
    with pytest.raises(ValueError, match="format 99, expected 1"):
        load_index(tmp_path)


# faiss and torch bring an OpenMP each

TOGETHER = """
import sys
import torch
if sys.argv[1] == "faiss":
    import faiss
from torch.utils.data import DataLoader, TensorDataset
from lightning_memdml.retrieval.index import IndexOptions, build_index
torch.set_num_threads(2)
rows = torch.randn(3000, 32)
for kind in ("flat", "ivf", "hnsw"):
    index = build_index(rows, options=IndexOptions(kind))
    for _ in range(5):
        rows @ rows.T
        index.search(rows[:200])
        index.search_exactly(rows[:200])
    # Workers are forked after both have started their threads.
    for (batch,) in DataLoader(TensorDataset(rows[:64]), batch_size=16, num_workers=2):
        index.search(batch)
assert isinstance(index.measure(queries=50).recall[10], float)
print("done")
"""


@pytest.mark.parametrize("first", ["faiss", "torch"])
def test_faiss_and_torch_share_a_process_with_threads_and_forked_workers(first: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TOGETHER, first], capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done" in done.stdout
