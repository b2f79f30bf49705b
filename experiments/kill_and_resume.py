"""Kill commands with SIGKILL at random moments, start them again as documented, and compare with an undisturbed run.

- `fit`: a training on 2 ranks with a memory and a momentum encoder, resumed by `memdml fit --ckpt_path` from its newest
  checkpoint. Weights, optimiser, rows of the memory and momentum encoder must be equal to the bit.
- `index`: `memdml index`, started again with the same arguments. The files of the index must be equal to the byte.
- `study`: `memdml study --processes 2`, started again. The scores of all runs must be equal.
- `cache`: a process that reads images through a pixel cache. Every image read afterwards must have the right pixels.

A fifth of the kills fall into the start of a command, the others into its work. They hit all of its processes, or one.
If a command ends before it is killed, its result is compared, and the next kill begins a new one. The last start of
each kind is left alone. It prints a line for each kind, and exits with 1 if a result differs.

    python experiments/kill_and_resume.py --cycles 20
    python experiments/kill_and_resume.py index cache --cycles 5 --seed 1
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image

from lightning_memdml.data.cache import PixelCache
from lightning_memdml.data.images import OpenFiles
from lightning_memdml.data.records import Record
from lightning_memdml.data.transforms import Shrink

MEMDML = [sys.executable, "-m", "lightning_memdml"]
PATIENCE = 600  # seconds after which a command counts as hanging
STEPS = 1200  # of the training, which 20 kills interrupt
TINY = """--model.backbone=SmallConvNet --model.backbone.width=4 --model.embedding_dim=8 --model.loss=ContrastiveLoss
    --data.num_classes=20 --data.batch_size=8 --data.images_per_class=2 --trainer.accelerator=cpu
    --trainer.enable_progress_bar=false""".split()  # noqa: SIM905
FIT = f"""--model.memory_loss=ContrastiveLoss --trainer.devices=2 --trainer.strategy=ddp --trainer.max_steps={STEPS}
    --trainer.max_epochs=-1 --trainer.limit_val_batches=0 --trainer.num_sanity_val_steps=0
    --trainer.callbacks+=MemoryCallback --trainer.callbacks.size=50 --trainer.callbacks.encoder_momentum=0.9
    --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.every_n_train_steps=10""".split()
STUDY = """
base: base.yaml
arms: {batch: {}, wide: {model: {embedding_dim: 16}}}
seeds: [0, 1, 2, 3, 4, 5]
"""
BASE = """
model: {backbone: {class_path: SmallConvNet, init_args: {width: 4}}, loss: {class_path: ContrastiveLoss}}
data: {class_path: GlyphDataModule, init_args: {num_classes: 20, batch_size: 8, images_per_class: 2}}
trainer: {max_steps: 150, max_epochs: -1, accelerator: cpu}
"""


class Outcome(NamedTuple):
    """What a kind of command did.

    Attributes:
        kills: How often it was killed.
        finished: How many runs were compared.
        different: What differed from the undisturbed run.
    """

    kills: int
    finished: int
    different: list[str]


class Target:
    """A command that is killed and started again in a folder.

    Args:
        folder: Where it runs.
        draw: Draws the moments.
        work: Seconds after the start of its work within which it is killed.
        cycles: How often it is killed.
        until: Time after which it is no longer killed.
    """

    def __init__(self, folder: Path, draw: random.Random, work: float, cycles: int = 0, until: float = 0) -> None:
        self.folder, self.draw, self.work, self.cycles, self.until = folder, draw, work, cycles, until
        self.kills = 0

    @property
    def is_killed(self) -> bool:
        """Whether more kills are to come."""
        return self.kills < self.cycles and time.monotonic() < self.until

    def run(self, arguments: list[str], has_begun: Callable[[], bool] | None = None) -> bool:
        """Run a command, to its end or until it is killed, and return whether it reached its end.

        Args:
            arguments: Of `memdml`.
            has_begun: Whether it is at work; without it, the command is left alone.

        Raises:
            RuntimeError: If it fails or hangs.
        """
        with (self.folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [*MEMDML, *arguments], cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        try:
            if has_begun is None:
                process.wait(PATIENCE)
            else:
                self._wait(process, has_begun)
        except subprocess.TimeoutExpired:
            if has_begun is None:
                raise RuntimeError(f"{arguments} hangs") from None
        ended = process.poll() is not None
        if not ended:
            self._kill(process)
            self.kills += 1
        if ended and process.returncode:
            raise RuntimeError(f"{arguments} failed:\n{(self.folder / 'log.txt').read_text()[-3000:]}")
        return ended

    def _wait(self, process: subprocess.Popen[bytes], has_begun: Callable[[], bool]) -> None:
        if self.draw.random() < 0.2:
            process.wait(self.draw.uniform(0, 5))
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and not has_begun():
            if time.monotonic() > deadline:
                raise RuntimeError("it does not begin")
            time.sleep(0.05)
        process.wait(self.draw.uniform(0, self.work))

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill one process of the command or all, and wait until none is left."""
        members = [process.pid, *_children(process.pid)]
        if self.draw.random() < 0.5:
            os.kill(self.draw.choice(members), signal.SIGKILL)
            time.sleep(self.draw.uniform(0, 3))  # the others notice
        while True:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                break
            process.poll()
            time.sleep(0.05)
        process.wait()


