"""An index of embeddings, with the path and class of each image."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lightning_memdml.retrieval.embedding_table import write_embedding_table
from lightning_memdml.retrieval.faiss_index import WITHOUT_FAISS, build_faiss_index, import_faiss
from lightning_memdml.retrieval.index_benchmark import (
    IndexBenchmark,
    median_milliseconds,
    share_found,
    without_self,
)
from lightning_memdml.retrieval.index_folder import DESCRIPTION, existing_folder, staged_folder, write_header
from lightning_memdml.retrieval.index_kinds import Flat, IndexKind, kind_from_description
from lightning_memdml.retrieval.reranking import rerank
from lightning_memdml.retrieval.retrieval_sets import check_finite_embeddings, check_recall_levels
from lightning_memdml.retrieval.tiles import full_precision_products, row_slices, unit_float32
from lightning_memdml.whitening import Whitening

FORMATS = (1, 2)  # of the folder; the last is written
EMBEDDINGS, FAISS, IMAGES, WHITENING = "embeddings.npy", "index.faiss", "images.parquet", "whitening.npy"

CANDIDATES = 200  # images that a search re-ranks
_BLOCK = 8192  # rows handled at a time


class IndexedImages(NamedTuple):
    """What each row of an index is.

    Attributes:
        paths: Path of each image.
        labels: Label of each image.
        classes: Name of each image's class.
    """

    paths: list[str]
    labels: list[int]
    classes: list[str]


@dataclass
class EmbeddingIndex:
    """Unit embeddings, an index over them, and what each row is; made by `build_index` or `load_index`.

    Attributes:
        embeddings: `(N, D)` float32, unit rows; of a loaded index a file on disk, of which the needed rows are read.
        images: Path, label and class of each row.
        kind: How it was built.
        faiss_index: The index of faiss; None for `kind=flat`.
        about: What is kept with it, such as the checkpoint; must be JSON.
        benchmark: The result of `measure`, or None.
        whitening: How the embeddings were whitened, and queries will be; None if they were not.
    """

    embeddings: np.ndarray
    images: IndexedImages
    kind: IndexKind
    faiss_index: Any = None
    about: dict[str, Any] = field(default_factory=dict)
    benchmark: IndexBenchmark | None = None
    whitening: Whitening | None = None

    def __len__(self) -> int:
        return len(self.embeddings)

    def search(self, queries: Tensor, k: int = 10) -> tuple[Tensor, Tensor]:
        """Find the nearest images.

        Args:
            queries: `(Q, D)`, any norm, as the network gives them: they are whitened here if the index is.
            k: Number of neighbours.

        Returns:
            Cosine similarities, descending, and positions in the index, both `(Q, min(k, N))`. The similarities are
            exact for every kind. Where an approximate kind finds fewer neighbours, they are -inf and the position -1.

        Raises:
            TypeError: If `queries` is not a floating-point tensor.
            ValueError: If it has another dimension or is not finite, or `k` is below 1.
        """
        return self._find(self._unit(queries), *check_recall_levels((k,)))

    def search_exactly(self, queries: Tensor, k: int = 10) -> tuple[Tensor, Tensor]:
        """Find the nearest images by comparing with all of them, with the arguments of `search`."""
        return self._find_exactly(self._unit(queries), *check_recall_levels((k,)))

    def search_reranked(
        self,
        queries: Tensor,
        k: int = 10,
        candidates: int = CANDIDATES,
        *,
        k1: int = 20,
        k2: int = 6,
        lambda_value: float = 0.3,
    ) -> tuple[Tensor, Tensor]:
        """Find candidates, and order them by their k-reciprocal neighbours, see `rerank`.

        Neighbours are searched among a query and its own candidates, without other queries. With as many candidates
        as images, this is the order of `rerank` for a single query. The cost grows with the square of `candidates`:
        200 take about 10 ms of one core for each query and 1,000 about 0.1 s, whatever the size of the index.

        Args:
            queries: As for `search`.
            k: Number of neighbours.
            candidates: Number of images that are ordered, at least `k`, those of `search`.
            k1: See `rerank`.
            k2: See `rerank`.
            lambda_value: See `rerank`.

        Returns:
            As `search`, in the order of the re-ranked distances: the cosine similarities are not descending.

        Raises:
            TypeError: As `search`.
            ValueError: As `search` and `rerank`; or if there are fewer candidates than neighbours.

        Example:
            >>> index = build_index(torch.eye(4))
            >>> index.search_reranked(torch.tensor([[2.0, 0.5, 0.1, 0.0]]), k=2, candidates=3)[1].tolist()
            [[0, 1]]
        """
        if candidates < k:
            raise ValueError(
                f"Expected at least as many candidates as neighbours, {k}, but got {candidates}. Pass more candidates."
            )
        unit = self._unit(queries)
        similarity, position = self._find(unit, *check_recall_levels((candidates,)))
        order = torch.arange(position.shape[1]).repeat(len(position), 1)
        for query, found in enumerate(position):
            rows = torch.from_numpy(self.embeddings[found[found >= 0].numpy()])  # the found ones come first
            distances = rerank(unit[[query]], rows, k1, k2, lambda_value)
            order[query, : len(rows)] = distances[0].argsort(stable=True)
        return similarity.gather(1, order)[:, :k], position.gather(1, order)[:, :k]

    def _find(self, unit: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Search for unit rows in the space of the index."""
        if self.faiss_index is None:
            return self._find_exactly(unit, k)
        fetched = min(len(self), self.kind.candidates(k))
        _, found = self.faiss_index.search(unit.numpy(), fetched)
        position = torch.from_numpy(found)
        rows = torch.from_numpy(self.embeddings[found.clip(min=0)])  # (Q, fetched, D)
        similarity = torch.einsum("qd,qkd->qk", unit, rows).masked_fill_(position < 0, -torch.inf)
        similarity, order = similarity.sort(dim=1, descending=True, stable=True)
        return similarity[:, :k], position.gather(1, order)[:, :k]

    def _find_exactly(self, unit: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best, position = unit.new_empty(len(unit), 0), torch.empty(len(unit), 0, dtype=torch.long)
        with full_precision_products(unit.device):
            for part in row_slices(len(self), _BLOCK):
                value, place = (unit @ torch.from_numpy(self.embeddings[part]).T).topk(min(k, part.stop - part.start))
                best, chosen = torch.cat([best, value], dim=1).topk(min(k, best.shape[1] + value.shape[1]))
                position = torch.cat([position, place + part.start], dim=1).gather(1, chosen)
        return best, position

    def recall(self, queries: Tensor, k: int = 10) -> float:
        """Return the share of the exact `k` nearest images of the queries that `search` finds.

        A neighbour as similar as the last of the exact ones counts as found, since equal images come in any order.
        """
        exact, _ = self.search_exactly(queries, k)
        return share_found(self.search(queries, k)[0], exact)

    def measure(self, k: Sequence[int] = (1, 10, 100), queries: int = 1000, seed: int = 0) -> IndexBenchmark:
        """Measure recall against exact search, and latency, with images of the index as queries.

        The result is kept as `benchmark`.

        Args:
            k: Numbers of neighbours; those of N and above are left out.
            queries: How many images are drawn.
            seed: Seed of the draw.
        """
        k = tuple(level for level in check_recall_levels(k) if level < len(self))
        drawn = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:queries].sort().values
        recalls = {}
        if k and len(drawn):
            images = torch.from_numpy(self.embeddings[drawn.numpy()])
            exact, found = (
                without_self(*search(images, max(k) + 1), drawn) for search in (self._find_exactly, self._find)
            )
            recalls = {level: share_found(found[:, :level], exact[:, :level]) for level in k}
        depth = max(k, default=1)
        latency, exact_latency = (
            median_milliseconds(search, self.embeddings, depth, seed) for search in (self._find, self._find_exactly)
        )
        self.benchmark = IndexBenchmark(len(drawn), recalls, latency, exact_latency, torch.get_num_threads())
        return self.benchmark

    def save(self, folder: str | Path) -> Path:
        """Write the index to a folder of its own. An index that is there stays whole until the new one is finished.

        Raises:
            OSError: If the disk is full, or another process writes there.
            ValueError: If `folder` is something other than an index, or contains the working directory.
        """
        with staged_folder(Path(folder)) as staged:
            with (staged / EMBEDDINGS).open("wb") as file:
                write_header(file, self.embeddings.shape)
                for part in row_slices(len(self), _BLOCK):
                    file.write(np.ascontiguousarray(self.embeddings[part]).data)
            self.write_all_but_embeddings(staged)
        return Path(folder)

    def to_parquet(self, path: str | Path) -> Path:
        """Write the index as a table with one row per image, for a vector database or another program.

        Args:
            path: The `.parquet` file.

        Returns:
            The file, with the columns `path`, `label`, `class`, `index` (the position in the index) and `embedding` (a
            list of D float32, of unit length). `memdml score --embeddings` reads it too.

        Raises:
            OSError: If the disk is full. The message names the file.

        Example:
            >>> import tempfile
            >>> from pyarrow import parquet
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = build_index(torch.eye(3)).to_parquet(Path(folder, "index.parquet"))
            ...     parquet.read_table(path).column("embedding").to_pylist()[1]
            [0.0, 1.0, 0.0]
        """
        columns = {**self._columns(), "index": range(len(self))}
        return write_embedding_table(Path(path).expanduser(), self.embeddings, columns)

    def _columns(self) -> dict[str, list[Any]]:
        return {"path": self.images.paths, "label": self.images.labels, "class": self.images.classes}

    def write_all_but_embeddings(self, folder: Path) -> None:
        """Write the index to a folder in which the embeddings lie already; the description comes last."""
        import pyarrow
        from pyarrow import parquet

        if self.faiss_index is not None:
            _write_faiss(self.faiss_index, folder / FAISS)
        if self.whitening is not None:
            self.whitening.save(folder / WHITENING)
        parquet.write_table(pyarrow.table(self._columns()), folder / IMAGES)
        description = {
            "format": FORMATS[-1],
            "images": len(self),
            "dim": self.embeddings.shape[1],
            "kind": {"kind": self.kind.kind(), **asdict(self.kind)},
            "benchmark": None if self.benchmark is None else asdict(self.benchmark),
            "whitening": self.whitening is not None,
            "about": self.about,
        }
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")

    def _unit(self, queries: Tensor) -> Tensor:
        check_finite_embeddings("queries", queries)
        dim = self.embeddings.shape[1] if self.whitening is None else len(self.whitening.mean)
        if queries.shape[1] != dim:
            raise ValueError(
                f"Expected `queries` of dimension {dim}, as in the index, but got {queries.shape[1]}. Embed them with "
                "the network of the index."
            )
        rows = queries.detach().cpu()
        return unit_float32(rows if self.whitening is None else self.whitening(rows))


