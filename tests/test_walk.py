"""One training batch enters few functions in few files, so that a newcomer can read them all."""

from __future__ import annotations

from pathlib import Path

from support.children import load, run_python

# What is reached today. Lower the bounds when a change makes the way shorter; raise them for a reason only. 8 functions
# and 3 files compute the positive pairs alone, which saves a tenth of a step where an anchor has many positives.
MOST_FUNCTIONS = 49
MOST_FILES = 15

SCRIPT = Path(__file__).with_name("walk.py")
script = load(str(SCRIPT))


def test_a_batch_enters_few_functions_in_few_files() -> None:
    steps = script.walk()
    assert len(steps) <= MOST_FUNCTIONS, [step.name for step in steps]
    assert len({step.file for step in steps}) <= MOST_FILES


def test_the_way_goes_from_the_learner_to_the_loss_and_back_to_the_memory() -> None:
    names = [step.name for step in script.walk()]
    hops = ["MetricLearner.training_step", "PairLoss.forward", "ContrastiveLoss.negative_terms", "TableMemory.read",
            "MemoryCallback.on_train_batch_end", "TableMemory.enqueue"]  # fmt: skip
    assert [name for name in names if name in hops] == hops


def test_the_script_prints_the_way_as_a_table_of_contents() -> None:
    lines = run_python(SCRIPT).stdout.splitlines()
    assert any(line.startswith("  ") and "losses/pair_loss.py:" in line for line in lines)
    assert any(" functions in " in line for line in lines)
