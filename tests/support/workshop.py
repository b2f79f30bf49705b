"""Pictures of eight colours, and the command line that trains on them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = ["red", "orange", "gold", "green", "teal", "blue", "purple", "gray"]
NET = "--model.backbone=SmallConvNet --model.backbone.in_channels=3 --model.backbone.width=4 --model.embedding_dim=8"
DATA = "--data=FolderDataModule --data.root=pictures --data.image_size=28 --data.num_workers=0 --data.batch_size=8"
RUN = "--trainer.accelerator=cpu --trainer.max_steps=2 --trainer.enable_progress_bar=false --data.val_fraction=0"
FIT = f"fit {NET} --model.loss=ContrastiveLoss {DATA} {RUN}"
LAST = "runs/memdml/version_0/checkpoints/last.ckpt"


def draw(path: Path, colour: str, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", (40 + number, 36), colour)
    ImageDraw.Draw(picture).ellipse((2 * number, 3, 2 * number + 12, 15 + number), fill="white")
    picture.save(path)
