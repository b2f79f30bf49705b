"""A network for use without this package, as ONNX and as a program of `torch.export`, with its preprocessing."""

from __future__ import annotations

import copy
import io
import json
import math
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from lightning_memdml.atomic_write import atomic_write
from lightning_memdml.data.transforms import PhotographTransform, Shrink
from lightning_memdml.inference.sources import FromFile

Format = Literal["onnx", "torch"]
FILES: dict[str, str] = {"onnx": "model.onnx", "torch": "model.pt2"}
PREPROCESSING = "preprocessing.json"
# An exported network may be off by as much as the network itself, times a margin. A fixed bound fits no two networks:
# their rounding was 1e-8 to 1e-5, and below 1e-3 lies more than rounding. In the ONNX of torch 2.10 (onnxscript 0.5)
# the resampled position embeddings of a transformer are off by 3e-3, and the entries of its embeddings by 5e-4. Over
# about 16 architectures, most with a default and with a whitening head, ONNX was off by at most 2.0 times the rounding
# of the network, and a program of torch by 1.02 (torch 2.14).
MARGIN = 8.0
# Added to the bound, as some networks round nowhere: four units in the last place of a length of 1.
FLOOR = 4 * torch.finfo(torch.float32).eps
# The bound where a network cannot be run in float64, as one that converts to float32 before a layer with weights.
CLOSE = 1e-3


def export_network(
    model: nn.Module, transform: FromFile, output: str | Path, formats: Sequence[Format] = ("onnx", "torch")
) -> dict[str, float]:
    """Write a network to files that run without this package, and describe beside them how its images are prepared.

    Args:
        model: Maps prepared images `(B, C, H, W)` to unit embeddings `(B, D)`; in evaluation mode.
        transform: Turns an image file into the network's input.
        output: Folder of the files.
        formats: What to write: `onnx` (extra `export`), `torch`.

    Returns:
        File name -> largest difference from the network in the entries of unit embeddings, over batches of 1 and 5.

    Raises:
        ImportError: If the extra is missing.
        OSError: If the disk is full. The message names the file.
        ValueError: If the transform cannot be described, or an exported model computes something else than the network.
    """
    if not formats:
        raise ValueError("Expected at least one of `formats` but got none. Pass onnx, torch or both.")
    sample = transform(Image.new("RGB", (64, 48)))
    described: dict[str, Any] = {
        "input": {"name": "images", "shape": ["batch", *sample.shape], "dtype": "float32"},
        "output": {"name": "embeddings", "normalized": True},
        "steps": steps_of(transform),
    }
    folder = Path(output)
    check = Comparison(model, sample.shape)
    differences = {}
    for name in formats:
        file = folder / FILES[name]
        write, read = WRITERS[name]
        with atomic_write(file) as temporary:
            write(model, sample.shape, temporary)
            differences[file.name] = difference = check.difference(file.name, read(temporary))
        print(f"    {file}: embeddings differ from the network's by at most {difference:.1e}")
    with atomic_write(folder / PREPROCESSING) as temporary:
        temporary.write_text(json.dumps(described, indent=1), encoding="utf-8")
    print(f"    {folder / PREPROCESSING}: {', '.join(step['do'] for step in described['steps'])}")
    return differences


# ------------------------------------------------------------------ the two formats


def _write_program(model: nn.Module, shape: Sequence[int], path: Path) -> None:
    # By way of memory: on a full disk the file writer of torch ends the process.
    buffer = io.BytesIO()
    torch.export.save(_program(model, shape), buffer)
    path.write_bytes(buffer.getbuffer())


