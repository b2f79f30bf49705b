"""A loss and a weight function of a user's own: two files, and the contract tests and the command line take them."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from support.children import ChildError, run_python

from lightning_memdml import PairLoss, WeightFunction
from lightning_memdml.lightning_cli import MemdmlCLI

REPOSITORY = Path(__file__).parents[2]

LOSS = '''
import torch
from lightning_memdml import PairLoss, WeightFunction
from lightning_memdml.losses.pair_loss import AnchorTerms, NegativeTerms


class SquaredLoss(PairLoss):
    """Weighs positives by their distance, and negatives by their similarity above a margin."""

    needs_negatives = False

    def __init__(self, margin: float = 0.2) -> None:
        super().__init__()
        self.margin = margin

    def negative_threshold(self, context):
        return self.margin

    def negative_terms(self, similarity, context):
        excess = (similarity - self.margin).clamp(min=0)
        return NegativeTerms(excess, excess**2 / 2)

    def combine(self, similarity, mask, context, negatives):
        distance = torch.where(mask, 1 - similarity, 0.0)
        value = (distance**2).sum(dim=1) / 2 + negatives.total
        return AnchorTerms(value, distance, torch.ones_like(value))


class Cubic(WeightFunction):
    """Weighs pairs by the third power of their similarity."""

    zero_below = 0.0

    def forward(self, similarity):
        return similarity.clamp(min=0) ** 3
'''

FORMULAS = """
from my_losses import Cubic, SquaredLoss


def squared(margin):
    return lambda p, n: ((1 - p) ** 2).sum() / 2 + ((n - margin).clamp_min(0) ** 2).sum() / 2


LOSSES = {"my squared": (SquaredLoss(0.1), squared(0.1))}
WEIGHTS = {"my cubic": (Cubic(), lambda s: max(0.0, s) ** 3)}
"""


@pytest.fixture(name="package")
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_losses.py").write_text(LOSS)
    (tmp_path / "formulas").mkdir()
    (tmp_path / "formulas" / "my_formulas.py").write_text(FORMULAS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run_contract(package: Path) -> str:
    """Run the contract tests on the user's classes alone, and return what pytest prints."""
    files = [Path(__file__).with_name(name) for name in ("test_losses.py", "test_weights.py", "test_sharded.py")]
    # A warning of a dependency is for other tests to find: the oldest versions give some.
    arguments = ["-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", "-k", "my", *files]
    return run_python(*arguments, cwd=REPOSITORY, env={"MEMDML_ORACLES": str(package / "formulas")}).stdout


def test_the_contract_tests_take_a_loss_and_a_weight_function_from_two_files(package: Path) -> None:
    printed = run_contract(package)
    assert "my squared" not in printed, "a test was skipped or failed"
    assert int(printed.splitlines()[-1].split(" passed")[0].split()[-1]) >= 30, printed


def test_the_contract_tests_refuse_a_loss_that_is_not_its_formula(package: Path) -> None:
    file = package / "my_losses.py"
    file.write_text(file.read_text().replace("excess**2 / 2", "excess**2"))
    with pytest.raises(ChildError) as error:
        run_contract(package)
    assert "test_in_batch_value_and_gradient_follow_the_formula[my squared" in str(error.value)


def test_the_command_line_takes_both_by_their_import_path(
    package: Path, run_in: Callable[[Path], AbstractContextManager[None]]
) -> None:
    loss = "{class_path: DirectWeightLoss, init_args: {negative: {class_path: my_losses.Cubic}}}"
    arguments = ["--model.backbone=SmallConvNet", "--model.loss=my_losses.SquaredLoss", "--model.loss.margin=0.4"]
    with run_in(package):
        model = MemdmlCLI(args=[*arguments, f"--model.memory_loss={loss}"], run=False).model
    assert (type(model.loss).__name__, model.loss.margin) == ("SquaredLoss", 0.4)
    assert type(model.memory_loss.negative).__name__ == "Cubic"


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        (PairLoss, "negative_cut", "negative_threshold"),
        (PairLoss, "stand_in", "fill_value"),
        (PairLoss, "coupled", "needs_negatives"),
        (WeightFunction, "cut", "zero_below"),
    ],
)
def test_a_name_of_an_earlier_version_is_refused(kind: type, old: str, new: str) -> None:
    message = (
        f"Expected `{new}` in the class Own but got `{old}`, its name in an earlier version. Rename it to `{new}`."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        type("Own", (kind,), {old: 0.0})
    assert type("Own", (kind,), {new: 0.0})
