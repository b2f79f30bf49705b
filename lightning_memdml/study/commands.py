"""`memdml weight-curves`: the weights of any loss, or of a trained checkpoint, as a picture and tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from lightning import LightningDataModule
from torch import Tensor

from lightning_memdml.cli_messages import ArgumentParser
from lightning_memdml.curves import LossInputs, Reading, read_weights, save_readings
from lightning_memdml.data import GlyphDataModule
from lightning_memdml.learner import MetricLearner
from lightning_memdml.losses import PairLoss
from lightning_memdml.runs import config_of, read_checkpoint
from lightning_memdml.trust import build

DESCRIPTION = """\
Draw the weight that a loss gives a pair of each similarity, and write the numbers beside the picture.

  memdml weight-curves --loss DirectWeightLoss --loss.negative Power --loss.negative.threshold 0.5
  memdml weight-curves --loss+ ContrastiveLoss --loss.margin 0.6 --loss+ MultiSimilarityLoss
  memdml weight-curves --ckpt_path runs/latest/checkpoints/last.ckpt

If the weight depends on the similarity alone, the curve is exact. Otherwise it is measured: with a checkpoint on a
training batch against its memory, without one on characters that are compared pixel by pixel."""
PIXEL_BATCHES = 32  # that stand for a memory where there is none


def weight_curves(arguments: list[str]) -> None:
    """Run `memdml weight-curves` with what follows it on the command line."""
    auto_cli(
        draw_weight_curves,
        args=arguments,
        as_positional=False,
        parser_class=ArgumentParser,
        prog="memdml weight-curves",
        description=DESCRIPTION,
    )


def draw_weight_curves(
    loss: PairLoss | list[PairLoss] | None = None,
    ckpt_path: str | None = None,
    data: LightningDataModule | None = None,
    output: str = "runs/weight_curves",
    trust: bool = False,
) -> None:
    """Draw the weight that a loss gives a pair of each similarity, and write the numbers beside the picture.

    If the weight depends on the similarity alone, the curve is exact. Otherwise it is measured: with a checkpoint on a
    training batch against its memory, without one on characters that are compared pixel by pixel.

    Args:
        loss: A loss, or several that are drawn over each other: `--loss+ A --loss+ B`, or a list in YAML. By default
            those of the checkpoint, in the batch and against the memory.
        ckpt_path: A checkpoint of `memdml fit`. A training batch of its data is embedded with its network, and
            compared with the memory in the checkpoint.
        data: Where the images come from; by default the data of the checkpoint, or glyphs without one.
        output: Folder for the picture and the tables.
        trust: Let the checkpoint build and run whatever it names: only if you trust its author.

    Raises:
        ValueError: If there is neither a loss nor a checkpoint, or one of them cannot be used.
    """
    losses = loss if isinstance(loss, list) else [loss] if loss is not None else []
    if ckpt_path is not None:
        pictures = _read_checkpoint(ckpt_path, losses, data, trust)
    elif losses:
        pictures = {_name(losses): _read_losses(losses, data)}
    else:
        raise ValueError(
            "Expected a loss or a checkpoint but got neither. Pass `--loss ContrastiveLoss`, or `--ckpt_path FILE`."
        )
    for name, readings in pictures.items():
        for reading in readings:
            print(_in_words(reading))
        for path in save_readings(readings, output, name):
            print(f"    {path}")


def _name(losses: list[PairLoss]) -> str:
    return "_".join(type(loss).__name__ for loss in losses)


def _in_words(reading: Reading) -> str:
    positive, negative = ("exact" if side.curve else "measured" for side in (reading.positive, reading.negative))
    return f"{reading.loss}: weights of positives {positive}, of negatives {negative}"


def _read_losses(losses: list[PairLoss], data: LightningDataModule | None) -> list[Reading]:
    """Read losses by themselves; pairs are made only where a loss needs them, or data was given."""
    readings = [read_weights(loss) for loss in losses]
    if data is None and all(reading.is_exact for reading in readings):
        return readings
    pairs = _pixel_pairs(GlyphDataModule() if data is None else data)
    return [read_weights(loss, pairs) for loss in losses]


def _pixel_pairs(data: LightningDataModule) -> LossInputs:
    """Compare a training batch with batches before it, centred pixels being the embeddings."""
    columns = _training_batches(data, 1 + PIXEL_BATCHES)
    size = len(columns[0][-1])
    pixels, *facts = (torch.cat(column) for column in columns)
    rows = [F.normalize((pixels - pixels.mean(dim=0)).flatten(1)), *facts]
    return _pairs([column[-size:] for column in rows], [column[:-size] for column in rows])


def _read_checkpoint(
    path: str, losses: list[PairLoss], data: LightningDataModule | None, trust: bool
) -> dict[str, list[Reading]]:
    """Read the losses of a checkpoint, or others, on a batch and the memory of the checkpoint."""
    checkpoint = read_checkpoint(path)
    config = config_of(checkpoint, path, trust=trust)
    if config is None or "data" not in config:
        raise ValueError(
            f"Expected a checkpoint of `memdml fit`, which holds its configuration, but {path} has none. In a program, "
            "pass `Trainer(callbacks=[WeightCurveLogger()])`, or embeddings to `lightning_memdml.curves.read_weights`."
        )
    if data is None:
        data = build(LightningDataModule, config["data"])
    learner = MetricLearner.load_from_checkpoint(path, map_location="cpu", trust=trust)
    batch, memory = _embed(learner, data), _memory_of(checkpoint)
    if losses:
        pairs = _pairs(batch, memory)
        return {f"{_name(losses)}_{'memory' if memory else 'batch'}": [read_weights(loss, pairs) for loss in losses]}
    trained: list[Any] = [learner.loss, learner.memory_loss or learner.loss]
    pictures = {"batch": [read_weights(trained[0], _pairs(batch))]}
    if memory:
        pictures["memory"] = [read_weights(trained[1], _pairs(batch, memory))]
    return pictures


@torch.no_grad()
def _embed(learner: MetricLearner, data: LightningDataModule) -> list[Tensor]:
    """Return embeddings, labels and, if there are any, indices of a batch, as a step of the training makes them."""
    images, *facts = (column[0] for column in _training_batches(data, 1))
    return [learner.train()(images), *facts]


def _training_batches(data: LightningDataModule, number: int) -> list[tuple[Tensor, ...]]:
    """Return the first batches of the training, column by column."""
    data.prepare_data()
    data.setup("fit")
    return list(zip(*islice(data.train_dataloader(), number), strict=True))


def _memory_of(checkpoint: dict[str, Any]) -> list[Tensor]:
    """Return the rows that `MemoryCallback` saved; nothing, if there are none."""
    for key, state in checkpoint["callbacks"].items():
        if key.startswith("MemoryCallback") and len(state["memory"]["labels"]):
            return [state["memory"][name] for name in ("embeddings", "labels", "indices")]
    return []


def _pairs(batch: Sequence[Tensor], references: Sequence[Tensor] = ()) -> LossInputs:
    """Pair a batch with references, or with itself if there are none; each as embeddings, labels and maybe indices."""
    embeddings, labels, *indices = batch
    if not references or not len(references[0]):
        return LossInputs(embeddings, labels, indices=indices[0] if indices else None)
    ref_embeddings, ref_labels, *ref_indices = references
    both = (indices[0], ref_indices[0]) if indices and ref_indices else (None, None)
    return LossInputs(embeddings, labels, ref_embeddings, ref_labels, *both)
