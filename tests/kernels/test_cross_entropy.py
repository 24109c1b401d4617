"""What holds for the linear head's loss beyond the rungs that every op climbs (test_ops.py, test_triton.py)."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from grassland.kernels import dispatch
from grassland.kernels.cross_entropy import eager, linear_cross_entropy, op
from grassland.kernels.cross_entropy.cases import head
from grassland.kernels.losses import Gradients, chunk_rows, chunks
from grassland.kernels.products import add_product, multiplies_halves
from grassland.kernels.testing import normal, record_launches, resource_usage

needs_extension = pytest.mark.skipif(dispatch.extension_error() is not None, reason=str(dispatch.extension_error()))


@pytest.fixture(params=["eager", "eager-many-chunks", pytest.param("cpp", marks=needs_extension)])
def backend(request, monkeypatch):
    """Its name; how many numbers of the logits the C++ kernels have at a time is not ours to say."""
    if request.param == "eager-many-chunks":
        monkeypatch.setattr(op, "CHUNK_ELEMENTS", 40)
    return request.param.removesuffix("-many-chunks")


def inputs(tokens=11, dim=6, vocab=17, dtype=torch.float64, ignored=3):
    x, weight, target = head((tokens,), vocab, dim, ignored, scale=dim**0.5).values()
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_is_torchs_cross_entropy(backend, reduction, smoothing):
    exact = backend == "eager"
    x, weight, target = inputs(dtype=torch.float64 if exact else torch.float32)
    expected = F.cross_entropy(x @ weight.T, target, reduction=reduction, label_smoothing=smoothing)
    loss = linear_cross_entropy(x, weight, target, reduction=reduction, label_smoothing=smoothing, backend=backend)
    tolerance = {"atol": 1e-13 if exact else 1e-5, "rtol": 0 if exact else 1e-6}
    torch.testing.assert_close(loss, expected, **tolerance)
    wanted = torch.autograd.grad(3 * expected, (x, weight))
    torch.testing.assert_close(torch.autograd.grad(3 * loss, (x, weight)), wanted, **tolerance)


def test_another_class_may_be_ignored(backend):
    x, weight, target = inputs(dtype=torch.float32, ignored=0)
    expected = F.cross_entropy(x @ weight.T, target, ignore_index=int(target[0]))
    found = linear_cross_entropy(x, weight, target, ignore_index=int(target[0]), backend=backend)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_a_frozen_input_gets_no_gradient_and_costs_no_product(frozen, backend):
    x, weight, target = inputs(dtype=torch.float32)
    both = torch.autograd.grad(linear_cross_entropy(x, weight, target, backend=backend), (x, weight))
    (x if frozen == "x" else weight).requires_grad_(False)
    linear_cross_entropy(x, weight, target, backend=backend).backward()
    for leaf, expected in zip((x, weight), both, strict=True):
        assert leaf.grad is None if not leaf.requires_grad else torch.equal(leaf.grad, expected)
    mask = [x.requires_grad, weight.requires_grad]
    found = op.linear_cross_entropy(x, weight, target, 1.0, 0.0, -100, torch.float32, mask, backend)
    assert [t.shape == (0,) for t in found[1:]] == [not needed for needed in mask]


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32(backend):
    x, weight, target = inputs(64, 16, 50, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, target, backend=backend)
    loss.backward()
    rounded_x, rounded_w = (t.detach().bfloat16().float().requires_grad_() for t in (x, weight))
    expected = F.cross_entropy((rounded_x.bfloat16() @ rounded_w.bfloat16().T).float(), target)
    expected.backward()
    assert loss.dtype is torch.float32 and weight.grad.dtype is torch.float32
    rounds = op.multiplies_halves() or backend == "eager"
    torch.testing.assert_close(loss, expected, **({} if rounds else {"atol": 0, "rtol": 1e-2}))
    torch.testing.assert_close(weight.grad, rounded_w.grad, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("elements", [1 << 24, 40], ids=["one-chunk", "many-chunks"])
def test_float16_gradients_survive_until_they_are_scaled(elements, monkeypatch):
    """Rows that are nearly certain have gradients below float16's smallest number before the loss scale comes."""
    monkeypatch.setattr(op, "CHUNK_ELEMENTS", elements)
    x, weight, target = inputs(64, 16, 50, torch.float16)
    with torch.no_grad():
        target = (x @ weight.T).float().argmax(-1)
        x *= 4
    exact_x, exact_w = (t.detach().double().requires_grad_() for t in (x, weight))
    (65536 * F.cross_entropy(exact_x @ exact_w.T, target)).backward()
    (65536 * linear_cross_entropy(x, weight, target)).backward()
    for found, wanted in ((x.grad, exact_x.grad), (weight.grad, exact_w.grad)):
        assert torch.linalg.vector_norm(found.double() - wanted) < 0.02 * torch.linalg.vector_norm(wanted)


