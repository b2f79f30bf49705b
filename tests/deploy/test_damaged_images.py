"""`memdml predict --skip_damaged`: images that cannot be opened are named, or listed and left out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.command_line import Command, answer
from support.workshop import LAST, draw

from lightning_memdml import TableDataModule
from lightning_memdml.deploy.damaged_images import SkipDamaged
from lightning_memdml.deploy.predictions import read_embeddings

PREDICT = f"predict --ckpt_path {LAST} --trainer.enable_progress_bar=false"


@pytest.fixture
def damaged(workshop: Path) -> Path:
    path = workshop / "pictures" / "5 blue" / "3.png"
    path.write_bytes(b"no picture")
    return path


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_of_a_damaged_image_names_the_option(
    workers: int, damaged: Path, memdml: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = answer(memdml, f"{PREDICT} --data.num_workers={workers}", capsys)
    assert refused.removeprefix("error: ").startswith(
        f"Cannot read the image {damaged} (Expected a picture (JPEG, PNG, "
    )
    assert refused.endswith("begins with b'no picture'. Replace it). To embed the others, pass --skip_damaged true.")


def test_damaged_images_are_listed_and_left_out(
    damaged: Path, memdml: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    memdml(f"{PREDICT} --skip_damaged true")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"skipped: {damaged}: Expected a picture (JPEG, PNG, ")
    assert printed[1] == "1 of 24 images skipped."
    (table,) = Path("runs").rglob("embeddings.parquet")
    embeddings, columns = read_embeddings(table)
    assert len(embeddings) == 23
    assert str(damaged) not in columns["path"]
    assert {Path(path).parent.name for path in columns["path"]} == {"4 teal", "5 blue", "6 purple", "7 gray"}
    assert columns["class"] == [Path(path).parent.name for path in columns["path"]]


def test_queries_and_gallery_keep_the_identity_of_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image of both sets is opened once; what is left is known by the same number in both."""
    rows = ["path,label,split,is_query,is_gallery"]
    for row in range(6):
        draw(tmp_path / f"{row}.png", "red", row)
        rows.append(f"{row}.png,item{row // 3},test,{row != 5},{row != 0}")
    (tmp_path / "2.png").write_bytes(b"no picture")
    (tmp_path / "0.png").unlink()
    (tmp_path / "table.csv").write_text("\n".join(rows))
    data = TableDataModule(path=str(tmp_path / "table.csv"))
    data.setup()
    whole = dict(zip(data.query_set.paths + data.gallery_set.paths, [0, 1, 2, 3, 4, 1, 2, 3, 4, 5], strict=True))
    trainer: Any = SimpleNamespace(
        datamodule=data, is_global_zero=True, strategy=SimpleNamespace(broadcast=lambda found: found)
    )
    SkipDamaged().setup(trainer, torch.nn.Identity(), "predict")  # type: ignore[arg-type]
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 6 images skipped."
    for images, kept in ((data.query_set, [1, 3, 4]), (data.gallery_set, [1, 3, 4, 5])):
        assert [Path(path).name for path in images.paths] == [f"{row}.png" for row in kept]
        assert images.indices.tolist() == [whole[path] for path in images.paths]
        assert [images[place][2] for place in range(len(kept))] == images.indices.tolist()


def test_a_data_module_of_somebody_else_is_refused() -> None:
    trainer: Any = SimpleNamespace(datamodule=object())
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the whole message is compared
        SkipDamaged().setup(trainer, torch.nn.Identity(), "predict")  # type: ignore[arg-type]
    assert str(error.value) == (
        "Expected a data module of this package for --skip_damaged but got object. Leave the option out."
    )
