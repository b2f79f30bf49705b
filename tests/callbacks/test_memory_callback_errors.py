"""What MemoryCallback refuses or warns about, through the real Trainer."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from support.memory_training import Manual, Plain, fit, pair_loss
from torch import Tensor, nn

from lightning_memdml.callbacks.memory import MemoryCallback
from lightning_memdml.memory_term import against_memory


def returns(what: Any) -> type[Plain]:
    class Returns(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            z = self.embed(batch[0])
            return what(pair_loss(z, batch[1]), z, batch[1])

    return Returns


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        (
            lambda loss, z, y: loss,
            ValueError,
            r"no `embeddings` and no `labels`.*\(loss\).*return \{\"loss\": loss, ",
        ),
        (
            lambda loss, z, y: {"loss": loss, "embeddings": z},
            ValueError,
            r"got no `labels`.*\(loss, embeddings\)",
        ),
        (lambda loss, z, y: {"loss": loss, "labels": y}, ValueError, r"got no `embeddings` in .*Returns"),
        (
            lambda loss, z, y: {"loss": loss, "embeddings": z, "labels": y[:, None]},
            ValueError,
            r"`labels` of shape \(4,\) but got \(4, 1\)\. Pass `labels.squeeze\(1\)`",
        ),
        (
            lambda loss, z, y: {"loss": loss, "embeddings": z, "labels": y.float()},
            TypeError,
            r"Pass `labels.long\(\)`",
        ),
    ],
)
def test_a_missing_or_wrong_output_names_the_line(what: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit(returns(what)(), MemoryCallback(size=8))


def test_the_error_comes_in_the_first_step_also_during_warm_up() -> None:
    with pytest.raises(
        ValueError, match="the embeddings and labels of each training batch, which MemoryCallback needs"
    ):
        fit(returns(lambda loss, z, y: loss)(), MemoryCallback(size=8, start_step=7))


def test_a_start_after_the_end_of_the_training_is_a_warning() -> None:
    whole = (
        "Expected `start_step` below the 8 optimiser steps of the training but got 8: no row is stored, and the memory "
        "has no effect. Pass 0, for example."
    )
    module, callback = Plain(), MemoryCallback(size=8, start_step=8)
    with pytest.warns(UserWarning, match=f"^{re.escape(whole)}$"):
        fit(module, callback)
    assert len(callback.memory) == 0
    callback = MemoryCallback(size=8, start_step=7)
    fit(Plain(), callback)  # the last step stores its batch
    assert len(callback.memory) == 4


def test_manual_optimisation_that_returns_nothing_is_refused() -> None:
    class Silent(Manual):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match=r"returned \(nothing\)"):
        fit(Silent(), MemoryCallback(size=8))


def test_a_memory_that_is_not_read_gives_one_warning() -> None:
    unread = returns(lambda loss, z, y: {"loss": loss, "embeddings": z, "labels": y})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(unread(), MemoryCallback(size=8))
        fit(Plain(), MemoryCallback(size=8))
    assert sum("does not read" in str(w.message) and "self.memory.read()" in str(w.message) for w in caught) == 1


@pytest.mark.parametrize("owned", [nn.Linear(2, 2), torch.zeros(3), 5])
def test_a_module_with_its_own_memory_is_refused(owned: Any) -> None:
    module = Plain()
    module.memory = owned
    with pytest.raises(ValueError, match=r"to have no attribute `memory` of its own.*Rename"):
        fit(module, MemoryCallback(size=8))
    assert module.memory is owned


def test_a_second_memory_callback_is_refused_with_a_sentence() -> None:
    """By Lightning where both would be saved under one key, else by the callback."""

    class Other(MemoryCallback):
        state_key = "other"

    with pytest.raises(RuntimeError, match="more than one stateful callback of type `MemoryCallback`"):
        fit(Plain(), MemoryCallback(size=8), MemoryCallback(size=8))
    with pytest.raises(
        ValueError, match=r"Expected one MemoryCallback in the Trainer but got several\. Remove all but"
    ):
        fit(Plain(), MemoryCallback(size=8), Other(size=8))


def test_a_memory_term_without_the_callback_is_refused() -> None:
    class Short(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return against_memory(self, pair_loss, self.embed(batch[0]), batch[1])

    with pytest.raises(ValueError, match=r"Short has no memory. Pass `Trainer\(callbacks=\[MemoryCallback"):
        fit(Short())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "`size` of at least 1 but got 0"),
        ({"start_step": -1}, "`start_step` of at least 0 optimiser steps but got -1"),
        ({"encoder_momentum": 1}, r"`encoder_momentum` in \[0, 1\) but got 1"),
        ({"encoder_momentum": 0.9, "encoder_ramp": 0}, "`encoder_ramp` of at least 1 but got 0"),
        (
            {"encoder_momentum": 0.9, "encoder_batch_norm": "mean"},
            "`encoder_batch_norm` to be one of batch, running but got 'mean'",
        ),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        MemoryCallback(**arguments)
