"""Features of a frozen network: their views, their roles, and no damaged archive without a clear word."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_memdml.cli import main
from lightning_memdml.data.features import FeatureDataModule, RandomView

LABELS = np.repeat(np.arange(6), 4)
# The numbers tell row and view: 100 * row + view, in every place.
FEATURES = np.tile((100.0 * np.arange(24)[:, None] + np.arange(3))[:, :, None], (1, 1, 5)).astype(np.float32)


def archive(folder: Path, **arrays: Any) -> Path:
    path = folder / "features.npz"
    np.savez(path, **{"feature": FEATURES, "label": LABELS, "train": LABELS < 4} | arrays)
    return path


def module(path: Path, **kwargs: Any) -> FeatureDataModule:
    return FeatureDataModule(str(path), batch_size=8, images_per_class=2, val_fraction=0, **kwargs)


def test_training_takes_every_view_and_evaluation_the_first(tmp_path: Path) -> None:
    data = module(archive(tmp_path))
    views = set()
    for epoch in range(20):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for rows, labels, indices in loader:
            assert rows.shape == (8, 5)
            assert rows.dtype == torch.float32
            assert (rows[:, 0] // 100).long().tolist() == indices.tolist()
            assert labels.tolist() == LABELS[indices].tolist()
            views |= set((rows[:, 0] % 100).tolist())
    assert views == {0.0, 1.0, 2.0}
    rows, labels, indices = next(iter(data.test_dataloader()))
    assert rows[:, 0].tolist() == [100.0 * row for row in range(16, 24)]
    assert data.gallery_set is data.query_set
    assert len(data.train_set) == 16


def test_a_view_depends_on_its_seed_alone() -> None:
    views = torch.from_numpy(FEATURES)
    whole = RandomView()(views, seeds=list(range(24)))
    assert torch.equal(whole[7], RandomView()(views[7], seeds=[7]))
    assert torch.equal(whole[5:9], RandomView()(views[5:9], seeds=[5, 6, 7, 8]))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"feature": FEATURES[:, 0]}, r"got feature \(24, 5\) of float32"),
        ({"feature": FEATURES.astype(int)}, "got feature .* of int64"),
        ({"feature": FEATURES[:23]}, r"equal length but got \[23, 24, 24\]"),
        ({"feature": np.where(FEATURES == 102, np.nan, FEATURES)}, "finite features"),
        ({"label": LABELS / 2}, "got label"),
        ({"train": LABELS}, "got train .* of int64"),
    ],
)
def test_arrays_that_do_not_fit_are_told(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(archive(tmp_path, **arrays)).setup()


def test_missing_and_damaged_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Make it with `memdml freeze`, and pass it as `path=`"):
        module(tmp_path / "features.npz").setup()
    np.savez(tmp_path / "other.npz", jpeg=FEATURES)
    with pytest.raises(ValueError, match=r"no array feature, label, train\. Found: jpeg"):
        module(tmp_path / "other.npz").setup()
    (tmp_path / "cut.npz").write_bytes(archive(tmp_path).read_bytes()[:100])
    with (tmp_path / "single.npz").open("wb") as file:
        np.save(file, FEATURES)
    for name in ("cut.npz", "single.npz"):
        with pytest.raises(ValueError, match=f"{name} is no readable"):
            module(tmp_path / name).setup()


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_damaged_archive_is_named(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = archive(tmp_path_factory.mktemp("damaged"))
    with np.load(path) as arrays:
        np.savez_compressed(path, **arrays)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    try:
        module(path).setup()
    except ValueError as error:
        assert "features.npz" in str(error)  # noqa: PT017


def test_an_archive_that_unpacks_to_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in ("feature", "label", "train"):
            with bomb.open(f"{name}.npy", "w") as file:
                for _ in range(200):
                    file.write(bytes(1 << 20))
    with pytest.raises(
        ValueError, match=r"bomb\.npz: expected an archive that unpacks to at most .* but got 629,145,600"
    ):
        module(path).setup()


def test_an_array_that_announces_more_than_there_is_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path)
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 3, 5), }"
    with zipfile.ZipFile(path, "w") as small:
        for name in ("feature", "label", "train"):
            small.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(ValueError, match=r"features\.npz is no readable \.npz archive: it needs more memory"):
        module(path).setup()


def test_frozen_images_train_a_head_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"{row}.png" for row in range(24)]
    for row, name in enumerate(names):
        Image.fromarray(np.random.default_rng(row).integers(0, 255, (40, 40, 3), np.uint8)).save(name)
    rows = [f"{name},{label}\n" for name, label in zip(names, LABELS, strict=True)]
    Path("list.csv").write_text("path,label\n" + "".join(rows))
    main(["freeze", "list.csv", "features.npz", "--backbone", "resnet18", "--image_size", "33", "--views", "2"])
    with np.load("features.npz") as made:
        assert made["feature"].shape[:2] == (len(made["label"]), 2)
        assert not np.array_equal(made["feature"][:, 0], made["feature"][:, 1])
        width = made["feature"].shape[2]
    arguments = """fit --data FeatureDataModule --data.path features.npz --data.batch_size 4 --data.images_per_class 2
        --data.val_fraction 0 --model.backbone torch.nn.Identity --model.loss ContrastiveLoss
        --trainer.max_steps 2 --trainer.accelerator cpu --trainer.val_check_interval 1"""
    main([*arguments.split(), f"--model.num_features={width}"])
