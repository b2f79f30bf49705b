"""Fine-tunes a whole pretrained network on photographs, with and without a memory, and scores unseen classes.

Arms: the frozen features, the features whitened in closed form, and four trainings that start from the same fitted
head: the contrastive loss in the batch, Multi-Similarity in the batch, contrastive with a memory, and contrastive with
a memory that a momentum encoder writes.

Every trained arm gets the same number of tries on validation classes (every second training class, one seed, half of
the steps): three learning rates of the backbone at the arm's first settings, then the arm's other settings at the best
rate. The best try by MAP@R trains on all training classes, once per seed, and is scored on the test classes: the
second half of the classes, or those that the folders or the column `split` name. Nothing else sees them. Two more arms
have no tries: the settings of `--config photos`, with and without its memory.

Command, with any photographs and any network of torchvision (a `.npz`, a table or a folder):

    python experiments/photos/fine_tuning.py --data mine=my/images --backbone mobilenet_v2 --weights DEFAULT
    python experiments/photos/report.py runs/photos/runs.jsonl

The published numbers are of a MobileNetV1 of width 0.25, a class in a file on PYTHONPATH:

    python experiments/photos/fine_tuning.py --data birds=birds.npz groceries=grocery.npz --num_features 256 \
        --backbone mobilenet_v1_025:MobileNetV1Quarter --weights mobilenet_v1_025.pth

Hardware: one CPU core. Cost: 56 tries of 300 steps and 60 runs of 600 steps; 0.07 s a step for MobileNetV1, so about
90 minutes of an otherwise idle core. A run that was killed is repeated, finished ones are kept: one line each in
`runs/photos/runs.jsonl`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_memdml import ContrastiveLoss, DirectWeightLoss, MemoryCallback, MetricLearner, MultiSimilarityLoss
from lightning_memdml.data import FolderDataModule, RetrievalDataModule, TableDataModule
from lightning_memdml.data.transforms import TrainingTransform
from lightning_memdml.losses import Threshold
from lightning_memdml.reference_scores import score_after_training, score_before_training

Settings = dict[str, Any]
RATES = ({"rate": 3e-4}, {"rate": 1e-4}, {"rate": 1e-3})
MEMORY_TRIES = (
    {"mass": "sides"},  # the weights of each side of an anchor sum to 1
    {"weight": 0.3},
    {"margin": 0.7, "memory_margin": 0.8},
    {"mass": "sides", "weight": 3.0},
)
# The first settings of every arm, and what is tried after the learning rates.
ARMS: dict[str, tuple[Settings, tuple[Settings, ...]]] = {
    "batch": ({"margin": 0.5}, ({"margin": 0.3}, {"margin": 0.4}, {"margin": 0.6}, {"margin": 0.7})),
    "multi_similarity": (
        {"beta": 50.0, "base": 0.5},
        ({"base": 0.3}, {"base": 0.7}, {"beta": 25.0}, {"epsilon": None}),
    ),
    "memory": ({"margin": 0.5, "memory_margin": 0.7, "mass": "sum", "weight": 1.0}, MEMORY_TRIES),
    "memory_momentum": (
        {"margin": 0.5, "memory_margin": 0.7, "mass": "sum", "weight": 1.0, "momentum": 0.9},
        MEMORY_TRIES,
    ),
}
# `--config photos` as it is, without a search, and the same without its memory.
RECIPE: dict[str, Settings] = {
    "photos": {"margin": 0.5, "memory_margin": 0.7, "mass": "sum", "weight": 1.0, "rate": 1e-4},
    "photos_without_memory": {"margin": 0.5, "rate": 1e-4},
}
SEARCH_SEED = 100


class Curve(Callback):
    """Scores the network on the evaluation classes at some steps, the last one among them."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps
        self.scores: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Score after the steps that are wanted."""
        if trainer.global_step in self.steps:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            self.scores[trainer.global_step] = score_after_training(pl_module.model, data, pl_module.device)


def make_data(path: str, stage: str, seed: int, image_size: int) -> RetrievalDataModule:
    """Return the data of a search, half of whose training classes are validation classes, or of a test."""
    kind = TableDataModule if Path(path).suffix in (".npz", ".csv", ".parquet") else FolderDataModule
    data = kind(
        path,
        batch_size=32,
        images_per_class=4,
        image_size=image_size,
        num_workers=0,
        seed=seed,
        val_fraction=0.5 if stage == "search" else 0,
        train_transform=TrainingTransform(image_size, min_scale=0.4),
    )
    data.setup("fit")
    return data


def make_learner(settings: Settings, steps: int, options: argparse.Namespace) -> MetricLearner:
    """Return the network with the loss of an arm."""
    if settings.get("beta"):
        loss: nn.Module = MultiSimilarityLoss(
            beta=settings["beta"], base=settings["base"], epsilon=settings.get("epsilon", 0.1)
        )
    else:
        loss = ContrastiveLoss(margin=settings.get("margin", 0.5))
    memory_loss = None
    if "mass" in settings:
        margin = settings["memory_margin"]
        sides = DirectWeightLoss(negative=Threshold(margin), normalize="sum")
        memory_loss = sides if settings["mass"] == "sides" else ContrastiveLoss(margin=margin)
    backbone: Any = options.backbone
    if ":" in backbone and not backbone.startswith("timm:"):
        module, name = backbone.split(":")
        backbone = getattr(importlib.import_module(module), name)(num_classes=0)
    learner = MetricLearner(
        backbone,
        loss,
        memory_loss=memory_loss,
        memory_weight=settings.get("weight", 1.0),
        embedding_dim=128,
        weights=options.weights,
        num_features=options.num_features,
        freeze_batch_norm=True,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-4),
        backbone_lr=settings.get("rate"),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        head_init="whitening",
    )
    return learner.to(memory_format=torch.channels_last)  # a quarter less time on a CPU


def train(data: RetrievalDataModule, settings: Settings, steps: int, seed: int, options: argparse.Namespace) -> Any:
    """Train one network, and return its scores by step."""
    seed_everything(seed, verbose=False)
    learner = make_learner(settings, steps, options)
    curve = Curve({steps // 3, 2 * steps // 3, steps} if data.val_fraction == 0 else {steps})
    callbacks: list[Callback] = [curve]
    if "mass" in settings:
        callbacks.append(MemoryCallback(size=1.0, start_step=50, encoder_momentum=settings.get("momentum")))
    trainer = Trainer(
        accelerator="cpu" if options.threads else "auto",
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(learner, datamodule=data)
    return curve.scores


class Runs:
    """The finished runs, one JSON object per line of a file.

    Args:
        file: The file; it need not exist yet.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        for line in file.read_text().splitlines() if file.exists() else []:
            self.rows.append(json.loads(line))

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """Return the run with these values, or None."""
        found = (row for row in self.rows if all(row[name] == value for name, value in wanted.items()))
        return next(found, None)

    def add(self, **row: Any) -> dict[str, Any]:
        """Append a run."""
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        return row


