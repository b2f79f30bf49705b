"""Learners on the Hugging Face hub: a file of weights and plain data, and a card that describes it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning_memdml.saving import load, save

FILE = "learner.ckpt"
CARD = """---
library_name: lightning-memdml
pipeline_tag: image-feature-extraction
tags: [image-retrieval, metric-learning]
---

# {title}

An embedding of images for retrieval, of {dim} numbers, trained with lightning-memdml.

| part | |
|---|---|
| network | `{backbone}` |
| loss in the batch | `{loss}` |
| loss against the memory | `{memory_loss}` |

```python
from lightning_memdml import MetricLearner

learner = MetricLearner.from_pretrained("{repo_id}")
embeddings = learner.embed(["a.jpg", "b.jpg"])
```

`{file}` holds tensors and plain data, no code. What it may name is a closed list.
"""


def from_pretrained(cls: Any, name: str | Path, *, trust: bool = False, **arguments: Any) -> Any:
    """Read a learner from a folder, or from a repository of the Hugging Face hub, from which it is downloaded.

    Args:
        cls: The class of the learner.
        name: A folder with `learner.ckpt`, or the name of a repository, such as `someone/birds`.
        trust: As for `load`.
        **arguments: Arguments in the place of those in the file, such as `backbone=`.

    Returns:
        The learner, on the CPU and in evaluation mode.

    Raises:
        ImportError: If huggingface_hub is needed and not installed.
        FileNotFoundError: If the folder has no such file, or there is no such repository.
        ValueError: As for `load`.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        file = folder / FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"Expected {FILE} in {folder} but there is none. `push_to_hub` or `save` writes it."
            )
    else:
        hub = _hub()
        try:
            file = Path(hub.hf_hub_download(str(name), FILE))
        except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise FileNotFoundError(
                f"Expected a folder, or a repository of the hub with {FILE}, but got {str(name)!r}: {reason}. Check "
                "the name, and that you may read it."
            ) from error
    return load(cls, file, trust=trust, **arguments)


def push_to_hub(learner: Any, repo_id: str, *, private: bool = True, message: str = "Upload a learner") -> str:
    """Upload a learner and a card that describes it to a repository of the Hugging Face hub, which is made if needed.

    Log in first: `hf auth login`.

    Args:
        learner: The learner.
        repo_id: Name of the repository, such as `someone/birds`.
        private: Whether a new repository is private. One that exists stays as it is.
        message: Message of the commit.

    Returns:
        The address of the commit.

    Raises:
        ImportError: If huggingface_hub is not installed.
        ValueError: If a file cannot hold how the backbone was made, as for `save`.
    """
    api = _hub().HfApi()
    with tempfile.TemporaryDirectory() as folder:
        write_files(learner, folder, repo_id)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message))


def write_files(learner: Any, folder: str | Path, repo_id: str) -> None:
    """Write what a repository of the hub consists of: the learner and its card.

    Args:
        learner: The learner.
        folder: Where to write.
        repo_id: Name of the repository, for the card.
    """
    save(learner, Path(folder, FILE))
    network = learner.hparams.get("backbone")
    card = CARD.format(
        title=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        file=FILE,
        dim=getattr(learner.model.head, "out_features", learner.model.num_features),
        backbone=network if isinstance(network, str) else type(learner.model.backbone).__name__,
        loss=learner.loss,
        memory_loss=learner.memory_loss or "the same",
    )
    Path(folder, "README.md").write_text(card, encoding="utf-8")


def _hub() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError(
            'Expected huggingface_hub for the hub but it is not installed. `pip install "lightning-memdml[hf]"`.'
        ) from error
    return huggingface_hub
