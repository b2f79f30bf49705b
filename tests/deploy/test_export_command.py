"""``memdml export``: what is written computes what the network does, from image files, without this package."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support.children import run_python
from torchvision.transforms import v2

from lightning_memdml import ContrastiveLoss, MetricLearner
from lightning_memdml.cli import main
from lightning_memdml.data.images import upright
from lightning_memdml.data.transforms import EvaluationTransform
from lightning_memdml.deploy.export_command import export_model
from lightning_memdml.deploy.trained import load_learner
from lightning_memdml.inference import export
from lightning_memdml.inference.sources import FromFile

RunIn = Callable[[Path], AbstractContextManager[None]]
LAST = "runs/memdml/version_0/checkpoints/last.ckpt"
NETS = {
    "glyphs": "--model.backbone=SmallConvNet --model.backbone.width=4 --data.num_classes=20",
    "photographs": "--model.backbone=SmallConvNet --model.backbone.width=4 --model.backbone.in_channels=3 "
    "--data=FolderDataModule --data.root=pictures --data.image_size=40 --data.num_workers=0",
}
REST = "--model.loss=ContrastiveLoss --model.embedding_dim=8 --data.batch_size=8 --data.val_fraction=0"
RUN = "--trainer.accelerator=cpu --trainer.max_steps=60 --trainer.max_epochs=-1 --trainer.enable_progress_bar=false"


@pytest.fixture(scope="module", params=list(NETS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, run_in: RunIn) -> Iterator[Path]:
    """A folder with a checkpoint and all that is exported from it."""
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed, reason="the extra `export`")
    folder = tmp_path_factory.mktemp(request.param)
    generator = np.random.default_rng(0)
    for label in range(8):
        (folder / "pictures" / str(label)).mkdir(parents=True)
        for number in range(4):
            blocks = generator.integers(0, 255, (5, 7, 3), dtype=np.uint8)
            picture = Image.fromarray(blocks).resize((70 + 5 * number, 50 + 3 * label))
            picture.save(folder / "pictures" / str(label) / f"{number}.png")
    with run_in(folder):
        main(f"fit {NETS[request.param]} {REST} {RUN}".split())
        main(f"export --ckpt_path {LAST} --output exported".split())
        yield folder


def prepared(path: Path | io.BytesIO, description: dict[str, Any]) -> np.ndarray:
    """What the file beside the model says, done with Pillow and NumPy alone."""
    image: Any = Image.open(path)
    for step in description["steps"]:
        if step["do"] == "decode":
            image = ImageOps.exif_transpose(image).convert(step["mode"])
        if step["do"] == "resize_shorter_side":
            assert (step["longer_side"], step["interpolation"]) == ("truncate", "bilinear")
            short, size = min(image.size), step["size"]
            image = image.resize([size if side == short else int(size * side / short) for side in image.size], 2)
        if step["do"] == "resize":
            assert step["interpolation"] == "bicubic"
            image = image.resize(step["size"][::-1], 3)
        if step["do"] == "center_crop":
            height, width = step["size"]
            left, upper = round((image.width - width) / 2), round((image.height - height) / 2)
            image = image.crop((left, upper, left + width, upper + height))
        if step["do"] == "scale":
            pixels = np.asarray(image, dtype=np.float32).reshape(image.height, image.width, -1) / step["divide_by"]
            image = pixels.transpose(2, 0, 1)
        if step["do"] == "normalize":
            mean, std = (np.float32(step[name])[:, None, None] for name in ("mean", "std"))
            image = (image - mean) / std
    assert image.shape == tuple(description["input"]["shape"][1:])
    return image.astype(np.float32)


def test_exported_models_give_an_image_file_the_embedding_it_has_in_this_package(exported: Path) -> None:
    """From the file to the embedding, by the written preprocessing; any number of images at a time."""
    import onnxruntime

    files = sorted(exported.glob("pictures/*/*.png"))[:9]
    description = json.loads((exported / "exported/preprocessing.json").read_text())
    images = np.stack([prepared(file, description) for file in files])
    main(["index", "--ckpt_path", LAST, "--source", "pictures", "--output", "index"])
    expected = np.load(exported / "index/embeddings.npy")[:9]
    session = onnxruntime.InferenceSession(exported / "exported/model.onnx")
    program = torch.export.load(exported / "exported/model.pt2").module()
    for size in (1, 2, 9):
        (onnx,) = session.run([description["output"]["name"]], {description["input"]["name"]: images[:size]})
        # Pillow and torch resize alike, to one or two of 255 steps of a pixel.
        np.testing.assert_allclose(onnx, expected[:size], atol=1e-2)
        torch_embeddings = program(torch.from_numpy(images[:size])).detach().numpy()
        np.testing.assert_allclose(torch_embeddings, onnx, atol=1e-5)
    assert np.abs(expected[1:] - expected[0]).max() > 0.05  # a network that tells images apart
    np.testing.assert_allclose(np.linalg.norm(onnx, axis=1), 1, atol=1e-5)


def test_the_written_preprocessing_is_that_of_the_package() -> None:
    """To one of 255 steps of a pixel, on pictures that are high, wide, grey or turned by their camera."""
    transform = EvaluationTransform(40)
    description = {"steps": export.steps_of(FromFile(transform, None)), "input": {"shape": ["batch", 3, 40, 40]}}
    generator = np.random.default_rng(0)
    for size, mode in (((90, 61), "RGB"), ((40, 200), "RGB"), ((46, 46), "L"), ((20, 33), "RGB")):
        picture = Image.fromarray(generator.integers(0, 255, (7, 5, 3), dtype=np.uint8)).resize(size).convert(mode)
        exif = picture.getexif()
        exif[0x0112] = 6  # turned by a quarter
        buffer = io.BytesIO()
        picture.save(buffer, "png", exif=exif)
        expected = transform(upright(Image.open(buffer))).numpy()
        assert np.abs(prepared(buffer, description) - expected).max() <= 1.01 / 255 / 0.224


ONE_NETWORK = pytest.mark.parametrize("exported", ["glyphs"], indirect=True)


@ONE_NETWORK
def test_the_program_runs_without_this_package(exported: Path) -> None:
    shape = json.loads((exported / "exported/preprocessing.json").read_text())["input"]["shape"][1:]
    code = (
        "import sys; sys.modules['lightning_memdml'] = None; import torch; "
        "m = torch.export.load('exported/model.pt2').module(); "
        f"print(m(torch.zeros(3, *{shape})).shape)"
    )
    assert run_python("-c", code, cwd=exported).stdout.strip() == "torch.Size([3, 8])"


@ONE_NETWORK
def test_nothing_unfinished_is_left(exported: Path) -> None:
    names = sorted(path.name for path in (exported / "exported").iterdir())
    assert names == ["model.onnx", "model.pt2", "preprocessing.json"]


@ONE_NETWORK
def test_a_model_that_differs_from_the_network_is_not_kept(
    exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def another(model: torch.nn.Module, shape: Any, path: Path) -> None:
        learner = load_learner(LAST)
        learner.model.head.weight.data.mul_(-1)
        export._write_program(learner.model, shape, path)

    monkeypatch.setitem(export.WRITERS, "torch", (another, export._read_program))
    numbers = r"to \d\.\de-0\d \(its own rounding in float32 is \d\.\de-0\d\) but it differs by \d\.\de[+-]0\d"
    with pytest.raises(
        SystemExit, match=rf"Expected model.pt2 to equal the network {numbers}\. The file was not kept\. P"
    ):
        main(f"export --ckpt_path {LAST} --formats [torch] --output {tmp_path}".split())
    assert not list(tmp_path.iterdir())


@ONE_NETWORK
def test_without_the_extra_its_name_is_given(exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        ImportError, match=r"Expected onnxscript for ONNX but it is not installed.*lightning-memdml\[export\]"
    ):
        export_model(LAST, str(tmp_path), ["onnx"])
    with pytest.raises(SystemExit, match=r"error: Expected onnxscript for ONNX but it is not installed"):
        main(f"export --ckpt_path {LAST} --formats [onnx] --output {tmp_path}".split())
    export_model(LAST, str(tmp_path), ["torch"])


def test_a_backbone_of_torchvision_is_exported_with_its_check_of_channels(tmp_path: Path) -> None:
    learner = MetricLearner("shufflenet_v2_x0_5", ContrastiveLoss(), embedding_dim=8).eval()
    export._write_program(learner.model, (3, 48, 40), tmp_path / "model.pt2")
    program = export._read_program(tmp_path / "model.pt2")
    assert export.Comparison(learner.model, (3, 48, 40)).difference("model.pt2", program) < 1e-5


class Network(torch.nn.Module):
    """Unit embeddings by an activation that can be approximated, and by a head that magnifies its rounding."""

    def __init__(self, approximate: str = "none", magnify: float = 1.0) -> None:
        super().__init__()
        self.layer, self.activation = torch.nn.Linear(48, 32), torch.nn.GELU(approximate=approximate)
        self.magnify = magnify
        torch.nn.init.normal_(self.layer.weight, 0, 0.2, generator=torch.Generator().manual_seed(0))
        torch.nn.init.zeros_(self.layer.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.activation(self.layer(images.flatten(1)))
        moved = features + self.magnify  # the digits that the sum loses stay lost
        return torch.nn.functional.normalize(moved - self.magnify, dim=1)


def test_an_approximation_below_a_thousandth_is_refused() -> None:
    """The bound is the rounding of the network: a fixed bound would let an approximated activation pass."""
    check = export.Comparison(Network(), (3, 4, 4))
    assert check.rounding is not None
    assert check.bound == export.MARGIN * check.rounding + export.FLOOR
    assert check.bound < 1e-5
    assert check.difference("same", Network()) == 0
    approximated = Network("tanh")
    with torch.no_grad():
        off = float((approximated(check._images[1]) - Network()(check._images[1])).abs().max())
    assert check.bound < off < export.CLOSE
    with pytest.raises(ValueError, match=r"^Expected model\.onnx to equal the network to "):
        check.difference("model.onnx", approximated)


def test_a_network_that_rounds_more_is_kept_with_its_rounding() -> None:
    """Sums in another order change a network that magnifies its rounding by more than a fixed bound would allow."""
    network = Network(magnify=1e4)
    check = export.Comparison(network, (3, 4, 4))

    def other_order(images: torch.Tensor) -> torch.Tensor:
        features = network.activation(network.layer(images.flatten(1)))
        moved = features + 0.7 * network.magnify + 0.3 * network.magnify
        return torch.nn.functional.normalize(moved - network.magnify, dim=1)

    assert check.difference("model.onnx", other_order) > 1e-5
    assert check.rounding is not None
    assert check.rounding > 1e-5


class OnlyFloat32(Network):
    """Converts its features before a layer with weights, so that its copy in float64 cannot run."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(self.layer(images.flatten(1).float()), dim=1)


