"""Listed pairs are those of a mask, anchor after anchor, and their sums those of whole matrices."""

from __future__ import annotations

import pytest
import torch

from lightning_memdml.losses.listed_pairs import list_pairs


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.6, 1.0])
@pytest.mark.parametrize("shape", [(5, 300), (1, 1), (3, 0)])
def test_all_pairs_of_a_mask_are_listed(share: float, shape: tuple[int, int]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < share
    pairs = list_pairs(mask)
    torch.testing.assert_close(torch.stack([pairs.rows, pairs.columns], dim=1), mask.nonzero())
    number = mask.sum(dim=1)
    assert pairs.starts.tolist() == [0, *number.cumsum(dim=0).tolist()]
    assert pairs.exists.shape == (shape[0], number.max() if mask.numel() else 0)
    assert (pairs.exists == (torch.arange(pairs.exists.shape[1]) < number[:, None])).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5])
def test_the_sum_over_listed_pairs_is_a_product(share: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 200, generator=generator) < share
    mask[2] = False  # an anchor without a pair
    weights, references = torch.randn(6, 200, generator=generator), torch.randn(200, 7, generator=generator)
    weights, references = weights.to(dtype), references.to(dtype)
    pairs = list_pairs(mask)
    padded = pairs.pad(weights[mask])
    assert padded.dtype == dtype
    assert (padded[~pairs.exists] == 0).all()
    padded[~pairs.exists] = torch.nan  # is not read
    torch.testing.assert_close(pairs.weigh(padded, references), torch.where(mask, weights, 0.0) @ references)
