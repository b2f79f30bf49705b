"""A faiss index of embeddings with the name of each image: built, measured against exact search, saved, searched."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from lightning_memdml.retrieval.checks import check_embeddings, check_finite, check_recall_levels
from lightning_memdml.retrieval.tiles import full_precision_products, split_rows

Kind = Literal["flat", "ivf", "hnsw", "pq"]
FORMAT = 1  # of the folder; raised when it changes
EMBEDDINGS, FAISS, IMAGES, DESCRIPTION = "embeddings.npy", "index.faiss", "images.parquet", "index.json"

_ADDED = 8192  # rows added at a time: what the progress bar counts
_POINTS_PER_LIST = 39  # below which faiss warns that k-means has too little to train on
_CODES = 256  # centroids of each part of a product-quantised embedding
_SAME = 1e-6  # similarities closer than this are one, whichever of the images is found


@dataclass(frozen=True)
class IndexOptions:
    """How a faiss index is built and searched; what a kind does not use has no effect.

    Args:
        kind: `"flat"` compares with every image and misses nothing. `"ivf"` looks into the nearest of many clusters
            only, `"hnsw"` follows a graph of neighbours: both are faster on 100,000 images and more. `"pq"` keeps a few
            bytes per image instead of `4 * D`.
        lists: Clusters of `ivf`; by default `4 sqrt(N)`, as long as there are 39 images for each.
        probes: Clusters that a search of `ivf` looks into; by default a sixteenth of them, at least 8.
        links: Neighbours of each image in the graph of `hnsw`, at least 2.
        beam: Candidates that a search of `hnsw` keeps; more finds more, and takes longer.
        code_bytes: Bytes per image of `pq`, a divisor of D; by default the largest up to `D / 4`.
        candidates: Images fetched for each neighbour asked for, and compared exactly: finds more in every kind but
            `flat`.

    Raises:
        ValueError: If an option is out of range.
    """

    kind: Kind = "flat"
    lists: int | None = None
    probes: int | None = None
    links: int = 32
    beam: int = 64
    code_bytes: int | None = None
    candidates: int = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"Expected `kind` to be one of {', '.join(get_args(Kind))} but got {self.kind!r}.")
        for name in ("lists", "probes", "code_bytes", "beam", "candidates"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Expected `{name}` of at least 1 but got {value}.")
        if self.links < 2:
            raise ValueError(f"Expected `links` of at least 2 but got {self.links}.")


class IndexedImages(NamedTuple):
    """What each row of an index is."""

    paths: list[str]
    labels: list[int]
    classes: list[str]  # the name of each image's class


@dataclass(frozen=True)
class Measured:
    """What an index was found to do.

    Attributes:
        queries: How many of its own images were searched.
        recall: K -> share of the exact K nearest images that it finds, an image itself left out.
        milliseconds: Time of a search for one image alone.
        exact_milliseconds: The same of comparing with every image.
        threads: Threads of both.
    """

    queries: int
    recall: dict[int, float]
    milliseconds: float
    exact_milliseconds: float
    threads: int

    def __str__(self) -> str:
        levels = ", ".join(f"@{k} {recall:.4f}" for k, recall in self.recall.items())
        return (
            f"recall against exact search of {self.queries} images: {levels}; {self.milliseconds:.2f} ms per search "
            f"(exact: {self.exact_milliseconds:.2f} ms), threads: {self.threads}"
        )


@dataclass
class EmbeddingIndex:
    """Unit embeddings, the faiss index over them, and what each row is; made by `build_index` or `load_index`.

    Attributes:
        embeddings: `(N, D)` float32, unit rows; a file on disk that is read where needed, if it was loaded.
        faiss_index: The index of faiss.
        images: Path, label and class of each row.
        options: How it was built.
        about: What else is kept with it, such as the checkpoint; JSON.
        measured: What `measure` found, or None.
    """

    embeddings: np.ndarray
    faiss_index: Any
    images: IndexedImages
    options: IndexOptions
    about: dict[str, Any] = field(default_factory=dict)
    measured: Measured | None = None

    def __len__(self) -> int:
        return len(self.embeddings)

    def search(self, queries: Tensor, k: int = 10) -> tuple[Tensor, Tensor]:
        """Find the nearest images.

        Args:
            queries: `(Q, D)`, any norm.
            k: Number of neighbours.

        Returns:
            Cosine similarities, descending, and positions in the index, both `(Q, min(k, N))`. The similarities are
            exact in every kind; where an approximate kind finds fewer, they are -inf and the position -1.

        Raises:
            TypeError: If `queries` is no floating tensor.
            ValueError: If it is of another dimension or not finite, or `k` is below 1.
        """
        (k,) = check_recall_levels((k,))
        unit = self._unit(queries)
        fetched = min(len(self), k * self.options.candidates)
        _, found = self.faiss_index.search(unit.numpy(), fetched)
        position = torch.from_numpy(found)
        rows = torch.from_numpy(self.embeddings[found.clip(min=0)])  # (Q, fetched, D)
        similarity = torch.einsum("qd,qkd->qk", unit, rows).masked_fill_(position < 0, -torch.inf)
        similarity, order = similarity.sort(dim=1, descending=True, stable=True)
        return similarity[:, :k], position.gather(1, order)[:, :k]

    def search_exactly(self, queries: Tensor, k: int = 10) -> tuple[Tensor, Tensor]:
        """Find the nearest images by comparing with all of them, as `search` without any index."""
        (k,) = check_recall_levels((k,))
        unit = self._unit(queries)
        best, position = unit.new_empty(len(unit), 0), torch.empty(len(unit), 0, dtype=torch.long)
        with full_precision_products(unit.device):
            for part in split_rows(len(self), _ADDED):
                value, place = (unit @ torch.from_numpy(self.embeddings[part]).T).topk(min(k, part.stop - part.start))
                best, chosen = torch.cat([best, value], dim=1).topk(min(k, best.shape[1] + value.shape[1]))
                position = torch.cat([position, place + part.start], dim=1).gather(1, chosen)
        return best, position

    def recall(self, queries: Tensor, k: int = 10) -> float:
        """Return the share of the exact `k` nearest images of the queries that `search` finds.

        One as similar as the last of the exact ones counts as found, whichever of equals comes first.
        """
        exact, _ = self.search_exactly(queries, k)
        return _share_found(self.search(queries, k)[0], exact)

    def measure(self, k: Sequence[int] = (1, 10, 100), queries: int = 1000, seed: int = 0) -> Measured:
        """Measure recall against exact search, and latency, with images of the index as queries; kept as `measured`.

        Args:
            k: Numbers of neighbours; those beyond the index are left out.
            queries: How many images are drawn.
            seed: Of the draw.
        """
        k = tuple(level for level in check_recall_levels(k) if level < len(self))
        drawn = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:queries].sort().values
        recalls = {}
        if k and len(drawn):
            images = torch.from_numpy(self.embeddings[drawn.numpy()])
            exact, found = (
                _without_self(*search(images, max(k) + 1), drawn) for search in (self.search_exactly, self.search)
            )
            recalls = {level: _share_found(found[:, :level], exact[:, :level]) for level in k}
        depth = max(k, default=1)
        latency, exact_latency = (
            _median_milliseconds(search, self.embeddings, depth, seed) for search in (self.search, self.search_exactly)
        )
        self.measured = Measured(len(drawn), recalls, latency, exact_latency, torch.get_num_threads())
        return self.measured

    def write(self, folder: Path) -> None:
        """Write everything but the embeddings that lie there already; the description comes last."""
        import pyarrow
        from pyarrow import parquet

        if not (folder / EMBEDDINGS).exists():
            np.save(folder / EMBEDDINGS, self.embeddings)
        _faiss().write_index(self.faiss_index, str(folder / FAISS))
        columns = {"path": self.images.paths, "label": self.images.labels, "class": self.images.classes}
        parquet.write_table(pyarrow.table(columns), folder / IMAGES)
        description = {
            "format": FORMAT,
            "images": len(self),
            "dim": self.embeddings.shape[1],
            "options": asdict(self.options),
            "measured": None if self.measured is None else asdict(self.measured),
            "about": self.about,
        }
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")

    def save(self, folder: str | Path) -> Path:
        """Write the index to a folder of its own, all at once: a run that is killed leaves what was there before."""
        folder = Path(folder)
        made = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        self.write(made)
        replace_folder(made, folder)
        return folder

    def _unit(self, queries: Tensor) -> Tensor:
        check_embeddings(queries, "queries")
        check_finite(queries, "queries")
        if queries.shape[1] != self.embeddings.shape[1]:
            raise ValueError(
                f"Expected `queries` of dimension {self.embeddings.shape[1]}, as in the index, got {queries.shape[1]}."
            )
        return F.normalize(queries.detach().float().cpu(), dim=1)


def build_index(
    embeddings: Tensor | np.ndarray,
    images: IndexedImages | None = None,
    options: IndexOptions | None = None,
    *,
    about: dict[str, Any] | None = None,
    device: str = "cpu",
    progress: bool = False,
) -> EmbeddingIndex:
    """Build an index of embeddings for cosine similarity.

    Args:
        embeddings: `(N, D)`, finite, any norm. An array on disk (`numpy.memmap`) is normalised where it lies.
        images: What each row is; by default rows are named by their number.
        options: Kind of index; by default flat.
        about: What else is kept with the index; JSON.
        device: `"cpu"`, or `"cuda"` to train and fill it on all GPUs, with the extra `gpu`.
        progress: Show a progress bar.

    Raises:
        ImportError: If faiss is not installed.
        TypeError: If `embeddings` are not floating.
        ValueError: If there is no row, rows are not finite, shapes disagree, or the kind needs more rows or another D.

    Example:
        >>> index = build_index(torch.eye(4))
        >>> similarity, position = index.search(torch.tensor([[0.0, 2.0, 0.1, 0.0]]), k=2)
        >>> position.tolist()
        [[1, 2]]
    """
    rows = torch.as_tensor(embeddings)
    check_embeddings(rows, "embeddings")
    check_finite(rows, "embeddings")
    if not len(rows):
        raise ValueError("There is nothing to index: `embeddings` has no row.")
    if images is None:
        images = IndexedImages([str(row) for row in range(len(rows))], [0] * len(rows), [""] * len(rows))
    if any(len(column) != len(rows) for column in images):
        raise ValueError(f"Expected {len(rows)} paths, labels and classes, got {[len(column) for column in images]}.")
    options = options or IndexOptions()
    copied = None if isinstance(embeddings, np.memmap) else rows.detach().cpu().float().numpy().copy()
    unit = normalise_in_place(np.asanyarray(embeddings) if copied is None else copied)
    faiss_index = _filled(unit, options, device, progress)
    return EmbeddingIndex(unit, faiss_index, images, options, about or {})


def normalise_in_place(embeddings: np.ndarray) -> np.ndarray:
    """Divide the rows by their norm where they lie; those that are unit already, to rounding, are not touched."""
    for part in split_rows(len(embeddings), _ADDED):
        rows = torch.from_numpy(np.asarray(embeddings[part])).float()
        if not torch.allclose(rows.norm(dim=1), torch.ones(()), atol=1e-6):
            embeddings[part] = F.normalize(rows, dim=1).numpy()
    return embeddings


def load_index(folder: str | Path) -> EmbeddingIndex:
    """Read an index that `EmbeddingIndex.save` or `memdml index` wrote; the embeddings stay on disk.

    Raises:
        ImportError: If faiss is not installed.
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, or of another version.
    """
    from pyarrow import parquet

    folder = Path(folder)
    if not (folder / DESCRIPTION).is_file():
        raise FileNotFoundError(f"There is no index in {folder}: it has no {DESCRIPTION}. `memdml index` makes one.")
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        embeddings = np.load(folder / EMBEDDINGS, mmap_mode="c", allow_pickle=False)
        columns = parquet.read_table(folder / IMAGES, columns=["path", "label", "class"]).to_pydict()
        faiss_index = _faiss().read_index(str(folder / FAISS))
        options = IndexOptions(**description["options"])
        measured = description["measured"]
        if measured is not None:
            measured = Measured(**{**measured, "recall": {int(k): v for k, v in measured["recall"].items()}})
        rows, dim, version = description["images"], description["dim"], description["format"]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"The index in {folder} is damaged ({error}). Make it again with `memdml index`.") from error
    if version != FORMAT:
        raise ValueError(f"The index in {folder} is of format {version}, expected {FORMAT}; make it again.")
    shapes = {
        EMBEDDINGS: (*embeddings.shape, embeddings.dtype.name),
        FAISS: (faiss_index.ntotal, faiss_index.d, "float32"),
        IMAGES: (len(columns["path"]), dim, "float32"),
    }
    for name, shape in shapes.items():
        if shape != (rows, dim, "float32"):
            raise ValueError(
                f"The index in {folder} is damaged: expected {rows} rows of {dim} in {name}, got {shape}. Make it "
                "again with `memdml index`."
            )
    images = IndexedImages(columns["path"], columns["label"], columns["class"])
    return EmbeddingIndex(embeddings, faiss_index, images, options, description["about"], measured)


def require_replaceable(target: Path) -> None:
    """Check that nothing but an index would be replaced.

    Raises:
        ValueError: If `target` holds something else.
    """
    if target.exists() and not (target / DESCRIPTION).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"Expected {target} to be an index or not to exist; it is neither, so it is left alone.")


def replace_folder(made: Path, target: Path) -> None:
    """Put a finished folder in the place of an index, which stays whole until the new one is there."""
    require_replaceable(target)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(made, target)
    shutil.rmtree(old, ignore_errors=True)


def _filled(unit: np.ndarray, options: IndexOptions, device: str, progress: bool) -> Any:
    """A faiss index of these rows, on the CPU."""
    faiss = _faiss()
    index = faiss.index_factory(unit.shape[1], _recipe(len(unit), unit.shape[1], options), faiss.METRIC_INNER_PRODUCT)
    if options.kind in ("ivf", "pq"):  # one warning per byte of a code is too many; the recall is measured instead
        (index.pq if options.kind == "pq" else index).cp.min_points_per_centroid = 1
    if device != "cpu":
        index = _on_gpu(faiss, index, options)
    if not index.is_trained:
        index.train(np.ascontiguousarray(unit[_training_rows(len(unit), options)]))
    parts = list(split_rows(len(unit), _ADDED))
    with tqdm(total=len(unit), desc=f"{options.kind} index", unit="image", disable=not progress, delay=1) as bar:
        for part in parts:
            index.add(np.ascontiguousarray(unit[part]))
            bar.update(part.stop - part.start)
    if device != "cpu":
        index = faiss.index_gpu_to_cpu(index)
    if options.kind == "ivf":
        index.nprobe = min(index.nlist, options.probes or max(8, index.nlist // 16))
    if options.kind == "hnsw":
        index.hnsw.efSearch = options.beam
    return index


def _recipe(rows: int, dim: int, options: IndexOptions) -> str:
    """What faiss calls the index."""
    if options.kind == "flat":
        return "Flat"
    if options.kind == "hnsw":
        return f"HNSW{options.links},Flat"
    if options.kind == "ivf":
        return f"IVF{_lists(rows, options)},Flat"
    if rows < _CODES:
        raise ValueError(f"Expected at least {_CODES} images for `kind=pq`, which learns from them, got {rows}.")
    code_bytes = options.code_bytes or max(size for size in range(1, max(1, dim // 4) + 1) if dim % size == 0)
    if dim % code_bytes:
        raise ValueError(f"Expected `code_bytes` to divide the dimension {dim}, got {code_bytes}.")
    # Without its polysemous training ("np"), which takes seconds per byte and serves a filter that is not used here.
    return f"PQ{code_bytes}x8np"


def _lists(rows: int, options: IndexOptions) -> int:
    lists = options.lists or max(1, min(round(4 * rows**0.5), rows // _POINTS_PER_LIST))
    if lists > rows:
        raise ValueError(f"Expected at most {rows} `lists`, one per image, got {lists}.")
    return lists


def _training_rows(rows: int, options: IndexOptions) -> slice | np.ndarray:
    """What k-means learns from: all, or a draw of as many as faiss would use itself, which need not lie in memory."""
    used = 256 * (_CODES if options.kind == "pq" else _lists(rows, options))
    return slice(None) if rows <= used else np.sort(np.random.default_rng(0).choice(rows, used, replace=False))


def _on_gpu(faiss: Any, index: Any, options: IndexOptions) -> Any:
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        raise ValueError(
            "Expected faiss with a GPU for `device=cuda`, but the one installed has none; "
            "`pip install 'lightning-memdml[gpu]'` in an environment without faiss-cpu, or leave `device` out."
        )
    if options.kind == "hnsw":
        raise ValueError("faiss builds `kind=hnsw` on the CPU only; leave `device` out, or take flat, ivf or pq.")
    return faiss.index_cpu_to_all_gpus(index)


def _without_self(similarity: Tensor, position: Tensor, own: Tensor) -> Tensor:
    """The similarities without that of the image itself, or without the last where it was not found."""
    is_self = position == own[:, None]
    is_self[~is_self.any(1), -1] = True
    return similarity[~is_self].view(len(similarity), -1)


def _share_found(found: Tensor, exact: Tensor) -> float:
    """Share of found similarities that reach the last exact one of their row."""
    return float((found >= exact[:, -1:] - _SAME).double().mean())


def _median_milliseconds(search: Any, embeddings: np.ndarray, k: int, seed: int, repeats: int = 11) -> float:
    """Of a search for one image alone; the median, since a first search is slower."""
    times = []
    for row in np.random.default_rng(seed).integers(len(embeddings), size=repeats):
        query = torch.from_numpy(embeddings[[row]])
        start = time.perf_counter()
        search(query, k)
        times.append(1000 * (time.perf_counter() - start))
    return float(np.median(times))


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("An index needs faiss, and it is missing: pip install faiss-cpu.") from error
    return faiss
