"""Builds the faiss index of a kind. faiss is optional, and imported only here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from lightning_memdml.retrieval.index_kinds import IndexKind, index_kinds

WITHOUT_FAISS = "An index with `kind=flat` needs neither."


def build_faiss_index(unit: np.ndarray, kind: IndexKind, device: str, blocks: Iterable[slice]) -> Any:
    """Return a faiss index of these rows, on the CPU.

    Args:
        unit: `(N, D)` float32, unit rows.
        kind: What to build.
        device: `"cpu"`, or a GPU to train and fill it on all GPUs.
        blocks: Slices that cover the rows, which are added one by one.

    Raises:
        ImportError: If faiss is not installed.
        ValueError: If an option does not fit the rows, or the kind or the installed faiss cannot use a GPU.
    """
    faiss = import_faiss(WITHOUT_FAISS)
    index = faiss.index_factory(unit.shape[1], kind.factory(*unit.shape), faiss.METRIC_INNER_PRODUCT)
    kind.before_training(index)
    if device != "cpu":
        index = _on_gpu(faiss, index, kind)
    if not index.is_trained:
        count = kind.training_rows(len(unit))
        # A sorted draw: the rows may lie on disk.
        drawn = slice(None) if count == len(unit) else np.sort(np.random.default_rng(0).choice(len(unit), count, False))
        index.train(np.ascontiguousarray(unit[drawn]))
    for part in blocks:
        index.add(np.ascontiguousarray(unit[part]))
    if device != "cpu":
        index = faiss.index_gpu_to_cpu(index)
    kind.before_search(index)
    return index


def _on_gpu(faiss: Any, index: Any, kind: IndexKind) -> Any:
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        raise ValueError(
            "Expected faiss with a GPU for `device=cuda` but the installed faiss has none. Leave `device` out, or, in "
            'an environment without faiss-cpu, `pip install "lightning-memdml[gpu]"`.'
        )
    if not kind.builds_on_gpu:
        raise ValueError(
            f"Expected a kind that faiss builds on a GPU but got `kind={kind.kind()}`. Leave `device` out, or take "
            f"{', '.join(name for name, other in index_kinds().items() if other.builds_on_gpu)}."
        )
    return faiss.index_cpu_to_all_gpus(index)


def import_faiss(instead: str) -> Any:
    """Return the module faiss.

    Args:
        instead: A sentence that says what to do without faiss.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            'Expected faiss but it is not installed. `pip install "lightning-memdml[faiss]"`, or '
            f'`pip install "lightning-memdml[gpu]"` on a machine with a GPU. {instead}'
        ) from error
    return faiss
