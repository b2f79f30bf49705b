"""The recipe for photographs, from the command line: on a table, tested, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lightning_memdml.cli import main

SMALL = (
    "--model.backbone SmallConvNet --model.backbone.in_channels 3 --model.backbone.width 4 --model.backbone.pool 1 "
    "--data.image_size 33 --data.batch_size 8 --data.images_per_class 2 --data.num_workers 0 --trainer.accelerator cpu "
    "--trainer.enable_progress_bar false"
)


def table_of_photographs(folder: Path) -> Path:
    """Twelve classes of four pictures; paths are relative to the folder of the table."""
    generator = torch.Generator().manual_seed(0)
    lines = ["path,label"]
    for number in range(48):
        pixels = (torch.rand(36, 36, 3, generator=generator) * 80 + 14 * (number // 4)).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(f"{number}.png,class{number // 4:02d}")
    (folder / "table.csv").write_text("\n".join(lines))
    return folder / "table.csv"


def state_of(checkpoint: Path) -> tuple[int, dict[str, Any], dict[str, Any]]:
    saved = torch.load(checkpoint, weights_only=True)
    (choice,) = (state for name, state in saved["callbacks"].items() if name.startswith("MemoryChoice"))
    return saved["global_step"], choice, saved["state_dict"]


@pytest.mark.filterwarnings("ignore:Expected `start_step` below the")
def test_a_table_is_trained_on_tested_and_resumed(
    run_in: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = table_of_photographs(tmp_path)
    data = ["--data", "TableDataModule", "--data.path", str(table)]
    with run_in(tmp_path), caplog.at_level("INFO"):
        main(
            [
                "fit",
                "--config",
                "photos",
                *data,
                *SMALL.split(),
                "--trainer.max_steps=20",
                "--trainer.callbacks.steps=10",
            ]
        )
        assert caplog.text.count("Memory term          MAP@R % of validation classes") == 1
        (last,) = tmp_path.rglob("last.ckpt")
        steps, choice, _ = state_of(last)
        assert steps == 20
        assert len(choice["scores"]) == 4
        assert choice["chosen"] in choice["scores"]
        main(["test", "--ckpt_path", str(last), "--trainer.logger", "false"])
        main(["fit", "--ckpt_path", str(last), "--trainer.max_steps=22"])
        assert caplog.text.count("Memory term          MAP@R % of validation classes") == 1
        resumed = max(tmp_path.rglob("last.ckpt"), key=lambda file: file.stat().st_mtime)
        assert resumed != last
        steps, again, _ = state_of(resumed)
        assert (steps, again) == (22, choice)
