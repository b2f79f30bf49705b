"""Prints the way of one training batch through the package, as a table of contents: `python tests/walk.py`.

It traces one optimiser step of `MetricLearner` with `ContrastiveLoss` and a FIFO `MemoryCallback` on a CPU: the
callback's hooks, `training_step`, and backward. Each function of the package stands once, where it is first called,
indented below its caller. The network is a plain `nn.Sequential` of the user's own, so no network of the package
counts. Lambdas and comprehensions are not counted: Python 3.12 and later run a comprehension inside its function.
"""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_memdml
from lightning_memdml import ContrastiveLoss, MemoryCallback, MetricLearner

PACKAGE = Path(lightning_memdml.__file__).parent
TRACED_BATCH = 3  # the memory has rows by then
DIM = 32  # below the width from which bfloat16 products pay: the way is the same on every processor


class Step(NamedTuple):
    """One function on the way.

    Attributes:
        depth: How many functions of the package are around it.
        file: Its file, relative to the package.
        line: Where it is defined.
        name: Its name, with its class.
        summary: The first line of its docstring.
    """

    depth: int
    file: str
    line: int
    name: str
    summary: str


class Recorder(Callback):
    """Records the functions of the package that run between two hooks. One stands before `MemoryCallback`, one after.

    Both share the list of steps; the first starts the recording, the second ends it.
    """

    def __init__(self, steps: dict[CodeType, Step], starts: bool) -> None:
        self.steps, self.starts, self.depth = steps, starts, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.starts and batch_idx == TRACED_BATCH:
            sys.setprofile(self.record)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.starts:
            sys.setprofile(None)

    def record(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        file = Path(code.co_filename)
        if event not in ("call", "return") or code.co_name.startswith("<") or not file.is_relative_to(PACKAGE):
            return
        if event == "return":
            self.depth = max(0, self.depth - 1)
            return
        if code not in self.steps:
            name = f"{owner_of(frame)}{code.co_name}"
            summary = inspect.cleandoc(code.co_consts[0]).splitlines()[0] if has_docstring(code) else ""
            step = Step(self.depth, str(file.relative_to(PACKAGE)), code.co_firstlineno, name, summary)
            self.steps[code] = step
        self.depth += 1


def has_docstring(code: CodeType) -> bool:
    """Whether a function has a docstring, which is then its first constant."""
    return bool(code.co_consts) and isinstance(code.co_consts[0], str) and " " in code.co_consts[0]


def owner_of(frame: FrameType) -> str:
    """Return the class that defines a method, and a dot; nothing for a function. (Python 3.10 has no `co_qualname`.)"""
    own = frame.f_locals.get("self")
    for kind in type(own).__mro__ if own is not None else ():
        member = inspect.unwrap(vars(kind).get(frame.f_code.co_name, None) or object)
        member = member.fget if isinstance(member, property) else member
        if getattr(member, "__code__", None) is frame.f_code:
            return f"{kind.__name__}."
    return ""


def walk() -> list[Step]:
    """Train a few steps and return the functions of the package that the last one runs, in the order of their call."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 16))
    learner = MetricLearner(backbone, ContrastiveLoss(), embedding_dim=DIM, num_features=16)
    batches = TensorDataset(torch.randn(64, 1, 8, 8), torch.arange(64) // 4 % 8, torch.arange(64))
    steps: dict[CodeType, Step] = {}
    trainer = Trainer(
        accelerator="cpu", max_steps=TRACED_BATCH + 1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Recorder(steps, starts=True), MemoryCallback(size=64), Recorder(steps, starts=False)],
    )  # fmt: skip
    try:
        trainer.fit(learner, DataLoader(batches, batch_size=16))
    finally:
        sys.setprofile(None)
    return list(steps.values())


def main() -> None:
    """Print the way, and how many functions in how many files it enters."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    steps = walk()
    for step in steps:
        print(f"{'  ' * step.depth + step.name:<58} {step.file}:{step.line:<4}  {step.summary}"[:180])
    print(f"\n{len(steps)} functions in {len({step.file for step in steps})} files:")
    for file in dict.fromkeys(step.file for step in steps):
        print(f"{sum(step.file == file for step in steps):4} {file}")


if __name__ == "__main__":
    main()