def test_bfloat16_gradients_of_a_mean_are_divided_by_the_number_of_rows():
    """1 / 900 in bfloat16 is 1.0025 / 900: it must not be rounded before it meets the gradients."""
    x, weight, _ = inputs(900, 64, 20, torch.bfloat16)
    target = torch.arange(900) % 20
    summed, mean = (
        torch.autograd.grad(linear_cross_entropy(x, weight, target, reduction=reduction), weight)[0].double()
        for reduction in ("sum", "mean")
    )
    assert abs(900 * (mean * summed).sum() / summed.square().sum() - 1) < 1e-3


def test_a_chunk_has_at_least_as_many_logits_as_the_weight_has_numbers():
    """Each adds a matrix of the weight's size to its gradient: a GPU's 8192 rows of Llama's width were 16 chunks."""
    wide, narrow = (torch.empty(*size, device="meta") for size in ((128256, 4096), (50304, 256)))
    assert chunk_rows(wide, op.GPU_CHUNK_ELEMENTS) == 4096
    assert chunk_rows(narrow, op.GPU_CHUNK_ELEMENTS) == op.GPU_CHUNK_ELEMENTS // 50304
    assert chunk_rows(narrow, 1, least=300) == 300


class Cublas(TorchDispatchMode):
    """The products of halves with a float32 result, which only a GPU has, on the CPU."""

    added = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.dtype:
            return args[0].to(args[2]) @ args[1].to(args[2])
        if func is torch.ops.aten.addmm.dtype_out:
            total, a, b, dtype = args
            assert kwargs["out"].data_ptr() == total.data_ptr() and total.dtype is dtype is torch.float32
            self.added += 1
            return total.add_(a.to(dtype) @ b.to(dtype))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_adds_a_chunks_product_to_the_weights_gradient_in_place(dtype, monkeypatch):
    x, weight, dz = (normal(*size, seed=k).to(dtype) for k, size in enumerate(((9, 4), (7, 4), (9, 7))))
    monkeypatch.setattr("grassland.kernels.products.widens", lambda _: True)
    gradients = Gradients(x, weight, [False, True])
    with Cublas() as mode:
        for rows in chunks(9, 3):
            gradients.add(rows, dz[rows])
    assert mode.added == 2
    torch.testing.assert_close(gradients.result()[1], dz.float().T @ x.float())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_is_added_in_float32_on_a_gpu(dtype):
    a, b = (normal(*size, seed=k).to("cuda", dtype) for k, size in enumerate(((70, 300), (300, 90))))
    total = normal(70, 90, seed=2).float().cuda()
    exact = total.double() + a.double() @ b.double()
    add_product(total, a, b)
    torch.testing.assert_close(total.double(), exact, atol=1e-4, rtol=1e-5)


