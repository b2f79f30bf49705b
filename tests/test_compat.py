"""What `lightning_memdml/compat.py` relies on is there, on every supported version of torch and Lightning."""

import warnings

import jsonargparse
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import Logger

from lightning_memdml import compat


@pytest.fixture(name="one_rank")
def _one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_all_gather_single_gathers_without_a_deprecated_call():
    sent, received = torch.arange(6, dtype=torch.int32).view(2, 3), torch.zeros(2, 3, dtype=torch.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.all_gather_single(received, sent)
    assert torch.equal(received, sent)


@pytest.mark.parametrize("new", [True, False])
def test_all_gather_single_calls_the_new_name_where_torch_has_it(monkeypatch, new):
    called = []
    monkeypatch.setattr(dist, "all_gather_into_tensor", lambda *tensors: called.append(("old", *tensors)))
    monkeypatch.setattr(dist, "all_gather_single", lambda *tensors: called.append(("new", *tensors)), raising=False)
    if not new:
        monkeypatch.delattr(dist, "all_gather_single")
    compat.all_gather_single("output", "input")
    assert called == [("new" if new else "old", "output", "input")]


@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("new", [True, False])
def test_avx512_bf16_is_read_from_the_public_function_or_else_from_the_private_one(monkeypatch, new, has):
    if new:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has}, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: not has, raising=False)
    else:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)
    assert compat.has_avx512_bf16.__wrapped__() is has


def test_this_torch_has_a_function_that_knows_avx512_bf16():
    """Fails when upstream drops both: every CPU would then be taken for one without fast bfloat16 products."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        assert "avx512_bf16" in capabilities or capabilities["architecture"] != "x86_64"
    else:
        assert torch.cpu._is_avx512_bf16_supported() in (True, False)


def test_argparse_asks_the_help_formatter_for_the_help_of_an_option() -> None:
    """If the name of the private hook changes, hundreds of classes are listed in the help again."""
    parser = jsonargparse.ArgumentParser(formatter_class=compat.help_formatter(40))
    parser.add_argument("--net", type=torch.nn.Module, help="A network")
    parser.add_argument("--trainer", type=Logger, help="A logger")
    text = " ".join(parser.format_help().split())
    assert "A network (type: " in text
    assert "Conv2d" not in text
    assert "known subclasses: lightning.pytorch.loggers." in text
