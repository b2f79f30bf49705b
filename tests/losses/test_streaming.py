"""The streamed evaluation under autograd, autocast and torch.compile, and what it allocates."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from support.gpu import Count
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_memdml as ml
from lightning_memdml.losses import accumulators, shared_references, streaming
from lightning_memdml.losses.definition import Pairs
from lightning_memdml.losses.row_ops import HOST_DEVICES

LOSSES = {
    "contrastive": ml.ContrastiveLoss(),
    "direct": ml.DirectWeightLoss(negative=ml.Exponential()),
    "direct, hardest": ml.DirectWeightLoss(negative=ml.Constant(), hardest_negatives=4),
    "multi-similarity": ml.MultiSimilarityLoss(),
    "triplet": ml.TripletLoss(),
    "soft triplet": ml.TripletLoss(soft=True),
    "circle": ml.CircleLoss(),
    "SupCon": ml.SupConLoss(),
    "hybrid": ml.HybridLoss(ml.SupConLoss(), ml.MarginLoss()),
}


@pytest.fixture(params=LOSSES, name="loss")
def _loss(request):
    return LOSSES[request.param]


def batch_and_memory(rows: int = 16, references: int = 2000, dim: int = 16, classes: int = 200):
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(rows, dim, generator=generator), dim=1)
    r = F.normalize(torch.randn(references, dim, generator=generator), dim=1)
    y = torch.randint(0, classes, (rows,), generator=generator)
    return x, y, r, torch.randint(0, classes, (references,), generator=generator)


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor._is_view():
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("classes", [40, 5000])
def test_no_tensor_of_all_pairs_is_made(loss, classes, monkeypatch):
    x, y, r, ry = batch_and_memory(rows=64, references=10_000, dim=4, classes=classes)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(streaming, "BLOCK_ELEMENTS", 64 * 1024)
    monkeypatch.setattr(shared_references, "MAX_PAIRS_PER_CHUNK", 64 * 1024)
    unknown = torch.full((10_000,), -1)
    with LargestTensor() as largest:  # a mode does not see into the operator, so what it runs is called
        streaming.evaluate(loss, Pairs(x, y, r, ry, torch.arange(64) + 2**16 - 8, unknown))
    assert largest.elements >= 64 * 1000  # it does see the blocks
    assert largest.elements < 64 * 10_000 / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_a_cpu_no_pair_is_multiplied_twice(dtype, monkeypatch):
    """Half of the references share a class with the batch, and an anchor has a hundred positives."""
    x, y, r, ry = batch_and_memory(rows=16, references=3200, dim=64, classes=32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    unknown = torch.full((3200,), -1)
    with Count() as count:
        streaming.evaluate(ml.SupConLoss(), Pairs(x, y, r.to(dtype), ry, unknown[:16], unknown))
    assert count.multiplications == 2 * 16 * 3200 * 64, "similarities and gradient"


@pytest.mark.parametrize(("threads", "width"), [(1, 1024), (2, 2048), (16, 16_384), (64, 16_384)])
def test_blocks_grow_with_the_threads(threads, width, monkeypatch):
    x, y, r, ry = batch_and_memory(rows=64, references=20_000, dim=4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(streaming, "BLOCK_ELEMENTS", 64 * 1024)
    widths = []
    monkeypatch.setattr(streaming, "add_block", lambda *args: widths.append(args[3].stop - args[3].start))
    unknown = torch.full((20_000,), -1)
    streaming.evaluate(ml.ContrastiveLoss(), Pairs(x, y, r, ry, unknown[:64], unknown))
    assert set(widths) == {width}


def test_evaluating_the_anchors_in_chunks_changes_no_result(loss, monkeypatch):
    x, y, r, ry = (t.double() if t.is_floating_point() else t for t in batch_and_memory(classes=4))
    x.requires_grad_()
    whole = loss(x, y, r, ry)
    (wanted,) = torch.autograd.grad(whole, x)
    monkeypatch.setattr(shared_references, "MAX_PAIRS_PER_CHUNK", 3000)
    parts = loss(x, y, r, ry)
    torch.testing.assert_close((parts, *torch.autograd.grad(parts, x)), (whole, wanted))


def test_huge_labels_are_distinguished(loss):
    x, y, r, ry = batch_and_memory()
    wanted = loss(x, y, r, ry)
    torch.testing.assert_close(loss(x, 2**63 - 1 - y, r, 2**63 - 1 - ry), wanted)
    torch.testing.assert_close(loss(x, y * 2**16, r, ry * 2**16), wanted)  # one bucket of the hash table for all


def test_gradients_accumulate_and_a_retained_graph_gives_them_again(loss):
    x, y, r, ry = batch_and_memory()
    x.requires_grad_()
    value = loss(x, y, r, ry)
    value.backward(retain_graph=True)
    once = x.grad.clone()
    (3 * value).backward()
    torch.testing.assert_close(x.grad, 4 * once)


@pytest.mark.parametrize("references", [(), ("memory",)])
def test_a_second_derivative_is_refused(loss, references):
    x, y, r, ry = batch_and_memory()
    x.requires_grad_()
    value = loss(x, y, r, ry) if references else loss(x, y)
    with pytest.raises(RuntimeError, match=r"no second derivative.*without `create_graph=True`"):
        torch.autograd.grad(value, x, create_graph=True)


def test_references_get_no_gradient_and_are_not_kept(loss):
    x, y, r, ry = batch_and_memory()
    x.requires_grad_()
    value = loss(x, y, r, ry)
    r.zero_()  # a memory may be overwritten between forward and backward
    value.backward()
    assert x.grad.abs().sum() > 0


def test_autocast_does_not_lower_the_precision_of_similarities(loss):
    x, y, r, ry = batch_and_memory()
    wanted = loss(x, y, r, ry), loss(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = loss(x, y, r, ry), loss(x, y)
    assert [a.dtype for a in actual] == [torch.float32] * 2
    torch.testing.assert_close(actual, wanted)


def test_half_precision_anchors_and_references_are_evaluated_in_float32(loss):
    x, y, r, ry = batch_and_memory()
    half = loss(x.bfloat16(), y, r.half(), ry)
    torch.testing.assert_close(half, loss(x.bfloat16().float(), y, r.half().float(), ry))


def test_a_compiled_step_is_one_graph_that_a_growing_memory_does_not_recompile(loss):
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    head = torch.nn.Linear(16, 16)

    def step(inputs, y, r, ry):
        z = F.normalize(head(inputs), dim=1)
        return loss(z, y, r, ry)

    compiled = torch.compile(step, backend=frames, fullgraph=True)
    x, y, r, ry = batch_and_memory()
    for rows in (100, 150, 400, 900, 1300, 2000):
        torch.testing.assert_close(compiled(x, y, r[:rows], ry[:rows]), step(x, y, r[:rows], ry[:rows]))
    compiled(x, y, r, ry).backward()
    assert head.weight.grad.abs().sum() > 0
    assert frames.frame_count <= 2  # the first size, then any size


def test_memory_equal_to_the_batch_is_the_in_batch_loss_by_index(loss):
    x, y, _, _ = batch_and_memory(classes=5)
    indices = torch.arange(len(x))
    against_itself = loss(x, y, x.clone(), y, indices=indices, ref_indices=indices)
    torch.testing.assert_close(against_itself, loss(x, y))


@pytest.fixture(name="like_a_gpu")
def _like_a_gpu():
    """The CPU is treated as a device whose numbers the host must not read."""
    HOST_DEVICES.discard("cpu")
    yield
    HOST_DEVICES.add("cpu")


@pytest.mark.parametrize("max_shared", [None, 300, 5000])
def test_the_code_for_a_gpu_gives_the_same_result(loss, max_shared, like_a_gpu, monkeypatch):
    x, y, r, ry = (t.double() if t.is_floating_point() else t for t in batch_and_memory())
    x.requires_grad_()
    monkeypatch.setattr(streaming, "GPU_BLOCK_ELEMENTS", 16 * 600)
    indices, ref_indices = torch.arange(16), torch.arange(2000) % 500 - 1
    value = loss(x, y, r, ry, indices=indices, ref_indices=ref_indices, max_shared=max_shared)
    (gradient,) = torch.autograd.grad(value, x)
    HOST_DEVICES.add("cpu")
    wanted = loss(x, y, r, ry, indices=indices, ref_indices=ref_indices)
    torch.testing.assert_close((value, gradient), (wanted, *torch.autograd.grad(wanted, x)))


def test_a_bound_that_is_too_low_raises(loss, like_a_gpu):
    x, y, r, ry = batch_and_memory(classes=4)
    with pytest.raises(
        RuntimeError, match=r"Expected at most `max_shared=7` references .* but got more. Pass a higher bound"
    ):
        loss(x, y, r, ry, max_shared=7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "triplet"])  # as its documentation says
def test_on_a_gpu_the_step_reads_no_number_and_no_shape_from_the_device(name, dtype, fake_gpu):
    with fake_gpu, ProductTypes() as products:
        x, r = torch.empty(64, 16, device="cuda"), torch.empty(2**20, 16, device="cuda", dtype=dtype)
        y, ry = (torch.empty(rows, dtype=torch.int64, device="cuda") for rows in (64, 2**20))
        value, gradient = streaming.evaluate(LOSSES[name], Pairs(x, y, r, ry, y, ry, max_shared=[5000]))
    assert (value.shape, value.dtype) == ((64,), torch.float32)
    assert (gradient.shape, gradient.dtype) == ((64, 16), torch.float32)
    assert products.large == {(dtype, torch.float32)}


@pytest.mark.parametrize("scale", [1e37, 1e9, 1.0, 1e-12, 1e-36])
@pytest.mark.parametrize("sign", ["positive", "negative", "both"])
def test_weights_are_scaled_to_the_range_of_half_precision(scale, sign, monkeypatch):
    """In float16, 65,504 is the largest number and 6e-8 the smallest. A CPU lacks this product of a GPU."""
    monkeypatch.setattr(torch, "mm", lambda left, right, out_dtype: left.to(out_dtype) @ right.to(out_dtype))
    generator = torch.Generator().manual_seed(0)
    weights, references = torch.rand(5, 40, generator=generator), torch.rand(40, 3, generator=generator).half()
    weights = {"positive": weights, "negative": -weights, "both": 1 - 2 * weights}[sign]
    weights[0] = 0.0
    total = accumulators.add_product_in_16_bits(torch.zeros(5, 3), weights * scale, references)
    wanted = weights @ references.float()
    assert total.isfinite().all()
    torch.testing.assert_close(total / scale, wanted, rtol=1e-3, atol=2e-3 * (sign == "both"))


def test_a_product_with_no_reference_adds_nothing():
    references = torch.zeros(0, 3, dtype=torch.float16)
    total = accumulators.add_product_in_16_bits(torch.zeros(5, 3), torch.zeros(5, 0), references)
    assert total.count_nonzero() == 0


class ProductTypes(TorchDispatchMode):
    """Records the types of factors and result of the products with a block of references."""

    def __init__(self):
        super().__init__()
        self.large = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = [a for a in args if isinstance(a, torch.Tensor)][-2:]
            if max(*left.shape, *right.shape) > 5000:
                self.large.add((right.dtype, out.dtype))
        return out
