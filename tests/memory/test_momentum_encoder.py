"""MomentumEncoder against the formula, and what it must leave alone."""

from __future__ import annotations

import copy
import io
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_memdml.memory.momentum_encoder import MomentumEncoder, frozen_inference


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.ReLU(), nn.Linear(8, 4))


def step(net: nn.Module, seed: int) -> None:
    """Move the weights and the running statistics, as a training step does."""
    generator = torch.Generator().manual_seed(seed)
    net(torch.randn(5, 6, generator=generator).to(next(net.parameters()).dtype))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


@given(momentum=st.floats(0, 0.999), ramp=st.floats(1, 50), updates=st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_weights_are_the_average_of_the_formula_and_buffers_those_of_the_encoder(
    momentum: float, ramp: float, updates: int
) -> None:
    net = network()
    keys = MomentumEncoder(net, momentum, ramp)
    expected = {name: value.detach().double() for name, value in net.named_parameters()}
    for t in range(updates):
        step(net, t)
        keys.update(net)
        now = min(momentum, (1 + t) / (ramp + t))
        for name, value in net.named_parameters():
            expected[name] = now * expected[name] + (1 - now) * value.detach().double()
    for name, value in keys.module.named_parameters():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    for (_, ours), (_, theirs) in zip(keys.module.named_buffers(), net.named_buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert keys.updates == updates


def test_a_bfloat16_encoder_is_averaged_in_float32() -> None:
    """In bfloat16 an average of momentum 0.999 would stand still: the spacing of its numbers is 0.8 %."""
    net = network().bfloat16()
    keys = MomentumEncoder(net, momentum=0.999, ramp=1)
    before = keys.module[0].weight.clone()
    with torch.no_grad():
        net[0].weight.add_(1)
    keys.update(net)
    assert {parameter.dtype for parameter in keys.module.parameters()} == {torch.float32}
    torch.testing.assert_close(keys.module[0].weight, before + 0.001 * (net[0].weight.float() - before))
    assert keys(torch.randn(3, 6, dtype=torch.bfloat16)).dtype is torch.float32


def test_by_the_batch_it_normalises_as_the_training_network_does() -> None:
    net, images = network(), torch.randn(5, 6)
    keys = MomentumEncoder(net, momentum=0, batch_norm="batch")
    step(net, 0)
    keys.update(net)
    assert torch.equal(keys(images), net(images))


def test_by_running_statistics_a_row_does_not_depend_on_its_batch() -> None:
    net, images = network(), torch.randn(5, 6)
    keys = MomentumEncoder(net, momentum=0, batch_norm="running")
    step(net, 0)
    keys.update(net)
    torch.testing.assert_close(keys(images)[:2], keys(images[:2]))
    assert torch.equal(keys(images), net.eval()(images))


@pytest.mark.parametrize("batch_norm", ["batch", "running"])
def test_frozen_batch_norms_stay_frozen(batch_norm: str) -> None:
    net, images = network(), torch.randn(5, 6)
    net[1].eval()
    keys = MomentumEncoder(net, momentum=0, batch_norm=batch_norm)
    torch.testing.assert_close(keys(images), net(images))
    net[1].train()  # unfrozen later
    keys.update(net)
    assert keys.module[1].training is (batch_norm == "batch")


@pytest.mark.parametrize("batch_norm", ["batch", "running"])
def test_calling_it_leaves_encoder_copy_and_random_numbers_alone(batch_norm: str) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(dropout=0.5)

        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.dropout(self.net(images), 0.1, training=True)  # in spite of the mode

    net = Noisy()
    keys = MomentumEncoder(net, batch_norm=batch_norm)
    before, own = copy.deepcopy(net.state_dict()), keys.state_dict()["weights"]
    state = torch.get_rng_state()
    rows = keys(torch.randn(4, 6, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), state)
    assert not rows.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(value, own[name]) for name, value in keys.module.state_dict().items())
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize("batch_norm", ["batch", "running"])
def test_reading_a_network_in_training_leaves_no_trace(batch_norm: str) -> None:
    net = network(dropout=0.5)
    net[1].eval()
    images, before, state = torch.randn(4, 6), copy.deepcopy(net.state_dict()), torch.get_rng_state()
    with frozen_inference(net, batch_norm):
        rows = net(images)
    assert torch.equal(torch.get_rng_state(), state)
    assert not rows.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == [True, True, False, True, True, True]
    assert net[1].track_running_stats
    assert torch.equal(rows, net.eval()(images)), "a frozen batch norm uses its statistics in both ways"


def test_a_broken_forward_leaves_the_network_in_its_mode() -> None:
    net = network()
    with pytest.raises(RuntimeError), frozen_inference(net, "running"):
        net(torch.randn(4, 7))
    assert all(module.training for module in net.modules())


@given(before=st.integers(0, 6), after=st.integers(1, 6))
@settings(max_examples=15, deadline=None)
def test_a_restored_encoder_goes_on_as_if_never_stopped(before: int, after: int) -> None:
    net = network()
    keys = MomentumEncoder(net, 0.9)
    for t in range(before):
        step(net, t)
        keys.update(net)
    file = io.BytesIO()
    torch.save(keys.state_dict(), file)
    file.seek(0)
    restored = MomentumEncoder(net, 0.9)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for t in range(before, before + after):
        step(net, t)
        keys.update(net)
        restored.update(net)
    for name, value in keys.module.state_dict().items():
        assert torch.equal(value, restored.module.state_dict()[name])
    assert restored.updates == before + after


def test_the_state_of_another_network_is_refused() -> None:
    keys = MomentumEncoder(network())
    with pytest.raises(ValueError, match=r"another network.*`0.weight` of shape \(3, 6\) instead of \(8, 6\)"):
        keys.load_state_dict(MomentumEncoder(nn.Sequential(nn.Linear(6, 3))).state_dict())


def test_a_network_that_cannot_be_copied_is_built_by_a_factory() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.last: Tensor | None = None

        def forward(self, images: Tensor) -> Tensor:
            self.last = self.net(images)
            return self.last

    net, images = Cached(), torch.randn(5, 6)
    net(images)
    with pytest.raises(TypeError, match=r"Cached cannot be copied.*`encoder_factory=` of MemoryCallback"):
        MomentumEncoder(net)

    def other() -> Cached:
        built = Cached()
        for parameter in built.parameters():
            nn.init.zeros_(parameter)
        return built

    keys = MomentumEncoder(net, 0, factory=other)
    assert torch.equal(keys(images), net(images))
    with pytest.raises(ValueError, match=r"Expected the factory to build .* of Cached but got `weight` of shape"):
        MomentumEncoder(net, factory=lambda: nn.Linear(6, 4))


def test_shared_weights_stay_shared_and_compiled_parts_are_copies() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.compiled = torch.compile(nn.Linear(4, 4), backend="eager")

        def forward(self, images: Tensor) -> Tensor:
            return self.compiled(self.second(self.first(images)))

    torch._dynamo.reset()
    net, images = Tied(), torch.randn(3, 4)
    net(images)
    keys = MomentumEncoder(net, 0.5, ramp=1)
    first = keys(images)
    torch.testing.assert_close(first, net(images))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    torch.testing.assert_close(keys(images), first, msg="the copy runs its own weights")
    keys.update(net)
    assert keys.module.second.weight is keys.module.first.weight
    assert not torch.equal(keys(images), first)


def test_a_partial_function_is_shared_unless_it_holds_a_part_of_the_network() -> None:
    """LightningCLI gives a module its optimizer as one; behind it are the Trainer and DDP, which cannot be copied."""

    class Uncopied:
        def __deepcopy__(self, memo: dict[int, object]) -> None:
            raise RuntimeError("a process group")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.optimizer = partial(print, Uncopied())
            self.head = partial(nn.functional.linear, weight=self.linear.weight)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(images)

    net, images = Net(), torch.ones(1, 2)
    keys = MomentumEncoder(net)
    before = keys(images)
    with torch.no_grad():
        net.linear.weight.zero_()
    assert torch.equal(keys(images), before)
    assert not torch.equal(keys(images), net(images))


def test_held_by_a_module_it_is_no_part_of_it() -> None:
    holder = nn.Linear(2, 2)
    holder.keys = MomentumEncoder(network())
    assert set(holder.state_dict()) == {"weight", "bias"}
    assert not any(parameter.requires_grad for parameter in holder.keys.module.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.0}, r"`momentum` in \[0, 1\).* but got 1.0"),
        ({"momentum": -0.1}, r"`momentum` in \[0, 1\)"),
        ({"ramp": 0.5}, "`ramp` of at least 1"),
        ({"batch_norm": "both"}, "`batch_norm` to be one of batch, running but got 'both'"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MomentumEncoder(network(), **arguments)
