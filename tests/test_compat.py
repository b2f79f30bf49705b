"""What `lightning_memdml/compat.py` relies on is there, on every supported version of torch and Lightning."""

import copy
import warnings

import jsonargparse
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.compile import from_compiled
from support.children import run_python
from torch.utils.data import DataLoader

from lightning_memdml import compat


@pytest.fixture(name="one_rank")
def _one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("strategy", "method"), [("ddp_spawn", "spawn"), ("ddp_fork", "fork"), ("ddp_notebook", "fork"), ("ddp", None)]
)
def test_the_way_in_which_ranks_start_is_known(strategy, method):
    trainer = Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False, enable_checkpointing=False)
    assert compat.ranks_start_method(trainer) == method


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

    def named(name):
        return lambda *tensors, async_op: called.append((name, *tensors, async_op))

    monkeypatch.setattr(dist, "all_gather_into_tensor", named("old"))
    monkeypatch.setattr(dist, "all_gather_single", named("new"), raising=False)
    if not new:
        monkeypatch.delattr(dist, "all_gather_single")
    compat.all_gather_single("output", "input")
    compat.all_gather_single("output", "input", async_op=True)
    name = "new" if new else "old"
    assert called == [(name, "output", "input", False), (name, "output", "input", True)]


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


@pytest.mark.parametrize("pairs", [[(0, 2), (0, 3), (2, 0)], [(1, 1)], []])
def test_products_of_pairs_are_those_of_the_whole_matrix_without_a_warning(pairs):
    code = f"""
import warnings, torch
warnings.simplefilter("error")
from lightning_memdml import compat
from support.children import run_python
pairs, x, r = {pairs}, torch.randn(3, 5), torch.randn(4, 5)
rows, columns = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
starts = torch.tensor([sum(row < k for row, _ in pairs) for k in range(4)])
found = compat.products_of_pairs(starts, columns, x, r)
torch.testing.assert_close(found, (x @ r.T)[rows, columns])
"""
    run_python("-c", code)


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


def test_a_dynamic_length_is_not_compiled_again():
    """In a process of its own: torch 2.10 compiles nothing after functions it must not compile ran in threads."""
    code = """
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from lightning_memdml import compat
counter = CompileCounterWithBackend("eager")
compiled = torch.compile(lambda tensor: tensor * 2, backend=counter)
for length in (3, 4, 7):
    tensor = torch.ones(length)
    compat.mark_dynamic(tensor, 0)
    compiled(tensor)
assert counter.frame_count == 1, counter.frame_count
"""
    run_python("-c", code)


def test_tensors_move_towards_their_targets_together():
    tensors, targets = [torch.zeros(2), torch.ones(3)], [torch.ones(2), torch.zeros(3)]
    compat.move_towards_(tensors, targets, weight=0.25)
    torch.testing.assert_close(tensors, [torch.full((2,), 0.25), torch.full((3,), 0.75)])


def test_the_forward_of_a_compiled_module_is_found_in_its_copy():
    """Lightning compiles in place: the copy of such a module would run the network it was copied from."""

    class Net(LightningModule):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.linear(x)

    compiled = from_compiled(torch.compile(Net(), backend="eager"))
    copied = copy.deepcopy(compiled)
    assert "forward" in vars(copied), "upstream no longer stores the compiled function: `restore_forward` can go"
    compat.restore_forward(copied)
    with torch.no_grad():
        copied.linear.weight.zero_()
        copied.linear.bias.zero_()
    assert torch.equal(copied(torch.ones(1, 2)), torch.zeros(1, 2))


@pytest.mark.parametrize("given", ["loader", "module"])
def test_the_training_data_is_known_before_it_is_loaded(given):
    found = []

    class Look(Callback):
        def setup(self, trainer, pl_module, stage):
            found.append(compat.given_training_data(trainer))

    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader

    loader, data = DataLoader([torch.ones(32)]), Data()
    flags = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_steps=1, enable_model_summary=False, callbacks=[Look()], **flags)
    trainer.fit(BoringModel(), loader if given == "loader" else data)
    assert found == [loader if given == "loader" else data]


def test_every_batch_norm_of_torch_is_known():
    batch_norms = [getattr(torch.nn, name) for name in dir(torch.nn) if "BatchNorm" in name and "Lazy" not in name]
    assert set(compat.BATCH_NORMS) == set(batch_norms)


def test_assert_async_raises_with_its_message_for_a_false_condition_only():
    compat.assert_async(torch.tensor(True), "the reason")
    with pytest.raises(RuntimeError, match="the reason"):
        compat.assert_async(torch.tensor(False), "the reason")


def test_a_loader_keeps_its_workers_in_its_iterator():
    loader = DataLoader(torch.arange(4), num_workers=1, persistent_workers=True)
    assert compat.loader_iterator(loader) is None
    assert [int(batch) for batch in loader] == [0, 1, 2, 3]
    iterator = compat.loader_iterator(loader)
    iterator._shutdown_workers()
    compat.set_loader_iterator(loader, None)
    assert compat.loader_iterator(loader) is None


def test_in_place_changes_are_counted_through_every_view():
    table = torch.zeros(4, 3)
    before = compat.in_place_changes(table)
    for change in (
        lambda: table[1:3].fill_(1.0),
        lambda: table.detach().mul_(2.0),
        lambda: table[torch.tensor([0, 2])].mul_(2.0),  # a copy: nothing in the table has changed
        lambda: table.view(-1).copy_(torch.arange(12.0)),
        lambda: table.__setitem__(torch.tensor([0, 2]), 0.0),
    ):
        old, values = compat.in_place_changes(table), table.clone()
        change()
        assert (compat.in_place_changes(table) > old) == (not table.equal(values))
    with torch.inference_mode():
        table.add_(1.0)
        assert compat.in_place_changes(torch.zeros(2)) is None
    assert compat.in_place_changes(table) == before + 5
