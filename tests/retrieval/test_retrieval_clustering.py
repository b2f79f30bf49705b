from __future__ import annotations

import math
import sys
from collections import Counter

import pytest
import torch

from lightning_memdml.retrieval import normalized_mutual_information
from lightning_memdml.retrieval.clustering import mutual_information_of

pytest.importorskip("faiss", reason="k-means of the clustering score is faiss's, which is not installed")


def entropy(counts: Counter) -> float:
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values())


@pytest.mark.parametrize("seed", range(3))
def test_information_equals_entropies_of_counts(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(parts, (60,), generator=generator) for parts in (4, 7))
    second = torch.where(torch.arange(60) < 30, first, second)
    one, two = entropy(Counter(first.tolist())), entropy(Counter(second.tolist()))
    both = entropy(Counter(zip(first.tolist(), second.tolist(), strict=True)))
    assert mutual_information_of(first, second) == pytest.approx(2 * (one + two - both) / (one + two))


def test_separate_classes_score_one_and_any_seed_repeats() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(6).repeat_interleave(20) * 10 - 7
    separate = torch.eye(6).repeat_interleave(20, dim=0) + 0.01 * torch.randn(120, 6, generator=generator)
    noise = torch.randn(120, 6, generator=generator)
    assert normalized_mutual_information(separate, labels, seed=3) > 0.85  # k-means may merge two of six
    assert normalized_mutual_information(noise, labels, seed=1) == normalized_mutual_information(noise, labels, seed=1)
    assert normalized_mutual_information(noise, labels) < 0.5


def test_degenerate_partitions_are_defined() -> None:
    assert normalized_mutual_information(torch.ones(4, 2), torch.zeros(4, dtype=torch.long)) == 1
    assert normalized_mutual_information(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]), clusters=1) == 0
    assert math.isnan(normalized_mutual_information(torch.ones(0, 2), torch.zeros(0, dtype=torch.long)))


def test_more_clusters_than_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 4 `clusters`"):
        normalized_mutual_information(torch.ones(4, 2), torch.arange(4), clusters=5)


def test_without_faiss_the_way_to_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install \"lightning-memdml\[faiss\]\""):
        normalized_mutual_information(torch.ones(4, 2), torch.zeros(4, dtype=torch.long))
