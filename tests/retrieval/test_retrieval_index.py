"""Indexes against full sorting: what they find, and the recall they report."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from support.children import run_python
from support.indexes import clustered, named
from torch import Tensor

from lightning_memdml.retrieval.index import build_index, load_index
from lightning_memdml.retrieval.index_kinds import HNSW, IVF, PQ, IndexKind, index_kinds, make_index_kind

faiss = pytest.importorskip("faiss", reason="an index is one of faiss")


def full_sort(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    cosines = queries.double() / queries.double().norm(dim=1, keepdim=True)
    similarity, position = (cosines @ gallery.double().T).sort(dim=1, descending=True)
    return similarity[:, :k], position[:, :k]


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
    "kind",
    [
        IVF(nlist=16, nprobe=2),
        HNSW(M=4, efSearch=8),
        PQ(m=4),
        PQ(m=4, k_factor=5),
    ],
    ids=str,
)
def test_recall_of_an_approximate_index_is_the_share_of_exact_neighbours(kind: IndexKind) -> None:
    gallery, queries = clustered(700, 16), clustered(50, 16, seed=1)
    index = build_index(gallery, kind=kind)
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
        (IVF(nlist=16, nprobe=1), IVF(nlist=16, nprobe=16)),
        (HNSW(M=4, efSearch=4), HNSW(M=4, efSearch=400)),
        (PQ(m=2), PQ(m=2, k_factor=50)),
    ):
        recalls = [build_index(gallery, kind=kind).recall(queries) for kind in (low, high)]
        assert recalls[0] < recalls[1]
    assert build_index(gallery, kind=IVF(nlist=16, nprobe=16)).recall(queries) == 1


def test_measured_recall_leaves_each_image_itself_out() -> None:
    """With one probe most images find themselves; counted, that would lift the recall at 1 to nearly 1."""
    gallery = clustered(700, 16)
    index = build_index(gallery, kind=PQ(m=2))
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
    index = build_index(clustered(30, 8), kind=IVF(nlist=10, nprobe=1))
    similarity, position = index.search(clustered(2, 8, seed=1), k=30)
    missing = position < 0
    assert missing.any()
    assert torch.equal(missing, similarity.isinf())
    assert index.search(torch.zeros(0, 8))[1].shape[0] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_index(torch.zeros(0, 4)), "at least one row of `embeddings` to index"),
        (lambda: build_index(torch.full((3, 4), torch.nan)), "NaN or infinity in 3 of 3 rows: 0, 1, 2"),
        (
            lambda: build_index(torch.eye(4), named(3)),
            "4 paths, labels and classes, one per embedding, but got 3, 3, 3",
        ),
        (lambda: build_index(torch.eye(4)).search(torch.zeros(2, 5)), "dimension 4, as in the index, but got 5"),
        (lambda: build_index(torch.eye(4), kind=PQ()), "at least 256 images"),
        (lambda: build_index(clustered(300, 9), kind=PQ(m=2)), "divide the dimension 9"),
        (lambda: build_index(torch.eye(4), kind=IVF(nlist=5)), "`nlist` of at most 4, the number of images, but got 5"),
        (lambda: make_index_kind("tree", {}), r"one of flat, ivf, hnsw, pq.* but got 'tree'"),
        (
            lambda: make_index_kind("hnsw", {"nprobe": 4}),
            "M, efSearch, efConstruction, k_factor with `kind=hnsw` but got `nprobe`, an option of ivf",
        ),
        (lambda: make_index_kind("ivf", {"probes": 4}), "`probes`, which is called `nprobe` now, as in faiss"),
        (lambda: HNSW(M=1), "`M` of at least 2 but got 1"),
        (lambda: IVF(nprobe=0), "`nprobe` of at least 1 but got 0"),
    ],
)
def test_what_cannot_be_is_explained(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="this is faiss-gpu: nothing is missing")
def test_without_a_gpu_faiss_says_how_to_get_one() -> None:
    with pytest.raises(ValueError, match=r"lightning-memdml\[gpu\]"):
        build_index(torch.eye(4), kind=IVF(nlist=1), device="cuda")


@pytest.mark.skipif(
    not torch.cuda.is_available() or not hasattr(faiss, "StandardGpuResources"),
    reason="needs a GPU, and faiss-gpu in place of faiss-cpu",
)
@pytest.mark.parametrize("kind", ["ivf", "pq"])
def test_an_index_built_on_a_gpu_finds_what_one_of_the_cpu_finds(kind: str) -> None:
    gallery, queries = clustered(2000, 16), clustered(20, 16, seed=1)
    made = make_index_kind(kind, {"nprobe": 10**6} if kind == "ivf" else {})
    index = build_index(gallery, kind=made, device="cuda")
    assert index.recall(queries) >= build_index(gallery, kind=made).recall(queries) - 0.05


# Kinds


@dataclass(frozen=True)
class ScalarQuantizer(IndexKind):
    """A kind of a user's own, with an option of its own."""

    bits: int = 8

    def factory(self, rows: int, dim: int) -> str:
        return f"SQ{self.bits}"


