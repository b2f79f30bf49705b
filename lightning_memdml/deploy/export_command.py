"""`memdml export`: a trained network for use without this package, as ONNX and as a program of `torch.export`."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_memdml.deploy.trained import call, data_config_of, load_learner
from lightning_memdml.inference.export import Format, export_network
from lightning_memdml.inference.sources import FromFile, data_of, input_transform, tensor_shape

DESCRIPTION = """\
Export a trained network, which maps a batch of prepared images to unit embeddings.

  memdml export --ckpt_path runs/latest/checkpoints/last.ckpt --output runs/export
  memdml export --ckpt_path last.ckpt --formats [onnx]

`model.onnx` runs in ONNX Runtime and elsewhere, `model.pt2` with `torch.export.load(...).module()`;
`preprocessing.json` describes how an image becomes their input. Each file is compared with the network before it is
kept."""


def export(arguments: list[str]) -> None:
    """Run `memdml export` with what follows it on the command line."""
    call(export_model, arguments, prog="memdml export", description=DESCRIPTION)


def export_model(
    ckpt_path: str,
    output: str = "runs/export",
    formats: Sequence[Format] = ("onnx", "torch"),
    trust: bool = False,
) -> dict[str, float]:
    """Export a trained network, and describe beside it how its images are prepared.

    Args:
        ckpt_path: A checkpoint of `memdml fit`, or of a learner trained or saved in Python.
        output: Folder of the files.
        formats: What to write: `onnx` (extra `export`), `torch`.
        trust: Let the checkpoint build and run whatever it names: only if you trust its author.

    Returns:
        File name -> largest difference from the network in the entries of unit embeddings, over batches of 1 and 5.

    Raises:
        ImportError: If the extra is missing.
        OSError: If the disk is full. The message names the file.
        ValueError: If the checkpoint cannot be used, its transform cannot be described, or an exported model computes
            something else than the network.
    """
    data = data_of(data_config_of(ckpt_path, trust=trust), ckpt_path, trust=trust)
    transform = FromFile(input_transform(data), tensor_shape(data))
    return export_network(load_learner(ckpt_path, trust=trust).model, transform, output, formats)
