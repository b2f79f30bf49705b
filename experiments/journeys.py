r"""Five ways to the first number and the first picture, from an installed wheel in an empty folder.

A folder of photographs, a table, a LightningModule, a loss of pytorch-metric-learning, and a network of timm. Each is
run as a newcomer would: the commands of the documentation, in a folder that holds nothing but the pictures. Printed are
the commands, the lines of code, and the seconds to the first score and to the first picture.

Command: python experiments/journeys.py --wheel dist/lightning_memdml-0.1.0-py3-none-any.whl --archive birds.npz \
    --weights mobilenet_v2.pth
Hardware: 2 CPU cores, about 6 minutes. Expected: the first number of the folder within 60 seconds.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES, IMAGES = 24, 18
NUMBER = re.compile(r"Recall@1[^0-9]*[0-9.]+|recall_at_1[^0-9]*[0-9.]+")
PICTURES = (".png", ".html")
LAST = "runs/latest/checkpoints/last.ckpt"
SHORT = "--trainer.max_steps 30 --trainer.callbacks.steps 0"

LIGHTNING_MODULE = """
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer, seed_everything
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from lightning_memdml import ContrastiveLoss, MemoryCallback, SmallConvNet, against_memory
from lightning_memdml.retrieval import rank_queries, save_map


