"""What a file may ask for is bounded as a whole, and before it is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import resnet18

from lightning_memdml import ContrastiveLoss, MetricLearner, SmallConvNet
from lightning_memdml.runs import read_checkpoint
from lightning_memdml.trust import UntrustedFileError, allowed_config, build
from lightning_memdml.trust_sizes import LimitedTensors, limited_tensors, requested_bytes


def test_a_network_is_the_same_within_the_limit() -> None:
    torch.manual_seed(0)
    plain = resnet18()
    torch.manual_seed(0)
    with LimitedTensors("last.ckpt") as limit:
        limited = resnet18()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), limited.parameters(), strict=True))
    assert limit.total >= sum(parameter.nbytes for parameter in limited.parameters())


@pytest.mark.parametrize(
    "spec",
    [
        {"class_path": "torchvision.models.resnet50", "init_args": {"width_per_group": 16_384}},
        {"class_path": "torchvision.models.vit_b_16", "init_args": {"image_size": 1_600_000}},
        {"class_path": "torchvision.models.mobilenet_v2", "init_args": {"width_mult": 1000.0}},
    ],
    ids=lambda spec: spec["class_path"].rpartition(".")[2],
)
def test_options_that_make_a_network_huge_are_refused_before_it_is_allocated(spec: dict[str, Any]) -> None:
    allowed = allowed_config({"model": {"backbone": spec}}, "last.ckpt")["model"]["backbone"]  # each number is allowed
    expected = r"^Expected last.ckpt to build tensors of at most 8.0 GB but got [\d.]+ GB"
    with pytest.raises(ValueError, match=expected), limited_tensors("last.ckpt"):
        build(torch.nn.Module, allowed)


def test_a_head_between_two_allowed_widths_is_refused(tmp_path: Path) -> None:
    options = {"backbone": "SmallConvNet", "loss": "ContrastiveLoss", "embedding_dim": 16_384, "num_features": 10**6}
    torch.save({"state_dict": {}, "hyper_parameters": {**options, "_instantiator": "x"}}, tmp_path / "huge.ckpt")
    with pytest.raises(ValueError, match=r"to build tensors of at most 8.0 GB but got 65.5 GB"):
        MetricLearner.load_from_checkpoint(tmp_path / "huge.ckpt")


def test_the_limit_is_that_of_one_thread_and_ends_with_the_block() -> None:
    with pytest.raises(ValueError, match="at most 0"), LimitedTensors("x", limit=10):
        torch.zeros(100)
    assert len(torch.zeros(100)) == 100


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (
            {"data": {"class_path": "FolderDataModule", "init_args": {"batch_size": 65_536, "image_size": 4096}}},
            "data.batch_size",
        ),
        (
            {"data": {"class_path": "FolderDataModule", "init_args": {
                "batch_size": 500_000,
                "test_transform": {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [512, 9]}},
            }}},
            "data.batch_size",
        ),
        (
            {
                "model": {"embedding_dim": 16_384},
                "trainer": {"callbacks": [{"class_path": "MemoryCallback", "init_args": {"size": 10**6}}]},
            },
            r"trainer.callbacks\[0\].size",
        ),
        (
            {"trainer": {"callbacks": 3 * [{"class_path": "MemoryCallback", "init_args": {"size": 8 * 10**6}}]}},
            r"trainer.callbacks\[0\].size, trainer.callbacks\[1\].size, trainer.callbacks\[2\].size",
        ),
    ],
    ids=["batches", "transforms", "memory", "three memories"],
)  # fmt: skip
def test_sizes_are_bounded_together(config: dict[str, Any], names: str) -> None:
    with pytest.raises(UntrustedFileError, match=rf"^Expected x to ask for at most 8 GB but {names} ask for \d+ GB"):
        allowed_config(config, "x")
    assert allowed_config(config, "x", trust=True)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**6, 10**4),
        torch.zeros(3).as_strided((10**9, 3), (0, 1)),
        torch.sparse_coo_tensor(
            torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (10**6, 10**6), check_invariants=True
        ),
        torch.empty(10**9, device="meta"),
    ],
    ids=["expanded", "strided", "sparse", "meta"],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_a_tensor_that_the_file_does_not_hold_is_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    """A few bytes would become gigabytes where it is copied."""
    learner = MetricLearner(SmallConvNet(width=4), ContrastiveLoss())
    path = tmp_path / "forged.ckpt"
    torch.save({"state_dict": learner.state_dict(), "callbacks": {"MemoryCallback": {"rows": [tensor]}}}, path)
    with pytest.raises(ValueError, match="sparse, or larger than what is stored of it"):
        read_checkpoint(path)
    torch.save({"state_dict": learner.state_dict(), "shared": [torch.zeros(4), torch.zeros(2, 2).T]}, path)
    assert read_checkpoint(path)


def test_the_rows_of_a_single_callback_and_of_a_list_are_counted() -> None:
    callback = {"class_path": "MemoryCallback", "init_args": {"size": 1000}}
    for callbacks in (callback, [callback]):
        config = {"model": {"embedding_dim": 8}, "trainer": {"callbacks": callbacks}}
        assert requested_bytes(config) == {"trainer.callbacks[0].size": 4 * 8 * 1000}
