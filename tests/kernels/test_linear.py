"""`products.linear`: F.linear by the kernels' products."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import jvp, vmap

from grassland.kernels import dispatch, products
from grassland.kernels.products import LARGE, linear
from grassland.kernels.testing import error, poisoned

needs_extension = pytest.mark.skipif(dispatch.extension_error() is not None, reason=str(dispatch.extension_error()))
# Each number of rows that has a product of its own, in vectors of either width, the last of them and one more.
ROWS = [*range(1, 10), 13, 16, 31, 32, 33, 70]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
LAYOUTS = {
    "plain": lambda t: t,
    "transposed": lambda t: t.T.contiguous().T,
    "rows-apart": lambda t: F.pad(t, (0, 3))[:, :-3],
    "neither": lambda t: t.repeat_interleave(2, 0).T.contiguous().T[::2],
}


def made(rows, outputs, terms, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, terms), (outputs, terms), (outputs,)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.fixture
def no_library(monkeypatch):
    """F.linear is not what multiplies."""

    def refuse(*_):
        raise AssertionError("F.linear was called")

    monkeypatch.setattr(products.F, "linear", refuse)


@pytest.fixture
def library(monkeypatch):
    """The C++ product is not what multiplies."""

    def refuse(*_):
        raise AssertionError("the C++ product was called")

    dispatch.extension_error()
    monkeypatch.setattr(torch.ops.grassland_cpp, "linear", refuse, raising=False)


def check_accuracy(x, weight, bias):
    """At most twice the error of PyTorch in the same dtype, and half an ulp."""
    eager = torch.addmm(torch.zeros(()).to(x.dtype) if bias is None else bias, x, weight.T)
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    with torch.no_grad(), poisoned():
        found = linear(x, weight, bias)
    assert found.shape == exact.shape and found.dtype == x.dtype and found.is_contiguous()
    assert error(found, exact) <= 2 * error(eager, exact) + torch.finfo(x.dtype).eps / 2 * exact.norm()


@needs_extension
@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", ROWS)
def test_accuracy(rows, layout, dtype, no_library):
    # Not all that a tile or a vector has, either way
    x, weight, bias = made(rows, 331, 199, dtype)
    check_accuracy(x, LAYOUTS[layout](weight), bias)
    check_accuracy(LAYOUTS[layout](x), weight, None)


@needs_extension
@DTYPES
@pytest.mark.parametrize("rows", [1, 3, 6, 32, 33, 150])
def test_accuracy_of_three_threads(rows, dtype, no_library, set_threads):
    set_threads(3)
    check_accuracy(*made(rows, 1030, 150, dtype))


@needs_extension
@DTYPES
def test_shapes(dtype, no_library):
    x, weight, bias = made(12, 300, 128, dtype)
    with torch.no_grad():
        flat = linear(x, weight, bias)
        assert torch.equal(linear(x.view(2, 3, 2, 128), weight, bias), flat.view(2, 3, 2, 300))
        assert torch.equal(linear(x[5].expand(6, 128), weight, bias), linear(x[5].repeat(6, 1), weight, bias))
        assert torch.equal(linear(x[5], weight), linear(x[5:6], weight)[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: (torch.randn(3, 200), torch.randn(300, 201)),
        lambda: (torch.randn(3, 200), torch.randn(300, 200, dtype=torch.float64)),
        lambda: (torch.randn(3, 200), torch.randn(300, 200), torch.randn(299)),
        lambda: (torch.randn(()), torch.randn(300, 200)),
        lambda: (torch.randn(3, 200), torch.randn(2, 300, 200)),
    ],
    ids=["width", "dtype", "bias", "scalar", "stack"],
)
def test_wrong_input_is_refused_as_torch_does(make):
    with torch.no_grad():
        with pytest.raises(RuntimeError) as expected:
            F.linear(*make())
        with pytest.raises(RuntimeError) as found:
            linear(*make())
    assert type(found.value) is type(expected.value)


def test_gradients_of_small_products_are_those_of_torch(library):
    tensors = [t.requires_grad_() for t in made(5, 300, 200, torch.float32)]
    found = torch.autograd.grad(linear(*tensors).square().sum(), tensors)
    expected = torch.autograd.grad(F.linear(*tensors).square().sum(), tensors)
    assert all(map(torch.equal, found, expected))


@pytest.fixture
def training(monkeypatch):
    """Products of any size have the derivative of ours."""
    if dispatch.extension_error() is None and torch.ops.grassland_cpp.tiles_are_best():
        monkeypatch.setattr(products, "LARGE_PRODUCT", 0)
    else:
        pytest.skip("PyTorch's products are as fast here, or there are no others")


def gradients(multiply, tensors, grad, **options):
    return torch.autograd.grad(multiply(*tensors), tensors, grad, **options)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, 5, 33, 150, 1100])
def test_accuracy_of_gradients(rows, threads, training, no_library, set_threads):
    set_threads(threads)
    tensors = [t.requires_grad_() for t in made(rows, 331, 199, torch.float32)]
    grad = made(rows, 1, 331, torch.float32, seed=1)[0]
    with poisoned():
        found = gradients(linear, tensors, grad)
    multiply = lambda x, weight, bias: torch.addmm(bias, x, weight.T)  # noqa: E731
    eager = gradients(multiply, tensors, grad)
    exact = gradients(multiply, [t.double() for t in tensors], grad.double())
    for ours, theirs, truth in zip(found, eager, exact, strict=True):
        assert ours.shape == truth.shape
        assert error(ours, truth) <= 2 * error(theirs, truth) + torch.finfo(torch.float32).eps / 2 * truth.norm()


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
def test_gradients_of_what_needs_them(needed, training, no_library):
    tensors = made(40, 300, 200, torch.float32)
    for tensor, wanted in zip(tensors, needed, strict=True):
        tensor.requires_grad_(bool(wanted))
    linear(*tensors).sum().backward()  # an expanded gradient
    assert [tensor.grad is not None for tensor in tensors] == [bool(wanted) for wanted in needed]


def test_gradients_of_any_layout(training, no_library):
    x, weight, bias = (t.requires_grad_() for t in made(24, 300, 200, torch.float32))
    grad = torch.randn(300, 4, 6)
    found = gradients(lambda *t: linear(t[0].view(4, 6, 200), *t[1:]), (x, weight, bias), grad.movedim(0, -1))
    expected = gradients(linear, (x, weight, bias), grad.flatten(1).T.contiguous())
    assert all(map(torch.equal, found, expected))


def test_second_derivatives_are_those_of_torch(training):
    tensors = [t.requires_grad_() for t in made(24, 300, 200, torch.float32)]
    grad = made(24, 1, 300, torch.float32, seed=1)[0].requires_grad_()

    def twice(multiply):
        first = gradients(multiply, tensors, grad, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), [*tensors[:2], grad])

    for found, expected in zip(twice(linear), twice(F.linear), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-2)


def test_many_gradients_at_once(training):
    tensors = [t.requires_grad_() for t in made(24, 300, 200, torch.float32)]
    grads = torch.randn(3, 24, 300)
    found = gradients(linear, tensors, grads, is_grads_batched=True)
    for k, grad in enumerate(grads):
        for ours, theirs in zip(found, gradients(F.linear, tensors, grad), strict=True):
            assert torch.allclose(ours[k], theirs, atol=1e-3)


def test_what_the_backward_needs_may_not_change(training):
    x, weight, bias = (t.requires_grad_() for t in made(24, 300, 200, torch.float32))
    y = linear(x, weight, bias)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@torch.no_grad()
def test_what_it_leaves_to_torch(library, monkeypatch):
    x, weight, bias = made(4, 300, 200, torch.float32)
    assert weight.numel() >= LARGE
    small = weight[:, :100]
    assert torch.equal(linear(x[:, :100], small), F.linear(x[:, :100], small))
    assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    assert linear(x[:0], weight, bias).shape == (0, 300)
    assert linear(x.to("meta"), weight.to("meta")).shape == (4, 300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert torch.allclose(vmap(lambda row: linear(row, weight, bias))(x), F.linear(x, weight, bias), atol=1e-4)
    value, tangent = jvp(lambda t: linear(t, weight), (x,), (x,))
    assert torch.equal(value, tangent)
    compiled = torch.compile(lambda t: linear(t, weight, bias), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), F.linear(x, weight, bias))
    traced = torch.jit.trace(lambda t: linear(t, weight, bias), (x,), check_trace=False)
    assert "aten::linear" in str(traced.graph) and "grassland_cpp" not in str(traced.graph)
    monkeypatch.setenv("GRASSLAND_BACKEND", "eager")
    assert torch.equal(linear(x, weight), F.linear(x, weight))
