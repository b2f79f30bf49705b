"""Wrong arguments of a loss raise an error that names the argument, what was expected, what came, and what to do."""

import re

import pytest
import torch
import torch.nn.functional as F

from lightning_memdml import ContrastiveLoss
from lightning_memdml.checks import INCOMPARABLE, check_rows

X = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
Y = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, Y[:, None]), ValueError, "Expected `labels` of shape (4,) but got (4, 1). Pass `labels.squeeze(1)`."),
        (
            (X, Y[:3]),
            ValueError,
            "Expected `labels` of shape (4,) but got (3,). Pass one integer for each row of the embeddings.",
        ),
        (
            (X, Y.float()),
            TypeError,
            "Expected `labels` of an integer dtype but got torch.float32. Pass `labels.long()`.",
        ),
        ((X, Y > 0), TypeError, "Expected `labels` of an integer dtype but got torch.bool. Pass `labels.long()`."),
        (
            (X[0], Y),
            ValueError,
            "Expected `embeddings` of shape (B, D) with D of at least 1 but got (8,). "
            "Pass one vector per image, for example `embeddings.flatten(1)`.",
        ),
        (
            (X[:, :0], Y),
            ValueError,
            "Expected `embeddings` of shape (B, D) with D of at least 1 but got (4, 0). "
            "Pass one vector per image, for example `embeddings.flatten(1)`.",
        ),
        (
            (X.long(), Y),
            TypeError,
            "Expected `embeddings` of a floating-point dtype but got torch.int64. Pass `embeddings.float()`.",
        ),
        (
            (3 * X, Y),
            ValueError,
            "Expected `embeddings` of unit length (similarities in [-1, 1]) but got a longest row of length 3. "
            "Pass `torch.nn.functional.normalize(embeddings.float(), dim=1)`.",
        ),
        (
            (X, Y, X),
            ValueError,
            "Expected `ref_embeddings` and `ref_labels` together but got `ref_embeddings` alone. "
            "Pass `ref_labels` too.",
        ),
        (
            (X, Y, None, Y),
            ValueError,
            "Expected `ref_embeddings` and `ref_labels` together but got `ref_labels` alone. "
            "Pass `ref_embeddings` too.",
        ),
        (
            (X, Y, X[:, :5], Y),
            ValueError,
            "Expected `ref_embeddings` of shape (M, 8), as wide as `embeddings`, but got (4, 5). "
            "Pass references of the same embedding layer.",
        ),
        (
            (X.tolist(), Y),
            TypeError,
            "Expected `embeddings` to be a tensor of shape (B, D) but got list. Pass `torch.as_tensor(embeddings)`.",
        ),
        (
            (X.numpy(), Y),
            TypeError,
            "Expected `embeddings` to be a tensor of shape (B, D) but got ndarray. Pass `torch.as_tensor(embeddings)`.",
        ),
        (
            (X, Y.tolist()),
            TypeError,
            "Expected `labels` to be an integer tensor of shape (4,) but got list. Pass `torch.as_tensor(labels)`.",
        ),
        (
            (X, Y, X, Y.tolist()),
            TypeError,
            "Expected `ref_labels` to be an integer tensor of shape (4,) but got list. "
            "Pass `torch.as_tensor(ref_labels)`.",
        ),
        (
            (X, Y, X, Y[:2]),
            ValueError,
            "Expected `ref_labels` of shape (4,) but got (2,). Pass one integer for each row of the embeddings.",
        ),
    ],
)
def test_a_wrong_argument_is_named_in_a_whole_message(arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        ContrastiveLoss()(*arguments)


def test_wrong_indices_are_named():
    message = "Expected `indices` of shape (4,) but got (2,). Pass one integer for each row of the embeddings."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ContrastiveLoss()(X, Y, indices=Y[:2])
    with pytest.raises(ValueError, match=r"Pass `indices` for the images of the batch\.$"):
        ContrastiveLoss()(X, Y, ref_indices=Y)


@pytest.mark.parametrize("name", ["labels", "ref_embeddings", "ref_labels", "indices", "ref_indices"])
def test_a_tensor_on_another_device_is_refused(name):
    given = {"labels": Y, "ref_embeddings": X, "ref_labels": Y, "indices": Y, "ref_indices": Y}
    given[name] = given[name].to("meta")
    message = f"Expected `{name}` on cpu, like `embeddings`, but got meta. Pass `{name}.to(embeddings.device)`."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ContrastiveLoss()(X, **given)


@pytest.mark.parametrize("name", ["labels", "ref_labels", "indices", "ref_indices"])
@pytest.mark.parametrize("dtype", INCOMPARABLE)
def test_integers_that_torch_does_not_compare_are_refused(name, dtype):
    given = {"labels": Y, "ref_embeddings": X, "ref_labels": Y, "indices": Y, "ref_indices": Y}
    given[name] = given[name].to(dtype)
    message = f"Expected `{name}` of a signed integer dtype, or uint8, but got {dtype}. Pass `{name}.long()`."
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        ContrastiveLoss()(X, **given)


def test_a_tensor_without_rows_may_have_no_columns():
    check_rows("embeddings", torch.zeros(0, 0), labels=torch.zeros(0, dtype=torch.int64))


def test_nan_embeddings_give_a_nan_loss_for_the_loss_scaler():
    x = X.clone()
    x[1, 2] = torch.nan
    assert ContrastiveLoss()(x, Y).isnan()
    assert ContrastiveLoss()(x, Y, X, Y).isnan()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_dtype_are_accepted(dtype):
    assert ContrastiveLoss()(X, Y.to(dtype), X, Y) == ContrastiveLoss()(X, Y, X, Y)