def _program(model: nn.Module, shape: Sequence[int]) -> torch.export.ExportedProgram:
    # Two images: a batch of one would be taken for a constant.
    return torch.export.export(
        model, (torch.zeros(2, *shape),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False
    )


def _read_program(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


def _write_onnx(model: nn.Module, shape: Sequence[int], path: Path) -> None:
    _require("onnx", "onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own deprecations
        torch.onnx.export(
            _program(model, shape),
            (),
            path,
            input_names=["images"],
            output_names=["embeddings"],
            external_data=False,
            verbose=False,
            dynamo=True,
        )


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    _require("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["embeddings"], {"images": images.numpy()})[0])


def _require(*modules: str) -> None:
    try:
        for name in modules:
            import_module(name)
    except ImportError as error:
        raise ImportError(
            f'Expected {name} for ONNX but it is not installed. `pip install "lightning-memdml[export]"`, or pass '
            "`--formats [torch]`."
        ) from error


WRITERS: dict[str, tuple[Callable[..., None], Callable[[Path], Callable[[Tensor], Tensor]]]] = {
    "onnx": (_write_onnx, _read_onnx),
    "torch": (_write_program, _read_program),
}


class Comparison:
    """Compares exported networks with the network, on noise in batches of 1 and 5.

    Both are compared with a copy of the network in float64, so that the bound is the rounding of the network itself.

    Args:
        model: Maps images to unit embeddings; in evaluation mode.
        shape: Of an image, `(C, H, W)`.

    Attributes:
        rounding: Largest difference of the network from its copy in float64, in an entry of an embedding. None if
            there is no such copy: some modules cannot be copied, or convert to float32 before a layer with weights.
        bound: Largest accepted difference of an exported network: `MARGIN` times the rounding, plus `FLOOR`.
    """

    def __init__(self, model: nn.Module, shape: Sequence[int]) -> None:
        generator = torch.Generator().manual_seed(0)
        self._images = [torch.randn(size, *shape, generator=generator) for size in (1, 5)]
        self._embeddings = self._exact = self._embed(model)
        self.rounding: float | None = None
        try:
            # A copy, since `double` changes a module in place.
            exact = self._embed(copy.deepcopy(model).double(), torch.float64)
        except Exception:  # a module of the user may raise anything where it meets float64; the fixed bound remains
            exact = self._embeddings * torch.nan
        rounding = _largest(self._embeddings - exact)
        if math.isfinite(rounding):
            self._exact, self.rounding = exact, rounding
        self.bound = CLOSE if self.rounding is None else MARGIN * self.rounding + FLOOR

    def difference(self, name: str, exported: Callable[[Tensor], Tensor]) -> float:
        """Return the largest difference of an exported network from the network, in an entry of an embedding.

        Raises:
            ValueError: If it is not the same network.
        """
        embeddings = self._embed(exported)
        error = _largest(embeddings - self._exact)
        if not error <= self.bound:
            rounding = "" if self.rounding is None else f" (its own rounding in float32 is {self.rounding:.1e})"
            raise ValueError(
                f"Expected {name} to equal the network to {self.bound:.1e}{rounding} but it differs by {error:.1e}. "
                "The file was not kept. Pass the other one of `formats` alone, or install newer versions of torch and "
                "onnxscript."
            )
        return _largest(embeddings - self._embeddings)

    @torch.inference_mode()
    def _embed(self, network: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.cat([network(images.to(dtype)) for images in self._images]).double()


def _largest(differences: Tensor) -> float:
    return float(differences.abs().max())  # NaN if one is


# ------------------------------------------------------------------ preprocessing


def steps_of(transform: FromFile) -> list[dict[str, Any]]:
    """Return the steps that turn an image file into the network's input.

    Raises:
        ValueError: If a step is not one of those that can be described.

    Example:
        >>> from lightning_memdml.data.transforms import EvaluationTransform
        >>> [step["do"] for step in steps_of(FromFile(EvaluationTransform(97), None))]
        ['decode', 'resize_shorter_side', 'center_crop', 'scale', 'normalize']
    """
    channels = 3 if transform.shape is None else transform.shape[0]
    steps: list[dict[str, Any]] = [
        {"do": "decode", "mode": "L" if channels == 1 else "RGB", "turn_as_exif_says": True, "layout": "CHW"}
    ]
    if transform.shape is not None:
        height, width = transform.shape[1:]
        steps.append({"do": "resize", "size": [height, width], "interpolation": "bicubic", "antialias": True})
    return steps + _described(transform.transform)


def _described(part: Any) -> list[dict[str, Any]]:
    # Another class that consists of parts may do more than its parts.
    if isinstance(part, PhotographTransform | Shrink) or type(part) is v2.Compose:
        steps = [step for inner in part.transforms for step in _described(inner)]
        if isinstance(part, PhotographTransform):
            mean_and_std = {"mean": list(part.mean), "std": list(part.std)}
            steps += [{"do": "scale", "divide_by": 255}, {"do": "normalize", **mean_and_std}]
        return steps
    if isinstance(part, v2.Resize) and part.max_size is None and part.size is not None:
        size = list(part.size) if isinstance(part.size, Sequence) else [part.size]
        what = {"interpolation": InterpolationMode(part.interpolation).value, "antialias": bool(part.antialias)}
        if len(size) == 1:
            return [{"do": "resize_shorter_side", "size": size[0], "longer_side": "truncate", **what}]
        return [{"do": "resize", "size": size, **what}]
    if isinstance(part, v2.CenterCrop):
        return [{"do": "center_crop", "size": list(part.size)}]
    if isinstance(part, v2.ToDtype) and part.dtype == torch.float32 and part.scale:
        return [{"do": "scale", "divide_by": 255}]
    if isinstance(part, v2.Normalize):
        return [{"do": "normalize", "mean": list(part.mean), "std": list(part.std)}]
    if isinstance(part, v2.ToImage | v2.PILToTensor):
        return []  # only changes the type in torch
    raise ValueError(
        f"Expected a test transform of Resize, CenterCrop, ToImage, ToDtype(float32, scale=True) and Normalize, which "
        f"can be described for use without this package, but got {type(part).__name__}. Train with such a transform."
    )
