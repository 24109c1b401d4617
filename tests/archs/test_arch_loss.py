"""The chunked cross entropy against `F.cross_entropy` of materialised logits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from grassland.archs import linear_cross_entropy
from grassland.archs.heads import cross_entropy


@pytest.fixture(params=[1 << 24, 40], ids=["one-chunk", "many-chunks"], autouse=True)
def chunk_elements(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", request.param)
    monkeypatch.setattr(cross_entropy, "GPU_CHUNK_ELEMENTS", request.param)


def inputs(tokens=11, dim=6, vocab=17, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, dim, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, dim, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (tokens,), generator=g)
    labels[::4] = -100
    return x, weight, labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradients_in_float64(reduction, smoothing):
    x, weight, labels = inputs()
    expected = F.cross_entropy(x @ weight.T, labels, reduction=reduction, label_smoothing=smoothing)
    loss = linear_cross_entropy(x, weight, labels, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected, atol=1e-13, rtol=0)
    wanted = torch.autograd.grad(3 * expected, (x, weight))
    found = torch.autograd.grad(3 * loss, (x, weight))
    torch.testing.assert_close(found, wanted, atol=1e-13, rtol=0)


def test_gradients_pass_gradcheck():
    x, weight, labels = inputs(5, 3, 4)
    torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, labels), (x, weight))


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_a_frozen_input_gets_no_gradient(frozen):
    x, weight, labels = inputs()
    (x if frozen == "x" else weight).requires_grad_(False)
    linear_cross_entropy(x, weight, labels).backward()
    assert (x.grad is None) == (frozen == "x")
    assert (weight.grad is None) == (frozen == "weight")


def test_bfloat16_errs_no_more_than_twice_plain_bfloat16():
    x, weight, labels = inputs(64, 16, 50, torch.bfloat16)
    exact_x, exact_w = (t.detach().double().requires_grad_() for t in (x, weight))
    exact = F.cross_entropy(exact_x @ exact_w.T, labels)
    exact.backward()
    plain_x, plain_w = (t.detach().clone().requires_grad_() for t in (x, weight))
    plain = F.cross_entropy(plain_x @ plain_w.T, labels)
    plain.backward()
    loss = linear_cross_entropy(x, weight, labels)
    loss.backward()
    assert loss.dtype is torch.float32 and weight.grad.dtype is torch.bfloat16
    assert abs(loss.double() - exact) <= 2 * abs(plain.double() - exact) + 1e-3
    for found, eager, wanted in ((x, plain_x, exact_x), (weight, plain_w, exact_w)):
        error, bound = ((t.grad.double() - wanted.grad).abs().max() for t in (found, eager))
        assert error <= 2 * bound + 1e-6


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32():
    x, weight, labels = inputs(64, 16, 50, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, labels)
    loss.backward()
    rounded_x, rounded_w = (t.detach().bfloat16().float().requires_grad_() for t in (x, weight))
    expected = F.cross_entropy((rounded_x.bfloat16() @ rounded_w.bfloat16().T).float(), labels)
    expected.backward()
    assert loss.dtype is torch.float32 and weight.grad.dtype is torch.float32
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(weight.grad, rounded_w.grad, atol=2e-3, rtol=2e-2)


def test_float16_gradients_survive_until_they_are_scaled():
    """Rows that are nearly certain have gradients below float16's smallest number before the loss scale comes."""
    x, weight, labels = inputs(64, 16, 50, torch.float16)
    with torch.no_grad():
        labels = (x @ weight.T).float().argmax(-1)
        x *= 4
    exact_x, exact_w = (t.detach().double().requires_grad_() for t in (x, weight))
    (65536 * F.cross_entropy(exact_x @ exact_w.T, labels)).backward()
    (65536 * linear_cross_entropy(x, weight, labels)).backward()
    for found, wanted in ((x.grad, exact_x.grad), (weight.grad, exact_w.grad)):
        assert torch.linalg.vector_norm(found.double() - wanted) < 0.02 * torch.linalg.vector_norm(wanted)