def build_index(
    embeddings: Tensor | np.ndarray,
    images: IndexedImages | None = None,
    kind: IndexKind | None = None,
    *,
    about: dict[str, Any] | None = None,
    whitening: Whitening | None = None,
    device: str = "cpu",
    progress: bool = False,
) -> EmbeddingIndex:
    """Build an index of embeddings for cosine similarity.

    Args:
        embeddings: `(N, D)`, finite, any norm. A `numpy.memmap` that can be written is normalised in place.
        images: What each row is; by default rows are named by their number.
        kind: `Flat()` (the default), `IVF()`, `HNSW()`, `PQ()`, or a kind of your own.
        about: What is kept with the index; must be JSON.
        whitening: Whiten the embeddings, and the queries of every search.
        device: `"cpu"`, or `"cuda"` to train and fill a faiss index on all GPUs, with the extra `gpu`.
        progress: Show a progress bar.

    Raises:
        ImportError: If the kind needs faiss and it is not installed.
        TypeError: If `embeddings` are not floating-point.
        ValueError: If there is no row, rows are not finite, shapes disagree, or the kind needs more rows or another D.

    Example:
        >>> index = build_index(torch.eye(4))
        >>> similarity, position = index.search(torch.tensor([[0.0, 2.0, 0.1, 0.0]]), k=2)
        >>> position.tolist()
        [[1, 2]]
    """
    rows = torch.as_tensor(embeddings)
    check_finite_embeddings("embeddings", rows)
    if not len(rows):
        raise ValueError("Expected at least one row of `embeddings` to index but got none. Pass embeddings.")
    if images is None:
        images = IndexedImages([str(row) for row in range(len(rows))], [0] * len(rows), [""] * len(rows))
    if any(len(column) != len(rows) for column in images):
        raise ValueError(
            f"Expected {len(rows)} paths, labels and classes, one per embedding, but got "
            f"{', '.join(str(len(column)) for column in images)}. Pass one of each."
        )
    if whitening is not None:
        embeddings = rows = whitening(rows.detach().cpu().float())
    copied = None if isinstance(embeddings, np.memmap) else rows.detach().cpu().float().numpy().copy()
    unit = normalise_in_place(np.asanyarray(embeddings) if copied is None else copied)
    kind = Flat() if kind is None else kind
    blocks = tqdm(list(row_slices(len(unit), _BLOCK)), f"{kind.kind()} index", disable=not progress, delay=1)
    faiss_index = build_faiss_index(unit, kind, device, blocks) if kind.uses_faiss else None
    return EmbeddingIndex(unit, images, kind, faiss_index, about or {}, whitening=whitening)


