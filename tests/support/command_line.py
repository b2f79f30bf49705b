"""The options of a short training on the command line."""

from __future__ import annotations

from collections.abc import Callable

NET = "--model.backbone=SmallConvNet --model.backbone.width=4 --model.embedding_dim=8"
LOSS = "--model.loss=ContrastiveLoss --model.memory_loss=ContrastiveLoss --model.memory_loss.margin=0.7"
MEMORY = "--trainer.callbacks+=MemoryCallback --trainer.callbacks.size=40"
DATA = "--data.num_classes=20 --data.batch_size=8 --data.images_per_class=2 --data.batches_per_epoch=3"
QUIET = "--trainer.accelerator=cpu --trainer.enable_progress_bar=false --trainer.log_every_n_steps=1"
TINY = f"fit {NET} {LOSS} {MEMORY} {DATA} {QUIET} --trainer.max_epochs=1 --seed_everything=3"

Command = Callable[[str], None]