def test_second_derivatives_are_refused():
    x, weight, target = inputs()
    (gradient,) = torch.autograd.grad(linear_cross_entropy(x, weight, target), x, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy cannot be differentiated twice"):
        gradient.square().sum().backward()
    torch.autograd.gradgradcheck(lambda x, w: linear_cross_entropy(x, w, target, backend="reference"), (x, weight))


def test_inputs_may_change_before_the_backward(backend):
    """The gradients are there already."""
    x, weight, target = inputs(dtype=torch.float32)
    expected = torch.autograd.grad(linear_cross_entropy(x, weight, target, backend=backend), (x, weight))
    loss = linear_cross_entropy(x, weight, target, backend=backend)
    with torch.no_grad():
        x.zero_()
        weight.zero_()
    for a, b in zip(torch.autograd.grad(loss, (x, weight)), expected, strict=True):
        assert torch.equal(a, b)


def test_many_output_gradients_at_once(backend):
    """As a vectorised Jacobian has them."""
    x, weight, target = inputs(dtype=torch.float32)
    loss = linear_cross_entropy(x, weight, target, backend=backend)
    (expected,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (found,) = torch.autograd.grad(loss, weight, torch.tensor([1.0, -2.0]), is_grads_batched=True)
    torch.testing.assert_close(found, torch.stack([expected, -2 * expected]))


def test_a_retained_graph_gives_its_gradients_again(backend):
    x, weight, target = inputs(dtype=torch.float32)
    loss = linear_cross_entropy(x, weight, target, backend=backend)
    (3 * loss).backward(retain_graph=True)
    first = [t.grad.clone() for t in (x, weight)]
    loss.backward()
    for leaf, expected in zip((x, weight), first, strict=True):
        torch.testing.assert_close(leaf.grad, expected * 4 / 3)


def test_nothing_to_predict_is_nan_as_in_pytorch(backend):
    x, weight, target = inputs(dtype=torch.float32)
    for rows, labels in ((x, torch.full_like(target, -100)), (x[:0], target[:0])):
        loss = linear_cross_entropy(rows, weight, labels, backend=backend)
        assert loss.isnan() and not any(g.any() for g in torch.autograd.grad(loss, (x, weight)))
    assert linear_cross_entropy(x[:0], weight, target[:0], reduction="sum", backend=backend) == 0


@pytest.mark.parametrize("backend", ["reference", "eager", pytest.param("cpp", marks=needs_extension)])
def test_features_of_no_width_are_equally_sure_of_every_class(backend):
    x, weight = torch.zeros(3, 0), torch.zeros(5, 0)
    loss = linear_cross_entropy(x, weight, torch.arange(3), backend=backend)
    torch.testing.assert_close(loss, torch.tensor(5.0).log())


def test_the_reference_sums_halves_in_float32():
    """As the transforms of torch.func get it: the sum of 8,192 losses is no float16."""
    x, weight, target = (torch.zeros(*size) for size in ((8192, 2), (9000, 2), (8192,)))
    loss = linear_cross_entropy(x.half(), weight.half(), target.long(), backend="reference")
    torch.testing.assert_close(loss, torch.tensor(9000.0).log())


def test_extreme_logits(backend):
    x, weight, target = inputs(dtype=torch.float32)
    loss = linear_cross_entropy(x * 1e4, weight, target, backend=backend)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


def test_nan_counts_where_its_row_does(backend):
    x, weight, target = inputs(dtype=torch.float32)
    expected = linear_cross_entropy(x, weight, target, backend=backend)
    broken = x.detach().clone()
    broken[target == -100] = torch.nan
    broken.requires_grad_()
    loss = linear_cross_entropy(broken, weight, target, backend=backend)
    (slope,) = torch.autograd.grad(loss, broken)
    assert loss == expected and torch.equal(slope, torch.autograd.grad(expected, x)[0])
    assert linear_cross_entropy(broken, weight, target.clamp_min(0), backend=backend).isnan()


NOTHING = -3e38  # ten times as much is -inf in float32 and in bfloat16
ROWS = {
    "all": lambda row: row,
    "first-columns-impossible": lambda row: row[:600].fill_(NOTHING),
    "last-columns-impossible": lambda row: row[400:].fill_(NOTHING),
    "one-possible": lambda row: row[torch.arange(2000) != 1999].fill_(NOTHING),
    "none-possible": lambda row: row.fill_(NOTHING),
    "falling": lambda row: row.copy_(torch.linspace(20, -20, 2000)),
    "rising": lambda row: row.copy_(torch.linspace(-20, 20, 2000)),
    "one-nan": lambda row: row[1400:1401].fill_(torch.nan),
    "many-nan": lambda row: row[400:1600].fill_(torch.nan),
    "nan-among-impossible": lambda row: row[600:].fill_(NOTHING)[600:601].fill_(torch.nan),
}


@needs_extension
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", ROWS.values(), ids=ROWS)
def test_the_loss_alone_by_some_columns_at_a_time(change, dtype, smoothing, threads, set_threads):
    """Without gradients the logits are never side by side: a row's are added up from pieces of 512 or less."""
    torch.manual_seed(0)
    weight = torch.randn(2000, 1)
    change(weight[:, 0])
    x, weight = torch.full((1, 1), 10.0, dtype=dtype), weight.to(dtype)
    logits = (x.float() @ weight.float().T).to(dtype).double()
    set_threads(threads)
    for label in (0, 511, 512, 666, 1999):
        target = torch.tensor([label])
        found = linear_cross_entropy(x, weight, target, label_smoothing=smoothing, backend="cpp")
        expected = F.cross_entropy(logits, target, label_smoothing=smoothing)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@needs_extension
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows, vocab", [(1, 1700), (2, 40), (256, 512), (257, 513), (700, 1300)])
def test_the_loss_alone_of_some_rows_at_a_time(rows, vocab, threads, set_threads):
    torch.manual_seed(0)
    set_threads(threads)
    x, weight, target = torch.randn(rows, 24), torch.randn(vocab, 24), torch.randint(vocab, (rows,))
    target[1::7] = -100
    found = linear_cross_entropy(x, weight, target, label_smoothing=0.1, reduction="sum", backend="cpp")
    logits = x.double() @ weight.double().T
    expected = F.cross_entropy(logits, target, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_rows_of_a_class_that_there_is_not_are_nan_in_eager():
    """As in Triton (ROWS); the op itself looks before, on a CPU."""
    target = torch.tensor([7, -1, 0, -100])
    losses, slope = eager.row_losses(torch.zeros(4, 7), target, 7, 0.1, -100, 1.0, True)
    assert losses.isnan().tolist() == [True, True, False, False]
    assert slope.isnan().all(-1).tolist() == [True, True, False, False] and not slope[3].any()


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(dispatch.extension_error() is not None, reason=str(dispatch.extension_error()))
def test_a_gradient_is_kept_as_its_weight_where_products_are_bfloat16(master):
    """Half the memory between forward and backward; a float32 weight under autocast keeps its float32 sum."""
    x, weight, target = head((9,), 40, 16).values()
    arguments = (x, weight.to(master), target, 1.0, 0.0, -100, torch.bfloat16, [True, True], "cpp")
    kept = [t.dtype for t in op.linear_cross_entropy(*arguments)[1:]]
    expected = [torch.bfloat16, master] if multiplies_halves() else [torch.float32] * 2
    assert kept == expected
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in arguments]
        assert [t.dtype for t in op.linear_cross_entropy(*fake)[1:]] == expected


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"target": torch.zeros(10, dtype=torch.int64)}, ValueError, r"target must be \(11,\) .*, got \(10,\)"),
        ({"target": torch.zeros(11)}, TypeError, "target must be int64 classes, got torch.float32"),
        ({"target": torch.full((11,), 17)}, ValueError, r"target must be in \[0, 17\) or -100 \(ignored\), got 17"),
        ({"weight": torch.zeros(17, 5).double()}, ValueError, r"x must be \(…, 5\), as wide as weight, got \(11, 6\)"),
        ({"weight": torch.zeros(17, 6, dtype=torch.int64)}, TypeError, "weight must be float32, .*, got torch.int64"),
        ({"weight": torch.zeros(0, 6)}, ValueError, r"weight must be \(V, D\) with V >= 1, got \(0, 6\)"),
        ({"label_smoothing": 2}, ValueError, r"label_smoothing must be a number in \[0, 1\], got 2"),
        ({"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum', got 'none'"),
        ({"backend": "cuda"}, dispatch.BackendError, "linear_cross_entropy has no cuda kernel"),
    ],
)
def test_what_is_wrong_is_named(change, error, message):
    with pytest.raises(error, match=message):
        linear_cross_entropy(**(dict(zip(("x", "weight", "target"), inputs(), strict=True)) | change))