class NoCopy(Network):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("holds a lock")


@pytest.mark.parametrize("kind", [OnlyFloat32, NoCopy])
def test_without_a_copy_in_float64_a_fixed_bound_remains(kind: type[Network]) -> None:
    network = kind()
    check = export.Comparison(network, (3, 4, 4))
    assert check.rounding is None
    assert check.bound == export.CLOSE
    assert check.difference("model.onnx", network) == 0
    with pytest.raises(ValueError, match=r"^Expected model.onnx to equal the network to 1\.0e-03 but it differs by "):
        check.difference("model.onnx", lambda images: -network(images))
    assert network.layer.weight.dtype == torch.float32


def test_an_exported_network_that_gives_nan_is_refused() -> None:
    check = export.Comparison(Network(), (3, 4, 4))
    with pytest.raises(ValueError, match="but it differs by nan"):
        check.difference("model.onnx", lambda images: torch.nan * Network()(images))


def test_every_step_of_a_transform_is_described_or_refused() -> None:
    steps = export.steps_of(FromFile(EvaluationTransform(97), None))
    assert [step["do"] for step in steps] == ["decode", "resize_shorter_side", "center_crop", "scale", "normalize"]
    assert steps[1]["size"] == round(97 * 256 / 224)
    with pytest.raises(ValueError, match="but got GaussianBlur"):
        export.steps_of(FromFile(v2.Compose([v2.ToImage(), v2.GaussianBlur(3)]), None))
    written_out = [v2.Resize(46), v2.CenterCrop(40), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    steps = export.steps_of(FromFile(v2.Compose([*written_out, v2.Normalize((0.5,), (0.2,))]), None))
    assert [step["do"] for step in steps] == ["decode", "resize_shorter_side", "center_crop", "scale", "normalize"]

    class More(v2.Compose):
        def forward(self, image: Any) -> Any:
            return -super().forward(image)

    with pytest.raises(ValueError, match="but got More"):
        export.steps_of(FromFile(More(written_out), None))
    with pytest.raises(ValueError, match="but got function"):
        export.steps_of(FromFile(lambda image: image, None))