def run_once(runs: Runs, options: argparse.Namespace, **which: Any) -> dict[str, Any]:
    """Return the row of a run, which is trained unless it is there already, for this arm or another one."""
    found = runs.find(**which)
    if found is not None:
        return found
    same = runs.find(**{name: value for name, value in which.items() if name != "arm"})
    if same is not None:
        return runs.add(**{**same, **which})
    start = time.perf_counter()
    data = make_data(options.data[which["data"]], which["stage"], which["seed"], options.image_size)
    curve = train(data, which["settings"], which["steps"], which["seed"], options)
    seconds = round(time.perf_counter() - start, 1)
    row = runs.add(**which, scores=curve[which["steps"]], curve=curve, seconds=seconds, torch=torch.__version__)
    print(*(which[name] for name in ("stage", "data", "arm", "seed", "settings")), row["scores"], seconds, flush=True)
    return row


def reference(runs: Runs, options: argparse.Namespace, data_name: str, stage: str) -> None:
    """Score the frozen features, and the features whitened on the training images."""
    if runs.find(stage=stage, data=data_name, arm="frozen"):
        return
    data = make_data(options.data[data_name], stage, 0, options.image_size)
    learner = make_learner({}, 1, options)
    scores = score_before_training(learner.model, data, torch.device("cpu")).rows
    for arm, name in (("frozen", "frozen features"), ("whitened", "frozen features, whitened")):
        runs.add(stage=stage, data=data_name, arm=arm, seed=0, steps=0, settings={}, scores=scores[name], seconds=0)


def search(runs: Runs, options: argparse.Namespace) -> dict[tuple[str, str], Settings]:
    """Try the settings of every arm on validation classes, and return the best."""
    tried: dict[tuple[str, str], list[dict[str, Any]]] = {(data, arm): [] for data in options.data for arm in ARMS}

    def best(place: tuple[str, str]) -> Settings:
        return max(tried[place], key=lambda row: row["scores"]["map_at_r"])["settings"]

    def attempt(place: tuple[str, str], settings: Settings) -> None:
        which = {"data": place[0], "arm": place[1], "seed": SEARCH_SEED, "steps": options.steps // 2}
        tried[place].append(run_once(runs, options, stage="search", settings=settings, **which))

    for data in options.data:
        reference(runs, options, data, "search")
    for rate in RATES:
        for place in tried:
            attempt(place, ARMS[place[1]][0] | rate)
    at_rate = {place: {"rate": best(place)["rate"]} for place in tried}
    for number in range(max(len(further) for _, further in ARMS.values())):
        for place in tried:
            first, further = ARMS[place[1]]
            attempt(place, first | at_rate[place] | further[number])
    return {place: best(place) for place in tried}


def named_paths(texts: list[str]) -> Iterator[tuple[str, str]]:
    """Split `NAME=PATH`."""
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals:
            raise SystemExit(f"Expected --data NAME=PATH but got {text}. Write birds=birds.npz, for example.")
        yield name, path


def main() -> None:
    """Search, then test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="NAME=PATH of a folder, a table or an .npz archive.")
    parser.add_argument("--backbone", default="mobilenet_v2", help="Name of torchvision or timm, or MODULE:CLASS.")
    parser.add_argument("--weights", required=True, help="File with a state dict, or DEFAULT for those of torchvision.")
    parser.add_argument("--num_features", type=int, help="Width of the features of MODULE:CLASS.")
    parser.add_argument("--image_size", type=int, default=129)
    parser.add_argument("--steps", type=int, default=600, help="Steps of a test run; a try of the search has half.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 0 uses a GPU if there is one.")
    parser.add_argument("--out", type=Path, default=Path("runs/photos/runs.jsonl"))
    options = parser.parse_args()
    options.data = dict(named_paths(options.data))
    if options.threads:
        torch.set_num_threads(options.threads)
    runs = Runs(options.out)
    chosen = search(runs, options)
    for data in options.data:
        reference(runs, options, data, "test")
    chosen |= {(data, arm): settings for data in options.data for arm, settings in RECIPE.items()}
    for seed in range(options.seeds):
        for (data, arm), settings in chosen.items():
            which = {"data": data, "arm": arm, "seed": seed, "steps": options.steps}
            run_once(runs, options, stage="test", settings=settings, **which)


if __name__ == "__main__":
    main()
