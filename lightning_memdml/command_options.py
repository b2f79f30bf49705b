"""Options of `fit`, `test` and `predict` beside those of Lightning."""

from __future__ import annotations

from typing import Any

from lightning_memdml.deploy.predictions import FileFormat

REPORT: dict[str, Any] = {
    "--report": {
        "type": bool,
        "default": True,
        "help": "Write `report.html` at the end: scores, curves, failures, a map, the data and the configuration.",
    }
}
FIT: dict[str, Any] = {
    **REPORT,
    "--reference": {
        "type": bool,
        "default": True,
        "help": "Score the frozen features of a network with --model.weights first, and compare them at the end.",
    },
    "--reference_cache": {
        "type": str | None,
        "default": "runs/frozen_features",
        "help": "Folder that keeps what was computed of the frozen features for a later run on the same images and "
        "weights; null for none.",
    },
}
PREDICT: dict[str, Any] = {
    "--file_format": {
        "type": FileFormat,
        "default": "parquet",
        "help": "Of the embeddings: one table, or an array beside a table (.csv) of paths, labels and classes.",
    },
    "--skip_damaged": {
        "type": bool,
        "default": False,
        "help": "Leave out images that are missing or damaged, and list them. All images are opened once more.",
    },
    "--flip": {
        "type": bool,
        "default": False,
        "help": "Average the embedding of each image with that of its mirrored copy, which takes twice the time.",
    },
}


def without_own_options(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out the options of one command alone: the configuration of a run is used with other commands too."""
    own = {option.removeprefix("--") for option in (*FIT, *PREDICT)}
    return {key: value for key, value in config.items() if key not in own}