def _children(pid: int) -> list[int]:
    try:
        found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return found + [inner for child in found for inner in _children(child)]


def kill_fit(folder: Path, draw: random.Random, cycles: int, until: float) -> Outcome:
    """Kill a training on two ranks."""
    command = ["fit", *TINY, *FIT]
    whole = Target(folder / "whole", draw, 0)
    whole.run(command)
    (reference,) = whole.folder.glob("runs/*/*/checkpoints/last.ckpt")
    target, finished, different = Target(folder / "killed", draw, 2.5, cycles, until), 0, []
    while True:
        is_killed = target.is_killed
        saved = newest_checkpoint(target.folder)
        before = set(target.folder.rglob("*.ckpt"))
        arguments = command if saved is None else ["fit", "--ckpt_path", str(saved)]
        begun = (lambda before=before: bool(set(target.folder.rglob("*.ckpt")) - before)) if is_killed else None
        if not target.run(arguments, begun):
            continue
        finished += 1
        last = max(target.folder.glob("runs/*/*/checkpoints/last.ckpt"), key=os.path.getmtime)
        different += different_parts(read(reference), read(last))
        if not is_killed:
            return Outcome(target.kills, finished, different)
        shutil.rmtree(target.folder / "runs")


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of the most steps; every one that is there must be whole."""
    files = [file for file in folder.glob("runs/*/*/checkpoints/*.ckpt") if not file.name.startswith(".")]
    return max(files, key=lambda file: read(file)["global_step"], default=None)


def read(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=True)


def different_parts(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return what differs between two checkpoints, apart from paths and versions."""
    names = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    found = [name for name in names if not equal(a[name], b[name])]
    callbacks = ("MemoryCallback",)
    return found + [name for name in callbacks if not equal(a["callbacks"][name], b["callbacks"][name])]


