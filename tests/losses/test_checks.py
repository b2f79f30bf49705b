"""What is wrong with the arguments of a loss is said in a sentence with the way out."""

import pytest
import torch
import torch.nn.functional as F

from lightning_memdml import ContrastiveLoss

X = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
Y = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, Y[:, None]), ValueError, r"`labels` of shape \(4,\) but got \(4, 1\); pass `labels.squeeze\(1\)`"),
        ((X, Y[:3]), ValueError, r"`labels` of shape \(4,\) but got \(3,\)"),
        ((X, Y.float()), TypeError, r"`labels` of an integer dtype but got torch.float32; pass `labels.long\(\)`"),
        ((X, Y > 0), TypeError, "integer dtype but got torch.bool"),
        ((X[0], Y), ValueError, r"`embeddings` of shape \(B, D\).* but got \(8,\)"),
        ((X.long(), Y), TypeError, "`embeddings` of a floating-point dtype but got torch.int64"),
        ((3 * X, Y), ValueError, "unit length .* longest has length 3; pass `torch.nn.functional.normalize"),
        ((X, Y, X), ValueError, "`ref_labels` is missing"),
        ((X, Y, None, Y), ValueError, "`ref_embeddings` is missing"),
        ((X, Y, X[:, :5], Y), ValueError, r"shape \(M, 8\) to match `embeddings` but got \(4, 5\)"),
        ((X.tolist(), Y), TypeError, r"`embeddings` to be a tensor but got list; pass `torch.as_tensor\(embeddings\)`"),
        ((X.numpy(), Y), TypeError, "`embeddings` to be a tensor but got ndarray"),
        ((X, Y.tolist()), TypeError, "`labels` to be a tensor but got list"),
        ((X, Y, X, Y.tolist()), TypeError, "`ref_labels` to be a tensor but got list"),
        ((X, Y, X, Y[:2]), ValueError, r"`ref_labels` of shape \(4,\) but got \(2,\)"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ContrastiveLoss()(*arguments)


def test_wrong_indices_are_named():
    with pytest.raises(ValueError, match=r"`indices` of shape \(4,\) but got \(2,\)"):
        ContrastiveLoss()(X, Y, indices=Y[:2])
    with pytest.raises(ValueError, match="`ref_indices` only with `ref_embeddings`"):
        ContrastiveLoss()(X, Y, ref_indices=Y)


def test_not_a_number_reaches_the_loss_for_the_scaler_to_see():
    x = X.clone()
    x[1, 2] = torch.nan
    assert ContrastiveLoss()(x, Y).isnan()
    assert ContrastiveLoss()(x, Y, X, Y).isnan()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_any_integer_labels_do(dtype):
    assert ContrastiveLoss()(X, Y.to(dtype), X, Y) == ContrastiveLoss()(X, Y, X, Y)