def normalise_in_place(embeddings: np.ndarray) -> np.ndarray:
    """Divide the rows by their norm where they lie; blocks that are unit to rounding are not written."""
    for part in row_slices(len(embeddings), _BLOCK):
        rows = torch.from_numpy(np.asarray(embeddings[part])).float()
        if not torch.allclose(rows.norm(dim=1), torch.ones(()), atol=1e-6):
            embeddings[part] = unit_float32(rows).numpy()
    return embeddings


def load_index(folder: str | Path) -> EmbeddingIndex:
    """Read an index that `EmbeddingIndex.save` or `memdml index` wrote; the embeddings stay on disk.

    Raises:
        ImportError: If its kind needs faiss and it is not installed.
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, or of a later version.
    """
    from pyarrow import parquet

    folder = existing_folder(Path(folder))
    if not (folder / DESCRIPTION).is_file():
        raise FileNotFoundError(
            f"Expected an index in {folder} but there is no {DESCRIPTION}. Make one with `memdml index`."
        )
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if description["format"] not in FORMATS:
            raise ValueError(f"expected format {FORMATS[-1]} or older but got {description['format']}")
        first = description["format"] == 1
        kind = kind_from_description(description["options" if first else "kind"])
        benchmark = description["measured" if first else "benchmark"]
        if benchmark is not None:
            benchmark = IndexBenchmark(**{**benchmark, "recall": {int(k): v for k, v in benchmark["recall"].items()}})
        rows, dim, about = description["images"], description["dim"], dict(description["about"])
        embeddings = np.load(folder / EMBEDDINGS, mmap_mode="c", allow_pickle=False)
        whitening = Whitening.load(folder / WHITENING) if description.get("whitening") else None
        columns = parquet.read_table(folder / IMAGES, columns=["path", "label", "class"]).to_pydict()
        faiss_index = import_faiss(WITHOUT_FAISS).read_index(str(folder / FAISS)) if kind.uses_faiss else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"Expected a whole index in {folder} but it is damaged: {error}. Make it again with `memdml index`."
        ) from error
    shapes: dict[str, tuple[Any, ...]] = {
        EMBEDDINGS: (*embeddings.shape, embeddings.dtype.name),
        IMAGES: (len(columns["path"]), dim, "float32"),
    }
    if whitening is not None:
        shapes[WHITENING] = (rows, len(whitening.weight), "float32")
    if faiss_index is not None:
        shapes[FAISS] = (faiss_index.ntotal, faiss_index.d, "float32")
    for name, shape in shapes.items():
        if shape != (rows, dim, "float32"):
            raise ValueError(
                f"Expected a whole index in {folder} but it is damaged: {name} holds {shape} instead of "
                f"{(rows, dim, 'float32')}. Make it again with `memdml index`."
            )
    images = IndexedImages(columns["path"], columns["label"], columns["class"])
    return EmbeddingIndex(embeddings, images, kind, faiss_index, about, benchmark, whitening)


def _write_faiss(index: Any, path: Path) -> None:
    try:
        import_faiss(WITHOUT_FAISS).write_index(index, str(path))
    except RuntimeError as error:
        if "No space left" not in str(error):
            raise
        raise OSError(errno.ENOSPC, str(error)) from error