class Retrieval(LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.loss = SmallConvNet(in_channels=3), ContrastiveLoss(margin=0.5)

    def training_step(self, batch, batch_idx):
        x, y = batch
        z = F.normalize(self.net(x), dim=1)
        return self.loss(z, y) + against_memory(self, self.loss, z, y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


seed_everything(0)
to_tensor = v2.Compose([v2.Resize((48, 48)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
images = ImageFolder("pictures", to_tensor)
loader = torch.utils.data.DataLoader(images, batch_size=32, shuffle=True)
module = Retrieval()
Trainer(max_steps=30, accelerator="cpu", callbacks=[MemoryCallback(size=256)], logger=False).fit(module, loader)
x, labels = torch.stack([image for image, _ in images]), torch.tensor(images.targets)
with torch.no_grad():
    embeddings = F.normalize(module.eval().net(x), dim=1)
print(rank_queries(embeddings, labels).scores(k=(1,)))
save_map("map.png", embeddings, labels)
"""

METRIC_LEARNING = """
import torch
from lightning import Trainer, seed_everything
from lightning_memdml import ContrastiveLoss, FolderDataModule, MemoryCallback, MetricLearner, SmallConvNet
from lightning_memdml.retrieval import retrieval_examples, save_gallery
from pytorch_metric_learning import losses

seed_everything(0)
data = FolderDataModule("pictures", image_size=48, batch_size=32)
learner = MetricLearner(
    SmallConvNet(in_channels=3), loss=losses.TripletMarginLoss(), memory_loss=losses.ContrastiveLoss()
)
trainer = Trainer(max_steps=30, accelerator="cpu", callbacks=[MemoryCallback(size=256)], logger=False)
trainer.fit(learner, data)
trainer.test(learner, data)
embeddings = learner.embed([data.query_set.picture(row) for row in range(len(data.query_set))])
examples = retrieval_examples(embeddings, data.query_set.labels)
save_gallery("gallery.png", examples, data.query_set.picture)
"""


@dataclass
class Journey:
    """What a newcomer does, and what was measured of it.

    Attributes:
        name: What the newcomer has.
        commands: Command lines.
        programs: File name -> Python code.
        first: Seconds to the first `number` and `picture`.
        failed: The command that failed, and its last line.
    """

    name: str
    commands: list[str]
    programs: dict[str, str] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    failed: str = ""

    @property
    def lines(self) -> int:
        """Lines of code, without empty ones."""
        return sum(bool(line.strip()) for program in self.programs.values() for line in program.splitlines())


def journeys(weights: Path | None) -> Iterator[Journey]:
    """Yield the five journeys."""
    start = "" if weights is None else f" --model.weights {weights}"
    trained = f"--config photos{start} {SHORT}"
    seen = [f"memdml index --ckpt_path {LAST}", "memdml search pictures/{class}/0.jpg --html found.html"]
    yield Journey("folder", [f"memdml fit {trained} --data.root pictures", *seen])
    columns = '"{path: image, label: bird}"'
    yield Journey(
        "table", [f"memdml fit {trained} --data TableDataModule --data.path table.csv --data.columns {columns}", *seen]
    )
    yield Journey("LightningModule", ["python module.py"], {"module.py": LIGHTNING_MODULE})
    yield Journey("pytorch-metric-learning", ["python metric.py"], {"metric.py": METRIC_LEARNING})
    yield Journey(
        "timm",
        [
            "memdml fit --model.backbone timm:mobilenetv3_small_050 --model.loss ContrastiveLoss "
            "--data FolderDataModule --data.root pictures --data.image_size 64 --data.batch_size 32 "
            "--trainer.max_steps 20",
            *seen,
        ],
    )


def write_pictures(folder: Path, archive: Path | None) -> str:
    """Write 432 pictures of 24 classes, a table of them, and return the name of the last class."""
    rows = []
    if archive is None:
        generator = np.random.default_rng(0)
        colours = generator.integers(0, 255, (CLASSES, 4, 5, 3))
        for label in range(CLASSES):
            for number in range(IMAGES):
                noisy = (colours[label] + generator.normal(0, 40, (4, 5, 3))).clip(0, 255).astype(np.uint8)
                path = folder / f"pictures/{label:02}/{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(noisy).resize((180, 150)).save(path)
                rows.append((path.relative_to(folder), label))
    else:
        packed = np.load(archive)
        jpeg, offset, labels = packed["jpeg"], packed["offset"], packed["label"]
        for label in range(CLASSES):
            for number, row in enumerate(np.flatnonzero(labels == label)[:IMAGES]):
                path = folder / f"pictures/{label:02}/{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(jpeg[offset[row] : offset[row + 1]].tobytes())
                rows.append((path.relative_to(folder), label))
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "bird"), *rows])
    return f"{CLASSES - 1:02}"


def walk(journey: Journey, folder: Path, last_class: str, environment: dict[str, str]) -> None:
    """Run the commands of a journey, and note when the first number and the first picture are there."""
    for name, program in journey.programs.items():
        (folder / name).write_text(program.strip() + "\n")
    before = time.monotonic()
    for command in journey.commands:
        line = command.replace("{class}", last_class)
        runs = re.sub(r"^memdml", f"{sys.executable} -m lightning_memdml", re.sub("^python", sys.executable, line))
        running = subprocess.Popen(
            runs, shell=True, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert running.stdout is not None
        last_line = ""
        for printed in running.stdout:
            last_line = printed.strip() or last_line
            if NUMBER.search(printed):
                journey.first.setdefault("number", time.monotonic() - before)
        running.wait()
        written = [path for path in folder.rglob("*") if path.suffix in PICTURES]
        if written:
            oldest = min(path.stat().st_mtime for path in written)
            journey.first.setdefault("picture", oldest - (time.time() - (time.monotonic() - before)))
        if running.returncode:
            journey.failed = f"{line}: {last_line}"
            return


def main() -> None:
    """Run the journeys, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--wheel", type=Path, help="Install this wheel into a folder of its own; else what is installed."
    )
    parser.add_argument("--archive", type=Path, help="A .npz of JPEG files as TableDataModule reads it; else drawn.")
    parser.add_argument("--weights", type=Path, help="Weights of MobileNetV2; else random ones.")
    parser.add_argument("--only", nargs="*", help="Names of journeys.")
    given = parser.parse_args()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as place:
        if given.wheel is not None:
            target = f"{place}/installed"
            options = ["--quiet", "--no-deps", "--no-index", "--target", target, str(given.wheel)]
            subprocess.run([sys.executable, "-m", "pip", "install", *options], check=True)
            environment["PYTHONPATH"] = target
        print("| journey | commands | lines of code | seconds to the first number | to the first picture |")
        print("|---|---|---|---|---|")
        for journey in journeys(given.weights and given.weights.resolve()):
            if given.only and journey.name not in given.only:
                continue
            folder = Path(place, journey.name)
            folder.mkdir()
            walk(journey, folder, write_pictures(folder, given.archive), environment)
            times = (
                f"{journey.first[name]:.0f}" if name in journey.first else "none" for name in ("number", "picture")
            )
            cells = (journey.name, str(len(journey.commands)), str(journey.lines), *times)
            print(f"| {' | '.join(cells)} |", flush=True)
            if journey.failed:
                print(f"Failed: {journey.failed}", flush=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
