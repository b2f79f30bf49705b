"""Functions over the rows of a block that are faster than torch's."""

from __future__ import annotations

import pytest
import torch

from lightning_memdml.losses.row_ops import sum_negative_logs


@pytest.mark.parametrize("width", [0, 1, 63, 64, 65, 200, 4096])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_a_sum_of_logarithms_over_any_number_of_columns(width: int, dtype: torch.dtype, tolerance: float) -> None:
    block = 0.5 + 0.5 * torch.rand(3, width, dtype=dtype, generator=torch.Generator().manual_seed(0))
    wanted = -block.double().log().sum(dim=1)
    torch.testing.assert_close(sum_negative_logs(block).double(), wanted, rtol=tolerance, atol=0)


def test_a_sum_of_logarithms_of_the_smallest_numbers_does_not_underflow() -> None:
    block = torch.full((2, 300), 0.5)
    torch.testing.assert_close(sum_negative_logs(block), 300 * torch.full((2,), 2.0).log())