def equal(a: Any, b: Any) -> bool:
    """Whether two values are equal to the bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def kill_index(folder: Path, draw: random.Random, cycles: int, until: float) -> Outcome:
    """Kill `memdml index`."""
    whole, target = Target(folder / "whole", draw, 0), Target(folder / "killed", draw, 1.5, cycles, until)
    write_images(folder / "images", classes=30, images=100)
    data = ["--data", "FolderDataModule", "--data.root", str(folder / "images"), "--data.image_size=64"]
    data += ["--data.num_workers=1", "--data.eval_batch_size=8"]
    options = [option for option in TINY if "num_classes" not in option]
    whole.run(["fit", *data, *options, "--model.backbone.in_channels=3", "--trainer.max_steps=1"])
    (checkpoint,) = whole.folder.glob("runs/*/*/checkpoints/last.ckpt")
    command = ["index", "--ckpt_path", str(checkpoint), "--images", "gallery", "--output", "index"]
    whole.run(command)
    finished, different = 0, []
    while True:
        is_killed = target.is_killed
        # It is at work once the staged folder holds rows.
        rows = target.folder / ".index.partial/embeddings.npy"
        if not target.run(command, rows.is_file if is_killed else None):
            continue
        finished += 1
        files = ("embeddings.npy", "images.parquet")
        written = [[(one.folder / "index" / name).read_bytes() for name in files] for one in (whole, target)]
        different += [] if written[0] == written[1] else ["index"]
        different += [file.name for file in target.folder.glob(".index*")]  # nothing unfinished is left
        if not is_killed:
            return Outcome(target.kills, finished, different)
        shutil.rmtree(target.folder / "index")


def write_images(folder: Path, classes: int, images: int) -> None:
    """Write images of noise, one folder per class."""
    noise = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"{label:02d}").mkdir(parents=True)
        for image in range(images):
            pixels = noise.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{label:02d}" / f"{image:02d}.png")


def kill_study(folder: Path, draw: random.Random, cycles: int, until: float) -> Outcome:
    """Kill a study of two processes."""
    whole, target = Target(folder / "whole", draw, 0), Target(folder / "killed", draw, 3, cycles, until)
    for one in (whole, target):
        (one.folder / "base.yaml").write_text(BASE)
        (one.folder / "study.yaml").write_text(STUDY)
    command = ["study", "study.yaml", "--processes", "2", "--output", "out"]
    whole.run(command)

    def scores(one: Target) -> dict[str, Any]:
        return {file.name: json.loads(file.read_text())["scores"] for file in one.folder.glob("out/study/runs/*.json")}

    finished, different = 0, []
    while True:
        is_killed = target.is_killed
        before = len(scores(target))
        begun = (lambda before=before: len(scores(target)) > before) if is_killed else None
        if not target.run(command, begun):
            continue
        finished += 1
        different += [] if scores(target) == scores(whole) else ["scores"]
        if not is_killed:
            return Outcome(target.kills, finished, different)
        shutil.rmtree(target.folder / "out")


def kill_cache(folder: Path, draw: random.Random, cycles: int, until: float) -> Outcome:
    """Kill processes that fill a pixel cache, two at a time."""
    write_images(folder / "images", classes=10, images=30)
    records = [Record(str(file), 0, "test") for file in sorted((folder / "images").rglob("*.png"))]
    shrink = Shrink(32)

    def cache() -> PixelCache:
        return PixelCache(OpenFiles(records), records, shrink, shrink.side, folder / "cache", 10**9)

    def fill(seed: int) -> None:
        opened = cache()
        for row in np.random.default_rng(seed).permutation(len(records)):
            opened(int(row))

    right = [shrink(OpenFiles(records)(row)) for row in range(len(records))]
    different, started = [], multiprocessing.get_context("fork")
    for cycle in range(cycles):
        if time.monotonic() > until:
            return Outcome(cycle, cycle, different)
        processes = [started.Process(target=fill, args=(2 * cycle + i,)) for i in range(2)]
        for process in processes:
            process.start()
        time.sleep(draw.uniform(0, 0.5))
        for process in processes:
            process.kill()
            process.join()
        again = cache()
        different += [f"image {row}" for row in range(len(records)) if not torch.equal(again(row), right[row])]
        if draw.random() < 0.5:
            shutil.rmtree(folder / "cache")  # the next begins with an empty one
    return Outcome(cycles, cycles, different)


KINDS: dict[str, Callable[[Path, random.Random, int, float], Outcome]] = {
    "fit": kill_fit,
    "index": kill_index,
    "study": kill_study,
    "cache": kill_cache,
}


def kill_and_resume(kind: str, folder: Path, cycles: int, seed: int | None, minutes: float) -> Outcome:
    """Kill a kind of command several times, and compare what it leaves in the end.

    Args:
        kind: One of `KINDS`.
        folder: An empty folder to work in.
        cycles: How often it is killed.
        seed: Of the moments, as far as the speed of the machine repeats; None draws others each time.
        minutes: After this time it is killed no more.
    """
    for name in ("whole", "killed"):
        (folder / name).mkdir(parents=True)
    os.environ.setdefault("LIGHTNING_MEMDML_CACHE", str(folder / "glyphs"))
    return KINDS[kind](folder, random.Random(seed), cycles, time.monotonic() + 60 * minutes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help=f"some of {', '.join(KINDS)}; by default all")
    parser.add_argument("--cycles", type=int, default=20, help="kills of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--minutes", type=float, default=60, help="time for the kills of each kind")
    given = parser.parse_args()
    if unknown := set(given.kinds) - set(KINDS):
        parser.error(f"Expected some of {', '.join(KINDS)} but got {', '.join(unknown)}.")
    failed = False
    for kind in given.kinds:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="kill_and_resume") as folder:
            outcome = kill_and_resume(kind, Path(folder), given.cycles, given.seed, given.minutes)
        result = "all equal" if not outcome.different else f"DIFFERENT: {outcome.different}"
        seconds = time.monotonic() - start
        print(f"{kind}: {outcome.kills} kills, {outcome.finished} finished, {result} ({seconds:.0f} s)", flush=True)
        failed |= bool(outcome.different)
    sys.exit(failed)


if __name__ == "__main__":
    main()
