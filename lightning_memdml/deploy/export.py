"""``memdml export``: a trained network without this package, as an ONNX file and as a program of ``torch.export``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from lightning_memdml.atomic_write import atomic_write
from lightning_memdml.data.transforms import IMAGENET_MEAN, IMAGENET_STD, PhotographTransform, Shrink
from lightning_memdml.deploy.sources import FromFile, input_transform, tensor_shape
from lightning_memdml.deploy.trained import call, configuration_of, data_of, load_learner

DESCRIPTION = """\
Export a trained network: from images, prepared as the file beside it says, to unit embeddings, any number at a time.

  memdml export --ckpt_path runs/memdml/version_0/checkpoints/last.ckpt --output runs/export
  memdml export --ckpt_path last.ckpt --formats [onnx]

`model.onnx` runs in ONNX Runtime and elsewhere, `model.pt2` with `torch.export.load(...).module()`;
`preprocessing.json` says how an image becomes their input. Each is compared with the network before it is kept."""
Format = Literal["onnx", "torch"]
FILES: dict[str, str] = {"onnx": "model.onnx", "torch": "model.pt2"}
PREPROCESSING = "preprocessing.json"
CLOSE = 1e-4  # largest difference of an embedding's entries that is let pass


def export(arguments: list[str]) -> None:
    """Run ``memdml export`` with what follows it on the command line."""
    call(export_model, arguments, prog="memdml export", description=DESCRIPTION)


def export_model(
    ckpt_path: str,
    output: str = "runs/export",
    formats: Sequence[Format] = ("onnx", "torch"),
    trust: bool = False,
) -> dict[str, float]:
    """Export a trained network, with what prepares its images written beside it.

    Args:
        ckpt_path: A checkpoint of ``memdml fit``.
        output: Folder of the files.
        formats: What to write: ``onnx`` (extra ``export``), ``torch``.
        trust: Let the checkpoint build whatever it names, also what is not on the closed list.

    Returns:
        File name -> largest difference from the network in the entries of unit embeddings, over batches of 1 and 5.

    Raises:
        ImportError: If the extra is missing.
        ValueError: If the checkpoint cannot be used, its transform cannot be written down, or an exported model
            does not compute what the network does.
    """
    if not formats:
        raise ValueError("Expected at least one of `formats`: onnx, torch.")
    data = data_of(configuration_of(ckpt_path, trust=trust)["data"], ckpt_path, trust=trust)
    transform = FromFile(input_transform(data), tensor_shape(data))
    sample = transform(Image.new("RGB", (64, 48)))
    described: dict[str, Any] = {
        "input": {"name": "images", "shape": ["batch", *sample.shape], "dtype": "float32"},
        "output": {"name": "embeddings", "normalized": True},
        "steps": steps_of(transform),
    }
    model = load_learner(ckpt_path, trust=trust).model
    folder = Path(output)
    differences = {}
    for name in formats:
        file = folder / FILES[name]
        write, read = WRITERS[name]
        with atomic_write(file) as unfinished:
            write(model, sample.shape, unfinished)
            differences[file.name] = difference = _difference(model, read(unfinished), sample.shape)
            if not difference <= CLOSE:
                raise ValueError(f"{file.name} differs from the network by {difference:.1e}, more than {CLOSE:.0e}.")
        print(f"    {file}: embeddings differ from the network's by at most {difference:.1e}")
    with atomic_write(folder / PREPROCESSING) as unfinished:
        unfinished.write_text(json.dumps(described, indent=1), encoding="utf-8")
    print(f"    {folder / PREPROCESSING}: {', '.join(step['do'] for step in described['steps'])}")
    return differences


# ------------------------------------------------------------------ the two formats


def _write_program(model: nn.Module, shape: Sequence[int], path: Path) -> None:
    torch.export.save(_program(model, shape), path)


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
            f"To export ONNX, {name} is needed, and it is missing: pip install 'lightning-memdml[export]', or pass "
            "`--formats [torch]`."
        ) from error


WRITERS: dict[str, tuple[Callable[..., None], Callable[[Path], Callable[[Tensor], Tensor]]]] = {
    "onnx": (_write_onnx, _read_onnx),
    "torch": (_write_program, _read_program),
}


@torch.inference_mode()
def _difference(model: nn.Module, exported: Callable[[Tensor], Tensor], shape: Sequence[int]) -> float:
    """Largest difference in an entry of an embedding, for noise in batches of 1 and 5."""
    generator = torch.Generator().manual_seed(0)
    differences = []
    for size in (1, 5):
        images = torch.randn(size, *shape, generator=generator)
        differences.append(float((model(images) - exported(images)).abs().max()))
    return float(np.max(differences))  # unlike max, NaN if one is


# ------------------------------------------------------------------ preprocessing


def steps_of(transform: FromFile) -> list[dict[str, Any]]:
    """Describe, step by step, what turns an image file into the network's input.

    Raises:
        ValueError: If a step is not one of those that can be written down.

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
    # Another class made of parts may do more than they do.
    if isinstance(part, PhotographTransform | Shrink) or type(part) is v2.Compose:
        steps = [step for inner in part.transforms for step in _described(inner)]
        if isinstance(part, PhotographTransform):
            mean_and_std = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
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
        return []  # a matter of torch alone
    raise ValueError(
        f"Expected a test transform of Resize, CenterCrop, ToImage, ToDtype(float32, scale=True) and Normalize, which "
        f"can be written down for use without this package, but it has {type(part).__name__}."
    )
