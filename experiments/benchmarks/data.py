"""Images per second of this package's training loader, against torchvision's `ImageFolder` and a `DataLoader`.

Real photographs (any archive that `TableDataModule` reads) are laid side by side to pictures of a realistic size and
written as JPEG files, one folder per class, in a temporary folder. All arms make the field's training batches of them
(shorter side to 256, a random part resized to 224, mirrored half of the time, normalised) with the same number of
workers and the same threads:

- `ImageFolder, Pillow`: transforms on Pillow images, as most code of the field has it;
- `ImageFolder, tensors`: torchvision's v2 transforms on tensors, the fastest order it recommends;
- `ours`: `FolderDataModule` without a pixel cache;
- `ours, pixel cache`: with one.

Cold: the files have just been dropped from the page cache of the operating system (as far as it lets a process do
that), and the pixel cache is empty. Warm: both have been read once. The arms take turns, in another order every round.
An epoch is timed from the arrival of its first batch to that of its last, which leaves out the start of the workers;
the CPU time of all processes, which other load on the machine disturbs less, is taken from beginning to end.

    python experiments/benchmarks/data.py --archive birds.npz --rounds 5 --output data.md
"""

from __future__ import annotations

import argparse
import gc
import io
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

from lightning_memdml.data import FolderDataModule
from lightning_memdml.data.transforms import IMAGENET_MEAN, IMAGENET_STD

IMAGES_PER_CLASS = 8  # a multiple of those in a batch, so that an epoch visits every image once
STATES = ("cold", "warm")


def write_pictures(archive: Path, folder: Path, count: int, width: int, height: int, quality: int) -> int:
    """Write `count` pictures made of photographs in their own resolution; return their bytes."""
    arrays = np.load(archive, allow_pickle=False)
    jpeg, offset = arrays["jpeg"], arrays["offset"]
    order = np.random.default_rng(0)

    def photograph() -> Image.Image:
        i = order.integers(len(offset) - 1)
        return Image.open(io.BytesIO(jpeg[offset[i] : offset[i + 1]].tobytes())).convert("RGB")

    written = 0
    for number in tqdm(range(count), "Writing pictures", leave=False):
        picture = Image.new("RGB", (width, height))
        top = 0
        while top < height:
            left, row = 0, height
            while left < width:
                part = photograph()
                picture.paste(part, (left, top))
                left, row = left + part.width, min(row, part.height)
            top += row
        path = folder / f"class{number // IMAGES_PER_CLASS:04}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=quality)
        written += path.stat().st_size
    return written


def image_folder(folder: Path, options: argparse.Namespace, tensors: bool) -> DataLoader:
    first = [v2.ToImage()] if tensors else []
    last = [] if tensors else [v2.ToImage()]
    transform = v2.Compose(
        [
            *first,
            v2.Resize(256, antialias=True),
            v2.RandomResizedCrop(224, scale=(0.2, 1), antialias=True),
            v2.RandomHorizontalFlip(),
            *last,
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    return DataLoader(
        ImageFolder(folder, transform), options.batch_size, shuffle=True, num_workers=options.workers, drop_last=True
    )


def ours(folder: Path, options: argparse.Namespace, cache: Path | None) -> Iterable:
    data = FolderDataModule(
        root=str(folder),
        batch_size=options.batch_size,
        val_fraction=0,
        num_workers=options.workers,
        pixel_cache=None if cache is None else str(cache),
    )
    return data.train_dataloader()


def time_epoch(make: Callable[[], Iterable]) -> tuple[float, float]:
    """Return images per second, and milliseconds of CPU time per image, those of the workers included."""
    cpu = _cpu_seconds()
    images, start = [], 0.0
    loader = make()
    for batch, *_ in loader:
        start = start or time.perf_counter()
        images.append(len(batch))
    seconds = time.perf_counter() - start
    del loader
    gc.collect()  # ends the workers, whose time counts only then
    return sum(images[1:]) / seconds, 1e3 * (_cpu_seconds() - cpu) / sum(images)


def _cpu_seconds() -> float:
    return sum(os.times()[:4])


def drop_from_page_cache(folder: Path) -> None:
    for path in folder.rglob("*.jpg"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return what `time_epoch` does of every arm, cold and warm, round by round."""
    training, cache = folder / "train", folder / "cache"
    arms: dict[str, Callable[[], Iterable]] = {
        "ImageFolder, Pillow": lambda: image_folder(training, options, tensors=False),
        "ImageFolder, tensors": lambda: image_folder(training, options, tensors=True),
        "ours": lambda: ours(folder, options, None),
        "ours, pixel cache": lambda: ours(folder, options, cache),
    }
    found: dict[str, dict[str, list[tuple[float, float]]]] = {arm: {state: [] for state in STATES} for arm in arms}
    for number in tqdm(range(options.rounds), "Rounds", leave=False):
        names = list(arms)[number % len(arms) :] + list(arms)[: number % len(arms)]
        for name in names:
            shutil.rmtree(cache, ignore_errors=True)
            os.sync()
            drop_from_page_cache(training)
            for state in STATES:
                found[name][state].append(time_epoch(arms[name]))
    return found


def report(found: dict[str, dict[str, list[tuple[float, float]]]], options: argparse.Namespace, written: int) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "torchvision", "pillow"))
    lines = [
        f"{options.images} pictures of {options.width} x {options.height} pixels, {written / options.images / 1e3:.0f} "
        f"kB each; batches of {options.batch_size}, {options.workers} workers of one thread, {os.cpu_count()} cores "
        f"({platform.machine()}), {versions}; {options.rounds} rounds. Medians (lowest to highest); the ratios are "
        "medians of the ratios within a round, above 1 where the arm is faster than the `ImageFolder` named.",
        "",
        "| state | arm | images / s | to Pillow | to tensors | CPU ms / image | to Pillow | to tensors |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for state in STATES:
        for arm, states in found.items():
            cells = [state, arm]
            for column, form in enumerate((",.0f", ".2f")):
                values = [pair[column] for pair in states[state]]
                cells.append(f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})")
                for base in ("ImageFolder, Pillow", "ImageFolder, tensors"):
                    others = [pair[column] for pair in found[base][state]]
                    ratios = [a / b if column == 0 else b / a for a, b in zip(values, others, strict=True)]
                    cells.append(f"{statistics.median(ratios):.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--archive", type=Path, required=True, help="photographs: an .npz file as TableDataModule reads"
    )
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--quality", type=int, default=85)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where the temporary folder is made; on the disk to be measured")
    parser.add_argument("--output", type=Path, help="a file that gets the table too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        size = (options.images, options.width, options.height, options.quality)
        written = write_pictures(options.archive, Path(folder, "train"), *size)
        write_pictures(options.archive, Path(folder, "test"), IMAGES_PER_CLASS, *size[1:])  # which is not read
        table = report(measure(Path(folder), options), options, written)
    print(table)
    if options.output:
        options.output.write_text(table)


if __name__ == "__main__":
    main()
