"""A memory class of a user's own in `MemoryCallback(memory=...)`: in Python, from YAML, and resumed.

Ways in which adding a memory kind to the package touches two files, the class and its test: `MemoryCallback`,
`MetricLearner`, the losses, the command line and the report use the interface `Memory` only; `lightning_memdml/memory`
exports what others import from it.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_memdml import ContrastiveLoss, MemoryCallback, MetricLearner
from lightning_memdml.cli import main
from lightning_memdml.memory import Memory

# One row per class, from nothing but the interface; and the same memory as one line over the table of the package.
SOURCE = '''
import torch
from torch.nn.functional import normalize

from lightning_memdml.memory import EmbeddingMemory, Memory, MemoryRows


class NewestPerClass(Memory):
    def __init__(self, size: int = 100):
        self.size = size
        self.reset()

    def reset(self):
        self.rows = {}

    def enqueue(self, embeddings, labels, indices=None, *, step=None):
        for z, y in zip(normalize(embeddings.detach().float()), labels.tolist()):
            self.rows[y] = z.clone()
        return 0

    def read(self):
        rows = torch.stack(list(self.rows.values())) if self.rows else torch.zeros(0, 0)
        labels = torch.tensor(list(self.rows), dtype=torch.int64)
        return MemoryRows(rows, labels, torch.full_like(labels, -1))

    def __len__(self):
        return len(self.rows)

    @property
    def nbytes(self):
        return sum(row.nbytes for row in self.rows.values())

    def to(self, device):
        return self

    def state_dict(self):
        return {"labels": torch.tensor(list(self.rows), dtype=torch.int64), "rows": self.read()[0]}

    def load_state_dict(self, state):
        self.rows = dict(zip(state["labels"].tolist(), state["rows"]))


class PlainTuples(NewestPerClass):
    """Returns three tensors, as in `embeddings, labels, indices = memory.read()`."""

    def read(self):
        return tuple(super().read())


class Longer(EmbeddingMemory):
    """Stands on the memory of the package."""

    def __init__(self, factor: int = 2):
        super().__init__(size=20 * factor)
'''
NAMES = ("NewestPerClass", "PlainTuples", "Longer")


@pytest.fixture(name="own")
def _own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "my_memory.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_memory", raising=False)
    yield importlib.import_module("my_memory")
    sys.modules.pop("my_memory", None)


class Flat(torch.nn.Module):
    num_features = 4

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def train(memory: Memory | None, epochs: int, path: Path | None = None, ckpt: Path | None = None) -> MetricLearner:
    torch.manual_seed(0)
    learner = MetricLearner(Flat(), ContrastiveLoss(margin=0.2), embedding_dim=6)
    images = TensorDataset(torch.randn(16, 1, 2, 2, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 5)
    callbacks = [] if memory is None else [MemoryCallback(memory=memory)]
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(learner, DataLoader(images, batch_size=4), ckpt_path=ckpt, weights_only=True)
    if path is not None:
        trainer.save_checkpoint(path)
    return learner


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_and_resumes_in_python(own: Any, tmp_path: Path, name: str) -> None:
    kind = getattr(own, name)
    whole, parts, memory = train(kind(), 3), train(kind(), 1, path=tmp_path / "one.ckpt"), kind()
    assert not torch.equal(parts.model.head.weight, whole.model.head.weight)
    resumed = train(memory, 3, ckpt=tmp_path / "one.ckpt")
    assert torch.equal(resumed.model.head.weight, whole.model.head.weight)
    assert not torch.equal(whole.model.head.weight, train(None, 3).model.head.weight), "the memory has an effect"
    assert len(memory) == (40 if name == "Longer" else 5)


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_and_resumes_from_yaml(own: Any, tmp_path: Path, run_in: Any, name: str) -> None:
    memory: Any = {"class_path": f"my_memory.{name}"}
    if name == "Longer":
        memory["init_args"] = {"factor": 1}
    config = {
        "trainer": {
            "accelerator": "cpu", "max_steps": 3, "enable_progress_bar": False, "enable_model_summary": False,
            "callbacks": [{"class_path": "MemoryCallback", "init_args": {"memory": memory}}],
        },
        "model": {
            "backbone": {"class_path": "SmallConvNet", "init_args": {"width": 4}}, "loss": "ContrastiveLoss",
            "embedding_dim": 8,
        },
        "data": {
            "class_path": "GlyphDataModule",
            "init_args": {"num_classes": 20, "batch_size": 8, "images_per_class": 2, "num_workers": 0},
        },
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with run_in(tmp_path):
        main(["fit", "--config", "config.yaml"])
        (first,) = tmp_path.glob("runs/**/last.ckpt")
        main(["fit", "--config", "config.yaml", "--trainer.max_steps=5", "--ckpt_path", str(first)])
        (second,) = set(tmp_path.glob("runs/**/last.ckpt")) - {first}
    states = [torch.load(path, weights_only=True)["callbacks"]["MemoryCallback"]["memory"] for path in (first, second)]
    if name == "Longer":
        assert [state["batches"] for state in states] == [3, 5]
    assert set(states[0]["labels"].tolist()) <= set(states[1]["labels"].tolist()) or name == "Longer"


def test_a_class_that_lacks_a_method_names_it() -> None:
    class Half(Memory):
        size = 3

        def enqueue(self, *args: Any, **kwargs: Any) -> int:
            return 0

    with pytest.raises(TypeError, match=r"Half.*abstract method.*load_state_dict"):
        Half()
    with pytest.raises(TypeError, match=r"Expected `memory` to be a Memory but got list\. Derive its class from"):
        MemoryCallback(memory=[])
