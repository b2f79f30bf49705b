"""What a dry run of a study on photographs costs: it opens one of them, and fits no head."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.studies import Write

from lightning_memdml import MemoryCallback
from lightning_memdml.cli import main
from lightning_memdml.data import images
from lightning_memdml.study import probing

MEMORY = {
    "trainer": {
        "callbacks": [{"class_path": "MemoryCallback", "init_args": {"size": 1.0, "start_step": 50, "prefill": True}}]
    }
}


@pytest.fixture
def photographs(tmp_path: Path) -> dict[str, Any]:
    """The changes of a base configuration for 12 classes of 3 photographs."""
    for label in range(12):
        for number in range(3):
            file = tmp_path / f"pictures/{label}/{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), (20 * label, 80 * number, 9)).save(file)
    options = {"root": str(tmp_path / "pictures"), "image_size": 28, "num_workers": 0, "batch_size": 8}
    return {
        "trainer": {"max_steps": 1000, "val_check_interval": 1000},
        "model": {"backbone": {"init_args": {"in_channels": 3}}, "head_init": "whitening"},
        "data": {"class_path": "FolderDataModule", "init_args": {**options, "images_per_class": 2}},
    }


@pytest.mark.filterwarnings("error")  # a probe shorter than `start_step` is no news
def test_a_dry_run_opens_one_photograph(
    write: Write, photographs: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, filled, open_file = [], [], images.OpenFiles.__call__

    def counted(self: Any, row: int) -> Any:
        opened.append((id(self), row))
        return open_file(self, row)

    monkeypatch.setattr(images.OpenFiles, "__call__", counted)
    monkeypatch.setattr(MemoryCallback, "_fill", lambda *arguments: filled.append(arguments))
    file = write(arms={"batch": photographs, "memory": [photographs, MEMORY]}, claims={}, seeds=[0, 1])
    main(["study", str(file), "--output", "out", "--dry_run"])
    said = capsys.readouterr().out
    assert len({row for _, row in opened}) == 1, "that of the first row"
    assert len(opened) == 2 * probing.OPENINGS, "for each arm"
    assert not filled, "a memory that is filled first would open as many images as it has rows"
    costs = [float(cost) for cost in re.findall(r"^test +(\d+\.\d) s ", said, re.MULTILINE)]
    assert len(costs) == 4
    assert all(0.5 < cost < 1000 for cost in costs), "1000 steps of some milliseconds"
    assert "not the features to which a head is fitted" in said


def test_the_estimate_counts_the_time_to_open_images(photographs: dict[str, Any], monkeypatch: Any) -> None:
    from lightning_memdml import ContrastiveLoss, FolderDataModule, MetricLearner, SmallConvNet

    clock = iter([0.0, 9.0, 9.0, 9.25, 10.0, 10.5])  # 9 s, as from a disk that sleeps, then 250 and 500 ms
    options = {**photographs["data"]["init_args"], "val_fraction": 0}
    for workers, expected in ((0, 250 * 8), (2, 0)):
        data = FolderDataModule(**{**options, "num_workers": workers})
        data.setup()
        learner = MetricLearner(SmallConvNet(3, 4), ContrastiveLoss(), head_init="whitening")
        trainer = type("Trainer", (), {"callbacks": [MemoryCallback(size=8, start_step=9, prefill=True)]})
        if workers == 0:
            monkeypatch.setattr(probing.time, "perf_counter", lambda: next(clock))
        assert probing.prepare_probe(trainer, learner, data) == expected
        monkeypatch.undo()
        assert (trainer.callbacks[0].start_step, trainer.callbacks[0].prefill) == (0, False)
        assert learner.head_init == "default"
        first, last = data.train_set[0], data.train_set[len(data.train_set) - 1]
        assert first[1] != last[1], "labels stay"
        assert data.train_set.open(0) == data.train_set.open(5)
