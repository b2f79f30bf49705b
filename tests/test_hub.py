"""A learner goes to a folder and to a hub that is made here, and comes back; without the network."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_memdml import ContrastiveLoss, MetricLearner, SmallConvNet
from lightning_memdml.hub import FILE, write_files

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the extra `hf`")


def learner() -> MetricLearner:
    torch.manual_seed(0)
    return MetricLearner(SmallConvNet(width=4), ContrastiveLoss(margin=0.4), embedding_dim=8)


def test_from_a_folder(tmp_path: Path) -> None:
    model, images = learner(), torch.randn(2, 1, 28, 28)
    write_files(model, tmp_path, "someone/birds")
    for folder in (tmp_path, str(tmp_path)):
        assert MetricLearner.from_pretrained(folder)(images).equal(model.eval()(images))
    card = (tmp_path / "README.md").read_text()
    for part in (
        "# birds\n",
        "of 8 numbers",
        "| network | `SmallConvNet` |",
        "| loss in the batch | `ContrastiveLoss(",
        "| loss against the memory | `the same` |",
        'MetricLearner.from_pretrained("someone/birds")',
    ):
        assert part in card
    assert card.startswith("---\nlibrary_name: lightning-memdml\n")
    (tmp_path / FILE).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"^Expected learner\.ckpt in .* but there is none\. `push_to_hub` or `sa"
    ):
        MetricLearner.from_pretrained(tmp_path)


def test_to_a_hub_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Api:
        def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> Any:
            calls.append((repo_id, private, exist_ok))
            return SimpleNamespace(repo_id=f"someone/{repo_id}")

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> str:
            calls.append((repo_id, commit_message))
            shutil.copytree(folder_path, tmp_path / repo_id)
            return "https://hub/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(tmp_path / name / file))
    model, images = learner(), torch.randn(2, 1, 28, 28)
    assert model.push_to_hub("birds") == "https://hub/commit/1"
    assert calls == [("birds", True, True), ("someone/birds", "Upload a learner")]
    assert sorted(path.name for path in (tmp_path / "someone/birds").iterdir()) == ["README.md", FILE]
    torch.load(tmp_path / "someone/birds" / FILE, weights_only=True)  # no pickled code
    monkeypatch.chdir(tmp_path.parent)  # where `someone/birds` is no folder
    assert MetricLearner.from_pretrained("someone/birds")(images).equal(model.eval()(images))


def test_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, file: str) -> str:
        raise OSError("offline.\nMore.")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", missing)
    with pytest.raises(
        FileNotFoundError,
        match=r"^Expected a folder, or a repository of the hub with learner\.ckpt, but got 'a/b': offline\. Check the",
    ):
        MetricLearner.from_pretrained("a/b")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'is not installed\. `pip install "lightning-memdml\[hf\]"`\.$'):
        learner().push_to_hub("a/b")
