"""A transformer of timm and a convolutional network of torchvision, from training to index, search and export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_memdml import MetricLearner
from lightning_memdml.cli import main
from lightning_memdml.data.transforms import EvaluationTransform
from lightning_memdml.inference.export import FLOOR, MARGIN

RunIn = Callable[[Path], AbstractContextManager[None]]
LAST = "runs/memdml/version_0/checkpoints/last.ckpt"
NETWORKS = {
    "timm transformer": "--model.backbone=timm:test_vit --model.pooling=average",
    "torchvision": "--model.backbone=resnet18 --model.pooling=gem",
}
REST = (
    "--model.loss=ContrastiveLoss --model.embedding_dim=8 --model.head_init=whitening --model.layer_decay=0.7 "
    "--model.lr_scheduler=WarmupCosine --data=FolderDataModule --data.root=pictures --data.num_workers=0 "
    "--data.batch_size=8 --data.val_fraction=0 --data.image_size=64 --data.mean=[0.5,0.5,0.5] --data.std=[0.5,0.5,0.5] "
    "--data.crop_pct=0.875 --data.interpolation=bilinear "
    "--trainer.accelerator=cpu --trainer.max_steps=2 --trainer.enable_progress_bar=false"
)


@pytest.fixture(scope="module", params=list(NETWORKS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, run_in: RunIn) -> Iterator[Path]:
    """A folder with pictures and a run of two steps with a memory, whose head was fitted."""
    if "timm" in request.param:
        pytest.importorskip("timm", reason="the extra `timm`")
    folder, draw = tmp_path_factory.mktemp("network"), np.random.default_rng(0)
    for label in range(8):
        (folder / f"pictures/{label}").mkdir(parents=True)
        for number in range(4):
            blocks = Image.fromarray(draw.integers(0, 255, (5, 7, 3), dtype=np.uint8))
            blocks.resize((80 + 5 * number, 70)).save(folder / f"pictures/{label}/{number}.png")
    with run_in(folder):
        main(f"fit {NETWORKS[request.param]} {REST} --trainer.callbacks=MemoryCallback".split())
        yield folder


def embed(files: list[Path]) -> tuple[torch.Tensor, np.ndarray]:
    """Images, and their embeddings by the network of the checkpoint."""
    learner = MetricLearner.load_from_checkpoint(LAST).eval()
    transform = EvaluationTransform(64, mean=[0.5] * 3, std=[0.5] * 3)
    images = torch.stack([transform(Image.open(file)) for file in files])
    with torch.no_grad():
        return images, learner(images).numpy()


def test_index_and_search_use_the_trained_network(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(trained.glob("pictures/*/*.png"))
    _, expected = embed(files)
    main(f"index --ckpt_path {LAST} --source pictures --output index".split())
    np.testing.assert_allclose(np.load("index/embeddings.npy"), expected, atol=1e-5)
    assert np.abs(expected[1:] - expected[0]).max() > 0.1, "the fitted head tells images apart"
    capsys.readouterr()
    main(["search", "pictures/3/1.png", "--index", "index"])
    first = next(line for line in capsys.readouterr().out.splitlines() if ".png" in line and "3/1" not in line)
    similarity = expected @ expected[files.index(trained / "pictures/3/1.png")]
    second = files[int(np.argsort(-similarity)[1])]
    assert f"{second.parent.name}/{second.name}" in first


def resamples_otherwise() -> bool:
    """Whether the ONNX exporter resamples position embeddings otherwise than torch, which moves embeddings by 5e-4.

    That of torch 2.10 with onnxscript 0.5 does. Only the transformer has position embeddings.
    """
    is_old = tuple(map(int, torch.__version__.split(".")[:2])) <= (2, 10)
    return is_old and any("pos_embed" in name for name, _ in MetricLearner.load(LAST).named_parameters())


def test_exported_files_equal_the_network(trained: Path) -> None:
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed, reason="the extra `export`")
    import onnxruntime

    images, expected = embed(sorted(trained.glob("pictures/*/*.png"))[:5])
    if resamples_otherwise():
        with pytest.raises(SystemExit, match=r"Expected model\.onnx to equal the network to .* but it differs by"):
            main(f"export --ckpt_path {LAST} --output exported".split())
        assert not Path("exported/model.onnx").exists()
        main(f"export --ckpt_path {LAST} --output exported --formats [torch]".split())
        return
    main(f"export --ckpt_path {LAST} --output exported".split())
    session = onnxruntime.InferenceSession("exported/model.onnx")
    (by_onnx,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    learner = MetricLearner.load_from_checkpoint(LAST).eval()
    with torch.no_grad():
        exact = learner.double()(images.double()).numpy()
    # The command compares on noise, and this test on photographs.
    bound = MARGIN * np.abs(expected - exact).max() + FLOOR
    np.testing.assert_allclose(by_onnx, exact, rtol=0, atol=bound)
    program = torch.export.load("exported/model.pt2").module()
    np.testing.assert_allclose(program(images).detach().numpy(), exact, rtol=0, atol=bound)
