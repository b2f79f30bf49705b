"""Polynomials in two similarities against the functions they stand for, and their sums against plain loops."""

import numpy as np
import pytest
import torch

from lightning_memdml.losses.polynomials import DEGREES, REACH, DifferencePolynomial, polynomial, power_sums


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-7), (torch.float64, 5e-15)])
@pytest.mark.parametrize("function", [torch.sigmoid, torch.nn.functional.softplus, torch.cos])
def test_a_polynomial_is_its_function_up_to_rounding_wherever_similarities_are(function, dtype, tolerance):
    replacement = DifferencePolynomial(lambda difference: function(torch.from_numpy(difference)).numpy())
    x = torch.linspace(-REACH, REACH, 301, dtype=dtype)
    powers = torch.linalg.vander(x, N=DEGREES[dtype] + 1)
    actual = powers @ replacement.like(x) @ powers.T
    wanted = function(x.double()[:, None] - x.double())
    assert (actual - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_coefficients_have_a_row_per_power_of_the_first_number():
    coefficients = DifferencePolynomial(lambda difference: np.exp(difference / 8)).like(torch.zeros(1).double())
    torch.testing.assert_close(coefficients[:3, 0], torch.tensor([1, 1 / 8, 1 / 128], dtype=torch.float64))
    torch.testing.assert_close(coefficients[0, :3], torch.tensor([1, -1 / 8, 1 / 128], dtype=torch.float64))


@pytest.mark.parametrize("dtype", DEGREES)
@pytest.mark.parametrize("columns", [0, 1, 7])
def test_sums_of_powers_and_polynomials_follow_their_formulas(dtype, columns):
    block = torch.linspace(-1, 1, 3 * columns, dtype=dtype).view(3, columns)
    coefficients = torch.randn(3, DEGREES[dtype] + 1, dtype=dtype, generator=torch.Generator().manual_seed(0))
    before = block.clone()
    sums = torch.stack([(block**k).sum(dim=1) for k in range(1, DEGREES[dtype] + 1)], dim=1)
    values = sum((coefficients[:, k, None] * block**k for k in range(DEGREES[dtype] + 1)), torch.zeros_like(block))
    torch.testing.assert_close((power_sums(block), polynomial(block, coefficients)), (sums, values))
    assert torch.equal(block, before)
