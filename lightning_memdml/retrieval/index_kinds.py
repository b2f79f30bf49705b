"""The kinds of index: one dataclass each, whose fields are the options of faiss under faiss's own names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

_POINTS_PER_LIST = 39  # below which faiss warns that k-means has too little to train on
# Names of version 0.1 -> those of faiss.
OLD_NAMES = {
    "lists": "nlist",
    "probes": "nprobe",
    "links": "M",
    "beam": "efSearch",
    "code_bytes": "m",
    "candidates": "k_factor",
}


@dataclass(frozen=True)
class IndexKind(ABC):
    """How an index is built and searched.

    A new kind is a frozen dataclass that derives from this class. Its fields are options, each with a default. Its
    name in lower case is what `memdml index --kind` takes, once the module that defines it is imported.
    """

    uses_faiss: ClassVar[bool] = True  # otherwise search is exact, by torch
    builds_on_gpu: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and value < 1:
                raise ValueError(f"Expected `{name}` of at least 1 but got {value}. Pass 1 or more.")

    @classmethod
    def kind(cls) -> str:
        """Return the name of the kind."""
        return cls.__name__.lower()

    def __str__(self) -> str:
        options = (f"{name}={value}" for name, value in asdict(self).items() if value is not None)
        return f"{type(self).__name__}({', '.join(options)})"

    @abstractmethod
    def factory(self, rows: int, dim: int) -> str:
        """Return the string from which `faiss.index_factory` makes the index.

        Args:
            rows: Number of embeddings.
            dim: Their dimension.

        Raises:
            ValueError: If an option does not fit the rows or their dimension.
        """

    def training_rows(self, rows: int) -> int:
        """Return how many of the rows faiss is trained on."""
        return rows

    def before_training(self, index: Any) -> None:  # noqa: B027, a kind may have nothing to set
        """Set options of the empty faiss index."""

    def before_search(self, index: Any) -> None:  # noqa: B027
        """Set options of the filled faiss index."""

    def candidates(self, k: int) -> int:
        """Return how many rows to fetch from faiss for `k` neighbours: `k_factor * k`, where there is that option."""
        return k * getattr(self, "k_factor", 1)


@dataclass(frozen=True)
class Flat(IndexKind):
    """Compares each query with every image: exact, by torch, without faiss.

    Example:
        >>> print(Flat())
        Flat()
    """

    uses_faiss: ClassVar[bool] = False

    def factory(self, rows: int, dim: int) -> str:
        """Return `Flat`."""
        return "Flat"


@dataclass(frozen=True)
class IVF(IndexKind):
    """Searches the `nprobe` nearest of `nlist` clusters only (`IndexIVFFlat`): faster from about 100,000 images on.

    Args:
        nlist: Number of clusters; by default `4 sqrt(N)`, as long as there are 39 images for each.
        nprobe: Clusters that a search visits; by default a sixteenth of them, at least 8.
        k_factor: Candidates fetched for each neighbour asked for, and compared exactly.

    Raises:
        ValueError: If an option is below 1.
    """

    nlist: int | None = None
    nprobe: int | None = None
    k_factor: int = 1

    def factory(self, rows: int, dim: int) -> str:
        """Return `IVF<nlist>,Flat`."""
        return f"IVF{self._lists(rows)},Flat"

    def training_rows(self, rows: int) -> int:
        """Return at most 256 rows per cluster, as many as faiss itself would use."""
        return min(rows, 256 * self._lists(rows))

    def before_training(self, index: Any) -> None:
        """Accept small clusters without a warning: the recall is measured instead."""
        index.cp.min_points_per_centroid = 1

    def before_search(self, index: Any) -> None:
        """Set `nprobe`."""
        index.nprobe = min(index.nlist, self.nprobe or max(8, index.nlist // 16))

    def _lists(self, rows: int) -> int:
        lists = self.nlist or max(1, min(round(4 * rows**0.5), rows // _POINTS_PER_LIST))
        if lists > rows:
            raise ValueError(
                f"Expected `nlist` of at most {rows}, the number of images, but got {lists}. Leave it out."
            )
        return lists


@dataclass(frozen=True)
class HNSW(IndexKind):
    """Follows a graph of neighbours (`IndexHNSWFlat`): faster from about 100,000 images on.

    Args:
        M: Neighbours of each image in the graph, at least 2.
        efSearch: Candidates that a search keeps; more finds more, and takes longer.
        efConstruction: Candidates kept while the graph is built.
        k_factor: Candidates fetched for each neighbour asked for, and compared exactly.

    Raises:
        ValueError: If an option is out of range.
    """

    builds_on_gpu: ClassVar[bool] = False

    M: int = 32
    efSearch: int = 64  # noqa: N815
    efConstruction: int = 40  # noqa: N815
    k_factor: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.M < 2:
            raise ValueError(f"Expected `M` of at least 2 but got {self.M}. Pass 32, for example.")

    def factory(self, rows: int, dim: int) -> str:
        """Return `HNSW<M>,Flat`."""
        return f"HNSW{self.M},Flat"

    def before_training(self, index: Any) -> None:
        """Set `efConstruction`."""
        index.hnsw.efConstruction = self.efConstruction

    def before_search(self, index: Any) -> None:
        """Set `efSearch`."""
        index.hnsw.efSearch = self.efSearch


@dataclass(frozen=True)
class PQ(IndexKind):
    """Keeps `m * nbits` bits per image instead of `32 * D` (`IndexPQ`), for a search that fits in little memory.

    Args:
        m: Parts that an embedding is cut into, a divisor of D; by default the largest up to `D / 4`.
        nbits: Bits per part; k-means of `2^nbits` centroids needs as many images.
        k_factor: Candidates fetched for each neighbour asked for, and compared exactly.

    Raises:
        ValueError: If an option is below 1.
    """

    m: int | None = None
    nbits: int = 8
    k_factor: int = 1

    def factory(self, rows: int, dim: int) -> str:
        """Return `PQ<m>x<nbits>np`."""
        if rows < 2**self.nbits:
            raise ValueError(
                f"Expected at least {2**self.nbits} images for `kind=pq`, which learns from them, but got {rows}. Take "
                "`kind=flat`, or fewer `nbits`."
            )
        parts = self.m or max(size for size in range(1, max(1, dim // 4) + 1) if dim % size == 0)
        if dim % parts:
            raise ValueError(f"Expected `m` to divide the dimension {dim} but got {parts}. Leave it out.")
        # "np" skips the polysemous training, which takes seconds per byte and serves a filter that is not used here.
        return f"PQ{parts}x{self.nbits}np"

    def training_rows(self, rows: int) -> int:
        """Return at most 256 rows per centroid, as many as faiss itself would use."""
        return min(rows, 256 * 2**self.nbits)

    def before_training(self, index: Any) -> None:
        """Accept few images per centroid without a warning for each part: the recall is measured instead."""
        index.pq.cp.min_points_per_centroid = 1


def index_kinds() -> dict[str, type[IndexKind]]:
    """Return every kind that is imported, by its name.

    Example:
        >>> sorted(set(index_kinds()) & {"flat", "ivf", "hnsw", "pq"})
        ['flat', 'hnsw', 'ivf', 'pq']
    """
    kinds: dict[str, type[IndexKind]] = {}
    waiting = IndexKind.__subclasses__()
    while waiting:
        kind = waiting.pop(0)
        kinds.setdefault(kind.kind(), kind)
        waiting += kind.__subclasses__()
    return kinds


def make_index_kind(name: str, options: Mapping[str, Any]) -> IndexKind:
    """Return the kind of this name with these options.

    Args:
        name: Such as `"ivf"`.
        options: Name -> value.

    Raises:
        ValueError: If there is no such kind, an option does not apply to it, or a value is out of range.

    Example:
        >>> make_index_kind("ivf", {"nprobe": 16})
        IVF(nlist=None, nprobe=16, k_factor=1)
        >>> make_index_kind("flat", {"nprobe": 16})
        Traceback (most recent call last):
        ...
        ValueError: Expected no option with `kind=flat` but got `nprobe`, an option of ivf. Leave it out.
    """
    kinds = index_kinds()
    if name not in kinds:
        raise ValueError(f"Expected `kind` to be one of {', '.join(kinds)} but got {name!r}. Pass one of these.")
    own = [field.name for field in fields(kinds[name])]
    for option in options:
        if option in own:
            continue
        expected = f"one of the options {', '.join(own)}" if own else "no option"
        owners = [other for other, kind in kinds.items() if option in {field.name for field in fields(kind)}]
        described = f", an option of {', '.join(owners)}" if owners else ""
        if option in OLD_NAMES:
            described = f", which is called `{OLD_NAMES[option]}` now, as in faiss"
        raise ValueError(f"Expected {expected} with `kind={name}` but got `{option}`{described}. Leave it out.")
    return kinds[name](**options)


def kind_from_description(description: Mapping[str, Any]) -> IndexKind:
    """Return the kind that `index.json` describes, also as version 0.1 wrote it.

    Args:
        description: `kind` and its options; in version 0.1 those of all kinds, under other names.
    """
    options = {OLD_NAMES.get(name, name): value for name, value in description.items() if name != "kind"}
    kind = str(description["kind"])
    if "lists" in description and kind in index_kinds():  # version 0.1: what does not apply had no effect
        own = {field.name for field in fields(index_kinds()[kind])}
        options = {name: value for name, value in options.items() if name in own}
    return make_index_kind(kind, options)
