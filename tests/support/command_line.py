"""The options of a short training on the command line, and its answer to a mistake."""

from __future__ import annotations

from collections.abc import Callable

import pytest

NET = "--model.backbone=SmallConvNet --model.backbone.width=4 --model.embedding_dim=8"
LOSS = "--model.loss=ContrastiveLoss --model.memory_loss=ContrastiveLoss --model.memory_loss.margin=0.7"
MEMORY = "--trainer.callbacks+=MemoryCallback --trainer.callbacks.size=40"
DATA = "--data.num_classes=20 --data.batch_size=8 --data.images_per_class=2 --data.batches_per_epoch=3"
QUIET = "--trainer.accelerator=cpu --trainer.enable_progress_bar=false --trainer.log_every_n_steps=1"
TINY = f"fit {NET} {LOSS} {MEMORY} {DATA} {QUIET} --trainer.max_epochs=1 --seed_everything=3"

Command = Callable[[str], None]


def answer(memdml: Command, line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail, and return its error."""
    with pytest.raises(SystemExit) as stop:
        memdml(line)
    said = capsys.readouterr().err
    assert stop.value.code not in (0, None)
    assert "Traceback" not in said
    return said if isinstance(stop.value.code, int) else str(stop.value.code)
