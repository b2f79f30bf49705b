"""The memory in a LightningModule that somebody already has: the before and the after, side by side."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

BEFORE = """
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn.functional import normalize

from lightning_memdml import ContrastiveLoss


class Shoes(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(6, 8)
        self.loss = ContrastiveLoss()

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = normalize(self.net(x))
        loss = self.loss(z, y)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


trainer = Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False)
"""

AFTER = """
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn.functional import normalize

from lightning_memdml import ContrastiveLoss, MemoryCallback


class Shoes(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(6, 8)
        self.loss = ContrastiveLoss()

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = normalize(self.net(x))
        loss = self.loss(z, y) + self.loss(z, y, *self.memory.read()[:2])
        self.log("train/loss", loss)
        return {"loss": loss, "embeddings": z, "labels": y}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


trainer = Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                  callbacks=[MemoryCallback(size=8192)])
"""

SHORTER = (
    AFTER.replace("MemoryCallback\n", "MemoryCallback, against_memory\n")
    .replace("self.loss(z, y, *self.memory.read()[:2])", "against_memory(self, self.loss, z, y)")
    .replace('{"loss": loss, "embeddings": z, "labels": y}', "loss")
)


def run(source: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(source, names)
    generator = torch.Generator().manual_seed(0)
    images = TensorDataset(torch.randn(80, 6, generator=generator), torch.arange(80) % 8)
    module, trainer = names["Shoes"](), names["trainer"]
    trainer.fit(module, DataLoader(images, batch_size=8))
    return {"weight": module.net.weight, "trainer": trainer, "loss": trainer.callback_metrics["train/loss"]}


def changed_lines(before: str, after: str) -> int:
    """Lines of `after` that `before` does not have, a statement that is broken in two counted as one."""
    before, after = (source.replace(",\n                  ", ", ") for source in (before, after))
    difference = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    assert sum(line.startswith("- ") for line in difference) == sum(line.startswith("+ ") for line in difference)
    return sum(line.startswith("+ ") for line in difference)


@pytest.mark.parametrize(("after", "lines"), [(AFTER, 4), (SHORTER, 3)], ids=["four lines", "three lines"])
def test_a_plain_module_gets_the_memory_with_so_many_changed_lines(after: str, lines: int) -> None:
    assert changed_lines(BEFORE, after) == lines
    without, with_memory = run(BEFORE), run(after)
    memory = with_memory["trainer"].callbacks[0].memory
    assert len(memory) == 160
    assert memory.read()[1].tolist() == list(range(8)) * 20
    assert with_memory["loss"] > without["loss"], "the memory term is in the loss"
    assert not torch.equal(without["weight"], with_memory["weight"])


def test_both_ways_train_the_same() -> None:
    assert torch.equal(run(AFTER)["weight"], run(SHORTER)["weight"])


def test_the_readme_shows_the_shorter_way() -> None:
    shown = (Path(__file__).parents[2] / "README.md").read_text().split("```diff")[1].split("```")[0]
    import_, loss, trainer = (line[1:].strip() for line in shown.splitlines() if line.startswith("+"))
    assert loss in SHORTER
    assert import_ == "from lightning_memdml import MemoryCallback, against_memory"
    assert trainer == "trainer = Trainer(callbacks=[MemoryCallback(size=8192)])"


@pytest.mark.parametrize(
    ("forgotten", "message"),
    [
        (
            ",\n                  callbacks=[MemoryCallback(size=8192)]",
            r"Shoes has no memory. Pass `Trainer\(callbacks=\[",
        ),
        (" + against_memory(self, self.loss, z, y)", r"add `against_memory\(self, self.loss, z, y\)` to the loss"),
    ],
    ids=["callback", "loss"],
)
def test_a_forgotten_line_is_named(forgotten: str, message: str) -> None:
    assert forgotten in SHORTER
    with pytest.raises(ValueError, match=message):
        run(SHORTER.replace(forgotten, ""))
