"""Features of any shape are pooled, or refused with the way out: rows, tokens, maps, and objects that hold them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_memdml.backbones import Embedder

B, F = 2, 6


class Backbone(nn.Module):
    """Returns what it is given."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, images: Tensor) -> Any:
        return self.output


def features(output: Any, pooling: Any = None) -> Tensor:
    return Embedder(Backbone(output), F, 4, pooling=pooling)(torch.zeros(B, 3, 8, 8), features_only=True)


ROWS, TOKENS, MAP = torch.rand(B, F), torch.rand(B, 5, F), torch.rand(B, F, 3, 4)


@pytest.mark.parametrize("wrap", [dict, lambda **values: SimpleNamespace(**values)], ids=["mapping", "object"])
def test_rows_tokens_and_maps_alone_and_in_an_object(wrap: Any) -> None:
    assert torch.equal(features(ROWS), ROWS)
    assert torch.equal(features(wrap(pooler_output=ROWS, last_hidden_state=TOKENS)), ROWS)
    for held in (TOKENS, wrap(pooler_output=ROWS, last_hidden_state=TOKENS)):
        assert torch.equal(features(held, "token"), TOKENS[:, 0])
        torch.testing.assert_close(features(held, "average"), TOKENS.mean(dim=1))
    torch.testing.assert_close(features(MAP, "maximum"), MAP.amax(dim=(2, 3)))
    torch.testing.assert_close(features(wrap(last_hidden_state=MAP), "average"), MAP.mean(dim=(2, 3)))


UNPOOLED = "Pass the width as `num_features`, and for a map (B, F, H, W) or tokens (B, N, F) also `pooling`."


@pytest.mark.parametrize(
    ("output", "pooling", "error", "message"),
    [
        (
            TOKENS,
            None,
            ValueError,
            f"Expected the backbone to return features of shape (B, 6) but got (2, 5, 6). {UNPOOLED}",
        ),
        (
            MAP,
            None,
            ValueError,
            f"Expected the backbone to return features of shape (B, 6) but got (2, 6, 3, 4). {UNPOOLED}",
        ),
        (
            torch.rand(B, F, 1, 1, 1),
            None,
            ValueError,
            f"Expected the backbone to return features of shape (B, 6) but got (2, 6, 1, 1, 1). {UNPOOLED}",
        ),
        (
            torch.rand(B, 3, 4, F),  # channels last
            "average",
            ValueError,
            f"Expected the backbone to return features of shape (B, 6) but got (2, 3). {UNPOOLED}",
        ),
        (
            ROWS,
            "gem",
            ValueError,
            "Expected the backbone to return a map (B, F, H, W) or tokens (B, N, F) to pool but got (2, 6). Leave "
            "`pooling` out.",
        ),
        (
            [ROWS],
            None,
            TypeError,
            "Expected the backbone Backbone to return a tensor of features, or an object with `pooler_output`, but got "
            "a list. Wrap it in a module that returns the features.",
        ),
        (
            ROWS.long(),
            None,
            TypeError,
            "Expected the backbone to return features as floating-point numbers but got torch.int64. Convert them with "
            "`.float()`.",
        ),
        (
            {"pooler_output": ROWS},
            "average",
            TypeError,
            "Expected the backbone Backbone to return a tensor of features, or an object with `last_hidden_state`, but "
            "got a dict. Wrap it in a module that returns the features.",
        ),
    ],
)
def test_other_shapes_are_refused(output: Any, pooling: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as stopped:
        features(output, pooling)
    assert str(stopped.value) == message