def test_bfloat16_gradients_of_a_mean_are_divided_by_the_number_of_rows():
    """1 / 900 in bfloat16 is 1.0025 / 900: it must not be rounded before it meets the gradients."""
    x, weight, _ = inputs(900, 64, 20, torch.bfloat16)
    labels = torch.arange(900) % 20
    summed, mean = (
        torch.autograd.grad(linear_cross_entropy(x, weight, labels, reduction=reduction), weight)[0].double()
        for reduction in ("sum", "mean")
    )
    assert abs(900 * (mean * summed).sum() / summed.square().sum() - 1) < 1e-3


def test_second_derivatives_are_refused_and_transforms_work():
    x, weight, labels = inputs()
    (gradient,) = torch.autograd.grad(linear_cross_entropy(x, weight, labels), x, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy cannot be differentiated twice"):
        gradient.square().sum().backward()
    found = torch.func.grad(lambda x: linear_cross_entropy(x, weight.detach(), labels))(x.detach())
    torch.testing.assert_close(found, gradient.detach())


def test_two_runs_agree_bitwise():
    runs = []
    for _ in range(2):
        x, weight, labels = inputs(50, 8, 30, torch.float32)
        linear_cross_entropy(x, weight, labels).backward()
        runs.append((x.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_nothing_to_predict_is_nan_as_in_pytorch():
    x, weight, labels = inputs()
    assert linear_cross_entropy(x, weight, torch.full_like(labels, -100)).isnan()
    assert linear_cross_entropy(x[:0], weight, labels[:0], reduction="sum") == 0


def test_extreme_logits_stay_finite():
    x, weight, labels = inputs(dtype=torch.float32)
    loss = linear_cross_entropy(x * 1e4, weight, labels)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


def test_op_is_registered_as_pytorch_wants():
    x, weight, labels = inputs(dtype=torch.float32)
    torch.library.opcheck(cross_entropy._summed, (x, weight, labels, 0.1, torch.float32, True))


def test_shapes_that_do_not_fit_are_named():
    x, weight, labels = inputs()
    with pytest.raises(ValueError, match=r"labels \(10,\)"):
        linear_cross_entropy(x, weight, labels[:-1])
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\], got 2"):
        linear_cross_entropy(x, weight, labels, label_smoothing=2)


def in_a_process(device, **variables):
    script = Path(__file__).with_name("interpret_loss.py")
    done = subprocess.run([sys.executable, script, device], env=os.environ | variables, capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stdout + done.stderr


def test_rows_in_the_interpreter():
    pytest.importorskip("triton")
    in_a_process("cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_rows_on_a_gpu():
    in_a_process("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_on_a_gpu(dtype):
    x, weight = (torch.randn(n, 64, device="cuda", dtype=dtype, requires_grad=True) for n in (300, 4000))
    labels = torch.randint(4000, (300,), device="cuda")
    found = torch.autograd.grad(linear_cross_entropy(x, weight, labels), (x, weight))
    a, b = (t.detach().double().requires_grad_() for t in (x, weight))
    truth = torch.autograd.grad(F.cross_entropy(a @ b.T, labels), (a, b))
    for mine, exact in zip(found, truth, strict=True):
        assert (mine.double() - exact).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * exact.norm()


@pytest.mark.parametrize("width", [30528, 50304, 512])
@pytest.mark.parametrize("chip", [80, 90, 100])
def test_rows_compile_for_nvidia(chip, width):
    pytest.importorskip("triton")
    from grassland.archs.heads.fused_cross_entropy import row_losses
    from grassland.kernels.testing import record_launches, resource_usage

    logits, labels = torch.zeros(8, width, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.int64)
    for launch in record_launches(lambda: row_losses(logits, labels, width - 7, 0.1, -100, 1.0, True)):
        usage = resource_usage(launch.compile("cuda", chip, 32).asm["cubin"])
        assert usage["LOCAL"] == usage["STACK"] == 0, usage
