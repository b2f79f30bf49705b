"""What `lightning_memdml/compat.py` relies on is there, on every supported version of torch and Lightning."""

import warnings

import pytest
import torch
import torch.distributed as dist

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
