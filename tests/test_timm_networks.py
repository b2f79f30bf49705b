"""Networks of timm by name: their features, their weights, and the images they want, through every command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from PIL import Image
from support.pictures import draw_pictures
from torch import nn

from lightning_memdml import ContrastiveLoss, FolderDataModule, MetricLearner
from lightning_memdml.backbones import build_backbone, preprocessing_of
from lightning_memdml.cli import main
from lightning_memdml.heads import Pool
from lightning_memdml.runs import CONFIG_IN_CHECKPOINT, read_checkpoint
from lightning_memdml.trust import UntrustedFileError, allowed_config, read_yaml

timm = pytest.importorskip("timm", reason="the extra `timm`")

RunIn = Callable[[Path], AbstractContextManager[None]]
LAST = "runs/memdml/version_0/checkpoints/last.ckpt"
DATA = "--data=FolderDataModule --data.root=pictures --data.num_workers=0 --data.batch_size=8"
RUN = "--trainer.accelerator=cpu --trainer.max_steps=2 --trainer.enable_progress_bar=false"
HALF = [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "pooling", "width", "shape"),
    [
        ("test_resnet", None, 96, (2, 96)),
        ("test_resnet", "average", 96, (2, 96, 2, 2)),
        ("mobilenetv3_small_050", None, 1024, (2, 1024)),  # a layer behind the pooling
        ("mobilenetv3_small_050", "gem", 288, (2, 288, 2, 2)),
        ("test_vit", None, 64, (2, 64)),
        ("test_vit", "token", 64, (2, 17, 64)),  # 4 x 4 patches and the class token
    ],
)
def test_width_and_shape_of_features(name: str, pooling: str | None, width: int, shape: tuple[int, ...]) -> None:
    trunk, found = build_backbone(f"timm:{name}", feature_map=pooling is not None)
    with torch.no_grad():
        assert trunk.eval()(torch.zeros(2, 3, 64, 64)).shape == shape
    assert found == width


def test_map_with_channels_last_is_turned() -> None:
    trunk, width = build_backbone("timm:swin_tiny_patch4_window7_224", feature_map=True)
    with torch.no_grad():
        assert trunk.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, width, 7, 7) == (1, 768, 7, 7)


def test_pooling_of_tokens() -> None:
    tokens = torch.arange(24.0).reshape(2, 3, 4)
    assert Pool("token")(tokens).equal(tokens[:, 0])
    assert Pool("average")(tokens).allclose(tokens.mean(dim=1))
    assert Pool("both")(tokens).allclose(torch.cat([tokens.mean(dim=1), tokens.amax(dim=1)], dim=1))
    with pytest.raises(ValueError, match=r"^Expected tokens \(B, N, F\) for `pooling: token` but got \(1, 4, 2, 2\)"):
        Pool("token")(torch.zeros(1, 4, 2, 2))


def test_weights_from_a_file_with_a_classifier(tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=10)
    torch.save(network.state_dict(), tmp_path / "net.pth")
    trunk, _ = build_backbone("timm:test_resnet", str(tmp_path / "net.pth"))
    assert trunk.conv1[0].weight.equal(network.conv1[0].weight)
    with pytest.raises(ValueError, match=r"^Expected `weights` of timm:test_resnet to be a file or DEFAULT but got 'V"):
        build_backbone("timm:test_resnet", "V1")


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> nn.Module:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(
        ConnectionError, match=r"weights of timm:test_vit but got OSError: no route to host\. Pass a file"
    ):
        build_backbone("timm:test_vit", "DEFAULT")


def test_names() -> None:
    for name, answer in {
        "resnet05": r"timm's list but got 'timm:resnet05'\. Did you mean 'timm:resnet50",
        "resnet50.nothing": r"Did you mean 'timm:resnet50",
        "hf-hub:someone/network": r"timm's list but got 'timm:hf-hub:someone/network'\.",
        "local-dir:/tmp": r"timm's list but got 'timm:local-dir:/tmp'\.",
    }.items():
        with pytest.raises(ValueError, match=answer):
            build_backbone(f"timm:{name}")
    assert preprocessing_of("timm:resnet18.a1_in1k")["image_size"] == 224


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'is not installed\. `pip install "lightning-memdml\[timm\]"`\.$'):
        build_backbone("timm:resnet18")


def test_a_file_may_name_a_network_of_timm_and_no_address() -> None:
    config = {"model": {"backbone": "timm:vit_tiny_patch16_224.augreg_in21k", "weights": "DEFAULT"}}
    allowed = allowed_config(config, "a.ckpt")["model"]
    assert (allowed["backbone"], allowed["weights"]) == ("timm:vit_tiny_patch16_224.augreg_in21k", None)
    for name in ("hf-hub:a/b", "hf_hub:a/b", "https://a.b/c", "local-dir:a", "a/b", "../a", "", "a\n"):
        with pytest.raises(UntrustedFileError):
            allowed_config({"model": {"backbone": f"timm:{name}"}}, "a.ckpt")


@pytest.fixture(
    scope="module",
    params=["--model.backbone=timm:test_vit --model.pooling=token", "--model.backbone=timm:test_resnet"],
    ids=["transformer", "convolutional"],
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, run_in: RunIn) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("timm")
    draw_pictures(folder / "pictures")
    with run_in(folder):
        main(f"fit {request.param} --model.loss=ContrastiveLoss --model.embedding_dim=8 {DATA} {RUN}".split())
        yield folder


def test_what_the_network_wants_is_in_the_checkpoint(trained: Path) -> None:
    checkpoint = read_checkpoint(trained / LAST)
    options = read_yaml(checkpoint[CONFIG_IN_CHECKPOINT], "last.ckpt")["data"]["init_args"]
    assert (options["image_size"], options["mean"], options["std"], options["crop_pct"]) == (160, HALF, HALF, 0.95)


def test_tested_indexed_searched(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["test", "--ckpt_path", LAST, "--trainer.accelerator", "cpu"])
    main(["index", "--ckpt_path", LAST, "--output", "index"])
    main(["search", "pictures/7/0.png", "--index", "index"])
    assert "7/0.png" in capsys.readouterr().out


def test_exported(trained: Path) -> None:
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed, reason="the extra `export`")
    main(["export", "--ckpt_path", LAST, "--output", "exported"])  # which compares both files with the network to 1e-4
    steps = json.loads(Path("exported/preprocessing.json").read_text())["steps"]
    assert steps[-1] == {"do": "normalize", "mean": HALF, "std": HALF}
    assert steps[1]["size"] == 168  # 160 / 0.95


def test_what_the_user_sets_is_not_changed(trained: Path) -> None:
    own = "--data.image_size=64 --data.mean=[0.4,0.4,0.4] --trainer.logger.name=own"
    main(f"fit --model.backbone=timm:test_vit --model.loss=ContrastiveLoss {DATA} {RUN} {own}".split())
    checkpoint = read_checkpoint("runs/own/version_0/checkpoints/last.ckpt")
    options = read_yaml(checkpoint[CONFIG_IN_CHECKPOINT], "last.ckpt")["data"]["init_args"]
    assert (options["image_size"], options["mean"], options["std"]) == (64, [0.4] * 3, HALF)


def test_in_python(tmp_path: Path) -> None:
    draw_pictures(tmp_path / "pictures")
    learner = MetricLearner("timm:test_vit", ContrastiveLoss(), pooling="average", head_init="whitening")
    wanted = learner.preprocessing
    assert wanted == preprocessing_of("timm:test_vit") == preprocessing_of(timm.create_model("test_vit"))
    data = FolderDataModule(str(tmp_path / "pictures"), batch_size=8, num_workers=0, **wanted)
    trainer = Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(learner, data)
    image, _, _ = data.val_set[0]
    assert image.shape == (3, 160, 160)
    assert float(image.min()) >= -1  # a mean and a deviation of 0.5
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = MetricLearner.load_from_checkpoint(tmp_path / "last.ckpt", loss=ContrastiveLoss())
    assert again.eval()(image[None]).allclose(learner.eval()(image[None]))


def test_transforms_with_other_statistics_draw_the_same_in_a_batch() -> None:
    from lightning_memdml.data.images import ImageDataset
    from lightning_memdml.data.transforms import EvaluationTransform

    transform = EvaluationTransform(32, mean=HALF, std=[0.25] * 3, interpolation="bicubic", crop_pct=1.0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8))
    images = ImageDataset(lambda row: image, ["a"], torch.tensor([0]), transform)
    expected = (transform.pixels(image) / 255 - 0.5) / 0.25
    assert images[0][0].allclose(expected, atol=1e-5)
    assert images.get_batch([0], [1])[0][0].equal(images[0][0])
    for wrong, message in (
        ({"interpolation": "nearest"}, "^Expected `interpolation` to be one of bilinear, bicubic but got 'nearest'"),
        ({"crop_pct": 0.0}, r"^Expected `crop_pct`, a share of the image's side, in \(0, 1\] but got 0.0"),
        ({"mean": [0.5]}, r"^Expected `mean` and `std` of three channels"),
    ):
        with pytest.raises(ValueError, match=message):
            EvaluationTransform(32, **wrong)