def test_a_kind_of_ones_own_is_found_built_saved_and_loaded(tmp_path: Path) -> None:
    assert index_kinds()["scalarquantizer"] is ScalarQuantizer
    kind = make_index_kind("scalarquantizer", {"bits": 4})
    gallery, queries = clustered(700, 16), clustered(50, 16, seed=1)
    index = build_index(gallery, kind=kind)
    assert 0.5 < index.recall(queries) < 1
    loaded = load_index(index.save(tmp_path / "index"))
    assert loaded.kind == ScalarQuantizer(bits=4)
    assert torch.equal(loaded.search(queries)[1], index.search(queries)[1])


@pytest.mark.parametrize("kind", [kind for name, kind in index_kinds().items() if name != "scalarquantizer"])
def test_every_kind_documents_its_options_and_refuses_zero(kind: type[IndexKind]) -> None:
    for option in fields(kind):
        assert f"        {option.name}: " in str(kind.__doc__).replace("\n    ", "\n        ")
        with pytest.raises(ValueError, match=f"`{option.name}` of at least 1 but got 0"):
            kind(**{option.name: 0})


WITHOUT_FAISS = """
import sys
sys.modules["faiss"] = None  # importing it fails, as if it were not installed
import torch
from lightning_memdml.retrieval import IVF, build_index, load_index
build_index(torch.eye(4)).save("index")
print(load_index("index").search(torch.eye(4)[2:], k=1)[1].tolist())
try:
    build_index(torch.eye(4), kind=IVF(nlist=1))
except ImportError as error:
    print(error)
"""


def test_a_flat_index_needs_no_faiss_and_others_name_the_extra(tmp_path: Path) -> None:
    done = run_python("-c", WITHOUT_FAISS, cwd=tmp_path)
    found, message = done.stdout.splitlines()
    assert found == "[[2], [3]]"
    assert message == (
        'Expected faiss but it is not installed. `pip install "lightning-memdml[faiss]"`, or '
        '`pip install "lightning-memdml[gpu]"` on a machine with a GPU. An index with `kind=flat` needs neither.'
    )
    assert not (tmp_path / "index" / "index.faiss").exists()


@pytest.mark.parametrize("norm", [1e-30, 1e30])
def test_rows_of_any_norm_are_compared_by_direction(norm: float) -> None:
    similarity, position = build_index(norm * torch.eye(4)).search(norm * torch.eye(4), k=1)
    torch.testing.assert_close(similarity, torch.ones(4, 1))
    assert position[:, 0].tolist() == [0, 1, 2, 3]


# faiss and torch bring an OpenMP each

TOGETHER = """
import sys
import torch
if sys.argv[1] == "faiss":
    import faiss
from torch.utils.data import DataLoader, TensorDataset
from lightning_memdml.retrieval.index import build_index
from lightning_memdml.retrieval.index_kinds import make_index_kind
torch.set_num_threads(2)
rows = torch.randn(3000, 32)
for kind in ("flat", "ivf", "hnsw"):
    index = build_index(rows, kind=make_index_kind(kind, {}))
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
    done = run_python("-c", TOGETHER, first, env={"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"})
    assert "done" in done.stdout
