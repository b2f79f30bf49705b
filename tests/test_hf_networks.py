"""Image encoders of Hugging Face: width, outputs, weights and images, through every command; small ones in a folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from support.pictures import draw_pictures

from lightning_memdml import ContrastiveLoss, FolderDataModule, MetricLearner
from lightning_memdml.backbones import build_backbone, preprocessing_of
from lightning_memdml.cli import main
from lightning_memdml.hf_networks import MODEL_TYPES, HuggingFaceModel
from lightning_memdml.runs import CONFIG_IN_CHECKPOINT, read_checkpoint
from lightning_memdml.trust import UntrustedFileError, allowed_config, read_yaml

transformers = pytest.importorskip("transformers", reason="the extra `hf`")

RunIn = Callable[[Path], AbstractContextManager[None]]
LAST = "runs/memdml/version_0/checkpoints/last.ckpt"
VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
SIZES = {**VIT, "image_size": 32, "patch_size": 8}


def save(folder: Path, model: Any, **processor: Any) -> str:
    model.save_pretrained(folder)
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return f"hf:{folder}"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small models with random weights, in folders."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    clip = transformers.CLIPConfig(
        vision_config=SIZES, text_config={**VIT, "vocab_size": 50, "max_position_embeddings": 8}
    )
    half = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    return {
        "vit": save(
            folder / "vit",
            transformers.ViTModel(transformers.ViTConfig(**SIZES)),
            **half,
            size={"height": 32, "width": 32},
            resample=3,
        ),
        "vit without a pooler": save(
            folder / "bare", transformers.ViTModel(transformers.ViTConfig(**SIZES), add_pooling_layer=False)
        ),
        "resnet": save(
            folder / "resnet",
            transformers.ResNetModel(transformers.ResNetConfig(**resnet)),
            **half,
            size={"shortest_edge": 40},
            crop_size={"height": 32, "width": 32},
            do_center_crop=True,
        ),
        "clip": save(folder / "clip", transformers.CLIPModel(clip)),
        "text": save(folder / "text", transformers.BertModel(transformers.BertConfig(**VIT, vocab_size=50))),
    }


@pytest.mark.parametrize(
    ("name", "pooling", "width", "shape"),
    [
        ("vit", None, 32, (2, 32)),
        ("vit", "token", 32, (2, 65, 32)),  # 8 x 8 patches and the class token
        ("clip", None, 32, (2, 32)),
        ("resnet", None, 16, (2, 16)),
        ("resnet", "gem", 16, (2, 16, 8, 8)),
    ],
)
def test_width_and_shape_of_features(
    names: dict[str, str], name: str, pooling: str | None, width: int, shape: tuple[int, ...]
) -> None:
    trunk, found = build_backbone(names[name], feature_map=pooling is not None)
    with torch.no_grad():
        assert trunk.eval()(torch.zeros(2, 3, 64, 64)).shape == shape  # another size than the model's own
    assert found == width


@pytest.mark.parametrize("name", ["vit", "resnet", "clip"])
def test_features_are_the_pooled_output_of_the_saved_weights(names: dict[str, str], name: str) -> None:
    trunk, _ = build_backbone(names[name], "DEFAULT")
    folder = names[name].removeprefix("hf:")
    model = transformers.CLIPVisionModel if name == "clip" else transformers.AutoModel
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.from_pretrained(folder).eval()(images).pooler_output.flatten(1)
        assert trunk.eval()(images).allclose(expected, atol=1e-6)
        assert not build_backbone(names[name])[0].eval()(images).allclose(expected, atol=1e-3)  # random weights


def test_a_pooler_without_weights_is_not_used(names: dict[str, str]) -> None:
    trunk, _ = build_backbone(names["vit without a pooler"], "DEFAULT")
    images = torch.randn(2, 3, 32, 32)
    model = transformers.ViTModel.from_pretrained(names["vit without a pooler"][3:], add_pooling_layer=False)
    with torch.no_grad():
        assert trunk.eval()(images).allclose(model.eval()(images).last_hidden_state[:, 0], atol=1e-6)


def test_the_images_it_wants(names: dict[str, str]) -> None:
    half: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.25] * 3}
    vit = {"image_size": 32, "interpolation": "bicubic", "crop_pct": 1.0, **half}
    assert preprocessing_of(names["vit"]) == preprocessing_of(build_backbone(names["vit"])[0]) == vit
    resnet = {"image_size": 32, "interpolation": "bilinear", "crop_pct": 0.8, **half}
    assert preprocessing_of(names["resnet"]) == resnet
    assert preprocessing_of(names["clip"]) == {}


def test_names_that_cannot_be_used(names: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConnectionError, match=r"^Expected a model of the Hugging Face hub or a folder of `save_pretr"):
        build_backbone("hf:/nowhere/at-all")
    with pytest.raises(ValueError, match=r"^Expected an image encoder of beit, .* but got 'bert'\. Load it in Python"):
        build_backbone(names["text"])
    with pytest.raises(ValueError, match=r"^Expected `weights` of hf:.* to be a file or DEFAULT but got 'V2'\.$"):
        build_backbone(names["vit"], "V2")


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'is not installed\. `pip install "lightning-memdml\[hf\]"`\.$'):
        build_backbone("hf:facebook/dinov2-small")


def test_a_file_may_name_an_architecture_and_nothing_that_is_fetched() -> None:
    def allowed(config: dict[str, Any], **options: Any) -> Any:
        spec = {"class_path": "HuggingFaceModel", "init_args": {"config": config, **options}}
        return allowed_config({"model": {"backbone": spec}}, "a.ckpt")["model"]["backbone"]["init_args"]["config"]

    good = {"model_type": "vit", "hidden_act": "gelu", "hidden_size": 64, "layer_norm_eps": 1e-6}
    assert allowed(good) == good
    for wrong in (
        {"model_type": "detr"},  # which fetches a backbone of its own
        {"model_type": "../vit"},
        {"hidden_act": "os.system"},
        {"_name_or_path": "a/b"},
        {"attn_implementation": "kernels-community/flash-attn"},
        {"auto_map": {"AutoModel": "a--b.C"}},
        {"hidden_size": 100_000},
        {"num_hidden_layers": 1_000},
    ):
        with pytest.raises(UntrustedFileError):
            allowed({**good, **wrong})
    with pytest.raises(UntrustedFileError):
        allowed_config({"model": {"backbone": "hf:facebook/dinov2-small"}}, "a.ckpt")
    assert all(word.replace("-", "_").isidentifier() for word in MODEL_TYPES)


@pytest.fixture(scope="module")
def trained(names: dict[str, str], tmp_path_factory: pytest.TempPathFactory, run_in: RunIn) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("hf")
    draw_pictures(folder / "pictures")
    data = "--data=FolderDataModule --data.root=pictures --data.num_workers=0 --data.batch_size=8"
    run = "--trainer.accelerator=cpu --trainer.max_steps=2 --trainer.enable_progress_bar=false --reference=false"
    with run_in(folder):
        main(
            f"fit --model.backbone={names['vit']} --model.weights=DEFAULT --model.loss=ContrastiveLoss "
            f"--model.embedding_dim=8 {data} {run}".split()
        )
        Path(names["vit"].removeprefix("hf:")).rename(folder / "moved")  # the checkpoint needs neither hub nor folder
        yield folder


def test_a_checkpoint_holds_the_architecture_and_the_images(trained: Path) -> None:
    config = read_yaml(read_checkpoint(trained / LAST)[CONFIG_IN_CHECKPOINT], "last.ckpt")
    assert config["model"]["backbone"]["init_args"]["config"]["model_type"] == "vit"
    assert config["data"]["init_args"]["image_size"] == 32
    assert config["data"]["init_args"]["interpolation"] == "bicubic"


def test_every_command_uses_it(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["test", "--ckpt_path", LAST, "--trainer.accelerator", "cpu"])
    main(["index", "--ckpt_path", LAST, "--output", "index"])
    main(["search", "pictures/7/0.png", "--index", "index"])
    main(["export", "--ckpt_path", LAST, "--output", "exported", "--formats", "[torch]"])  # compared with the network
    main(["freeze", "pictures", "features.npz", "--backbone", "hf:moved", "--weights", "DEFAULT", "--views", "1"])
    out = capsys.readouterr().out
    assert "7/0.png" in out
    assert "32 images x 1 views x 32 features" in out


def test_in_python(trained: Path, tmp_path: Path) -> None:
    learner = MetricLearner("hf:moved", ContrastiveLoss(), weights="DEFAULT", pooling="average", embedding_dim=8)
    assert isinstance(learner.model.backbone, HuggingFaceModel)
    data = FolderDataModule("pictures", batch_size=8, num_workers=0, **learner.preprocessing)
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=2, enable_checkpointing=False, **options)
    trainer.fit(learner, data)
    learner.save(tmp_path / "a.ckpt")
    again = MetricLearner.load(tmp_path / "a.ckpt")
    assert again.embed("pictures", progress=False).allclose(learner.embed("pictures", progress=False), atol=1e-6)
