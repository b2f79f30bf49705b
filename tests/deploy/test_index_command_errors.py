"""The errors of `memdml index` and `memdml search`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.command_line import Command, answer
from support.workshop import LAST, draw

from lightning_memdml.data.images import ImageDataset
from lightning_memdml.deploy import embedding
from lightning_memdml.deploy.trained import load_learner
from lightning_memdml.retrieval.index import build_index, load_index
from lightning_memdml.retrieval.index_folder import staged_folder

pytest.importorskip("faiss", reason="an index is one of faiss")


def test_what_is_wrong_is_said_in_a_sentence(
    memdml: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memdml(f"index --ckpt_path {LAST} --output {tmp_path}/index")
    query = "pictures/0"
    build_index(torch.eye(3)).save(tmp_path / "plain")
    for line, sentence in (
        ("index --ckpt_path none.ckpt", "got none.ckpt: there is no such file"),
        (f"index --ckpt_path {LAST} --source nowhere", "Expected a folder, or a table (.csv, .parquet, .npz), but got"),
        (f"index --ckpt_path {LAST} --images val", "Expected val images but FolderDataModule has none"),
        (f"index --ckpt_path {LAST} --output pictures", "It was not overwritten"),
        (f"index --ckpt_path {LAST} --kind pq --output {tmp_path}/other", "at least 256 images"),
        (f"index --ckpt_path {LAST} --knd pq", "Did you mean '--kind'?"),
        (f"index --ckpt_path {LAST} --kind tree", "Expected `kind` to be one of flat, ivf, hnsw, pq"),
        (f"index --ckpt_path {LAST} --nprobe 4", "no option with `kind=flat` but got `nprobe`, an option of ivf"),
        (f"index --ckpt_path {LAST} --kind ivf --probes=4", "Expected `--nprobe` but got `--probes`"),
        (f"search {query} --index {tmp_path}/index", f"Expected an image file but there is no {query}"),
        (f"search {LAST} --index {tmp_path}/index", f"Cannot read the image {LAST}"),
        (f"search {LAST}", "Make one with `memdml index`"),
        (f"search {LAST} --index {tmp_path}/plain", "which records its network, but this one records none"),
        (f"search {LAST} --index {tmp_path}/index --ckpt_path none.ckpt", "Pass its path as `--ckpt_path`"),
    ):
        assert sentence in answer(memdml, line, capsys), line


def test_features_are_indexed_and_images_beside_them_refused(
    memdml: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    labels = np.arange(40) // 4
    rows = np.random.default_rng(0).normal(size=(40, 2, 6)).astype(np.float32)
    np.savez("features.npz", feature=rows, label=labels, train=labels < 5)
    memdml(
        "fit --data FeatureDataModule --data.path features.npz --data.batch_size 4 --data.images_per_class 2 "
        "--data.val_fraction 0 --model.backbone torch.nn.Identity --model.num_features 6 --model.loss ContrastiveLoss "
        "--trainer.max_steps 2 --trainer.accelerator cpu --trainer.enable_progress_bar false"
    )
    capsys.readouterr()
    memdml(f"index --ckpt_path {LAST} --output index")
    assert "Next: memdml search" not in capsys.readouterr().out
    _, position = load_index("index").search(load_learner(LAST)(torch.from_numpy(rows[20:, 0])), k=1)
    assert position[:, 0].tolist() == list(range(20))
    draw(Path("pictures/a/1.png"), "red", 1)
    for line in (
        "search pictures/a/1.png --index index",
        f"index --ckpt_path {LAST} --source pictures --output other",
        f"export --ckpt_path {LAST} --formats [torch]",
    ):
        assert "but this one was trained on features of them" in answer(memdml, line, capsys), line


@pytest.mark.parametrize("device", ["nowhere", pytest.param("cuda:99")])
def test_a_device_that_is_not_there_is_named(
    device: str, memdml: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = answer(memdml, f"index --ckpt_path {LAST} --device {device} --output {tmp_path}/index", capsys)
    assert f"Expected `device` to be one of this machine, such as cpu, but got {device!r}" in said


def test_an_index_is_searched_with_its_own_checkpoint_only(
    memdml: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memdml(f"index --ckpt_path {LAST} --output {tmp_path}/index")
    checkpoint = torch.load(LAST, weights_only=True)
    checkpoint["state_dict"]["model.head.bias"] += 1
    torch.save(checkpoint, tmp_path / "another.ckpt")
    said = answer(memdml, f"search {LAST} --index {tmp_path}/index --ckpt_path {tmp_path}/another.ckpt", capsys)
    assert "embeddings of two networks cannot be compared" in said


def test_a_damaged_image_is_named_and_nothing_is_lost(
    memdml: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        draw(tmp_path / f"album/{number}.png", "teal", number)
    (tmp_path / "album/2.png").write_bytes(b"no picture")
    said = answer(memdml, f"index --ckpt_path {LAST} --source {tmp_path}/album --output {tmp_path}/index", capsys)
    assert f"Cannot read the image {tmp_path}/album/2.png" in said
    assert not (tmp_path / "index").exists()


def test_a_full_disk_is_an_error_that_names_the_file_and_keeps_the_old_index(
    workshop: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A map of a sparse file would end the process with SIGBUS instead."""
    monkeypatch.chdir(workshop)
    build_index(torch.eye(4)).save(small_disk / "index")
    images = ImageDataset(
        lambda row: torch.zeros(3, 8, 8), [str(row) for row in range(400)], torch.zeros(400, dtype=torch.long)
    )

    class Wide(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return torch.randn(len(batch), 1024)

    with (
        pytest.raises(OSError, match="no space left") as raised,
        staged_folder(small_disk / "index", resume=True) as to,
    ):
        embedding.embed_to_file(Wide(), images, to, "digest")
    assert f"for {small_disk}/index but" in str(raised.value)
    assert len(load_index(small_disk / "index")) == 4


def test_two_runs_that_index_to_one_folder_exclude_each_other(
    memdml: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with staged_folder(tmp_path / "index", resume=True) as staged:
        said = answer(memdml, f"index --ckpt_path {LAST} --output {tmp_path}/index", capsys)
        (staged / "index.json").write_text("{}")
    assert f"only process that writes {tmp_path}/index but another one does" in said
    assert [path.name for path in (tmp_path / "index").iterdir()] == ["index.json"]


def test_a_wrong_type_in_the_description_of_an_index_is_named(
    memdml: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memdml(f"index --ckpt_path {LAST} --output {tmp_path}/index")
    file = tmp_path / "index" / "index.json"
    description = json.loads(file.read_text())
    for name, value in (("ckpt_path", 5), ("data", None), ("tensor_shape", "3"), ("images", ["gallery"])):
        file.write_text(json.dumps({**description, "about": {**description["about"], name: value}}))
        said = answer(memdml, f"search {LAST} --index {tmp_path}/index", capsys)
        assert f"it is damaged: its {name} is {value!r}" in said