ROWS = """
import sys, torch, torch.nn.functional as F
from grassland.kernels.cross_entropy.fused import row_losses
device, ignore = sys.argv[1], -100
logits = 5 * torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
target = torch.tensor([ignore, 7, 4999])
for dtype in (torch.float32, torch.bfloat16):
    exact = logits.to(dtype).double().requires_grad_()
    truth = F.cross_entropy(exact, target, label_smoothing=0.1, reduction="none")
    (slope,) = torch.autograd.grad(truth.sum(), exact)
    whole = F.pad(logits.to(dtype), (0, 56), value=7.0).to(device)
    losses, found = row_losses(whole, target.to(device), 5000, 0.1, ignore, 1.0, True)
    assert found is whole and not whole[:, 5000:].any() and not whole[0].any(), "padding and ignored rows are zero"
    torch.testing.assert_close(losses.cpu(), truth.detach().float())
    torch.testing.assert_close(whole[:, :5000].cpu().double(), slope, atol=1e-6, rtol=torch.finfo(dtype).eps)
options = (0.0, ignore, 1.0, False)
unknown = torch.tensor([4], device=device)
assert row_losses(torch.zeros(1, 4, device=device), unknown, 4, *options)[0].isnan().all(), "no class is nan"
broken = torch.full((2, 64), float("nan"), device=device)
losses, _ = row_losses(broken, torch.full((2,), ignore, device=device), 9, 0.0, ignore, 1.0, True)
assert not losses.any() and not broken.any(), "an ignored row may be nan"
print("ok")
"""


def rows_in_a_process(device, **variables):
    environment = os.environ | variables
    done = subprocess.run([sys.executable, "-c", ROWS, device], env=environment, capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stdout + done.stderr


def test_padded_rows_in_the_interpreter():
    pytest.importorskip("triton")
    rows_in_a_process("cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_padded_rows_on_a_gpu():
    rows_in_a_process("cuda")


@pytest.mark.parametrize("width", [30528, 50304, 512])
@pytest.mark.parametrize("chip", [80, 90, 100])
def test_padded_rows_compile_for_nvidia(chip, width):
    pytest.importorskip("triton")
    from grassland.kernels.cross_entropy.fused import row_losses

    logits, target = torch.zeros(8, width, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.int64)
    for launch in record_launches(lambda: row_losses(logits, target, width - 7, 0.1, -100, 1.0, True)):
        usage = resource_usage(launch.compile("cuda", chip, 32).asm["cubin"])
        assert usage["LOCAL"] == usage["STACK"] == 0, usage
