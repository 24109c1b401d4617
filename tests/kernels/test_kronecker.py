"""KromHC's kernels: what doubly stochastic means in floating point, and the algebra they rest on."""

import pytest
import torch

from grassland.kernels import dispatch
from grassland.kernels.dispatch import BackendError
from grassland.kernels.kronecker import (
    kronecker_columns,
    kronecker_factors,
    kronecker_matrix,
    kronecker_open,
    kronecker_post,
    kronecker_pre,
    kronecker_projection,
    kronecker_step,
    reference,
)
from grassland.kernels.kronecker.cases import SPECS, make_post, make_pre, make_projection, make_step, projection_case
from grassland.kernels.testing import Case, check_backend, normal

BACKENDS = ["eager"] + (["cpp"] if dispatch.extension_error() is None else [])
STREAMS = [2, 4, 8, 16, 32]
ULP = torch.finfo(torch.float32).eps


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("streams", "dim"), [(16, 37), (32, 37), (2, 1700)])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_many_streams_and_long_rows_on_the_cpu(spec, streams, dim, dtype):
    make = {"kronecker_step": make_step, "kronecker_post": make_post}.get(spec.name, make_pre)
    case = Case("", lambda: make(11, streams=streams, dim=dim))
    if spec.name == "kronecker_projection":
        case = projection_case("", streams, dim)
    check_backend(spec, case, "cpp", dtype)


def mixing_of(logits, streams):
    """Coefficients of tokens whose logits are given: the streams are zero, so the bias is all there is."""
    columns = kronecker_columns(kronecker_factors(streams))
    x, weight = torch.zeros(1, streams, 4), torch.zeros(columns, 4 * streams)
    rows = [torch.cat([torch.zeros(2 * streams), row]) for row in logits]
    return torch.cat([kronecker_pre(x, weight, row)[1] for row in rows])


@pytest.mark.parametrize("streams", STREAMS)
def test_rows_and_columns_sum_to_one_however_large_the_logits(streams):
    stages = streams.bit_length() - 1
    logits = torch.cat([normal(12, stages, scale=20).clamp(-50, 50), torch.full((1, stages), 50.0)])
    logits = torch.cat([logits, torch.full((1, stages), -50.0), torch.zeros(1, stages)]).float()
    matrix = kronecker_matrix(mixing_of(logits, streams), streams)
    assert matrix.dtype is torch.float32 and matrix.min() >= 0
    assert (matrix.sum(-1) - 1).abs().max() <= 4 * ULP
    assert (matrix.sum(-2) - 1).abs().max() <= 4 * ULP


@pytest.mark.parametrize("streams", STREAMS)
def test_spectrum_and_closure(streams):
    stages = streams.bit_length() - 1
    h = reference.coefficients(normal(2, 2 * streams + stages), [2] * stages)
    a, b = kronecker_matrix(h, streams)
    assert torch.linalg.matrix_norm(a, 2) <= 1 + 1e-14
    signs = torch.tensor([[1 - 2 * (s >> k & 1) for k in range(stages)][::-1] for s in range(streams)])
    keep = 1 - 2 * h[0, 2 * streams :]
    expected = torch.where(signs == 1, 1.0, keep).prod(-1)
    torch.testing.assert_close(torch.linalg.eigvalsh(a), expected.sort()[0], atol=1e-13, rtol=0)
    # Closed under products, and they commute: both are diagonal in the Walsh basis.
    product = a @ b
    torch.testing.assert_close(product, b @ a, atol=1e-15, rtol=0)
    ones = torch.ones(streams, dtype=torch.float64)
    torch.testing.assert_close(product.sum(0), ones)
    torch.testing.assert_close(product.sum(1), ones)
    walsh = walsh_matrix(streams)
    torch.testing.assert_close(walsh @ a @ walsh.T / streams, torch.diag(expected), atol=1e-13, rtol=0)


def walsh_matrix(streams):
    matrix, two = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while matrix.shape[0] < streams:
        matrix = torch.kron(matrix, two)
    return matrix


@pytest.mark.parametrize("streams", STREAMS)
def test_the_mean_of_the_streams_is_kept(streams):
    tensors = {name: t.float() for name, t in make_step(50, streams=streams, dim=8).items()}
    x, y, h = tensors["x"], torch.zeros_like(tensors["y"]), tensors["h"]
    for backend in BACKENDS:
        after = kronecker_post(x, y, h, backend=backend)
        drift = (after.double().sum(1) - x.double().sum(1)).abs()
        assert drift.max() <= ULP * x.abs().sum(1).max()
    equal = x[:, :1].expand_as(x)
    for backend in BACKENDS:
        assert torch.equal(kronecker_post(equal, y, h, backend=backend), equal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("streams", STREAMS)
def test_across_the_boundary_is_bitwise_the_two_kernels(streams, dtype):
    tensors = {name: t.to(dtype) for name, t in make_step(19, streams=streams, dim=21).items()}
    for backend in BACKENDS:
        x, u, h = kronecker_step(**tensors, backend=backend)
        expected = kronecker_post(tensors["x"], tensors["y"], tensors["h"], backend=backend)
        assert torch.equal(x, expected)
        alone = kronecker_pre(expected, tensors["weight"], tensors["bias"], backend=backend)
        assert torch.equal(u, alone[0]) and torch.equal(h, alone[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_opening_gives_the_same_and_adds_up_the_gradients(backend):
    """What flows back into the streams joins in the backward of `kronecker_open`, whichever outputs are used."""
    tensors = {name: t.float().requires_grad_() for name, t in make_step(19, streams=4, dim=21).items()}
    x, weight, bias = tensors["x"], tensors["weight"], tensors["bias"]
    wanted = [x, weight, bias]

    def gradients(streams, u, h, used):
        results = {"all": kronecker_post(streams, u, h, backend=backend), "streams": streams, "u": u, "h": h}
        return torch.autograd.grad(results[used].square().sum(), wanted, allow_unused=True, materialize_grads=True)

    for used in ("all", "streams", "u", "h"):
        alone = (x, *kronecker_pre(x, weight, bias, backend=backend))
        opened = kronecker_open(x, weight, bias, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(opened, alone, strict=True))
        assert opened[0].data_ptr() == x.data_ptr()
        for a, b in zip(gradients(*opened, used), gradients(*alone, used), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("factors", [(3,), (4,), (4, 2), (2, 3), (3, 3)])
def test_general_factors_follow_the_reference(factors):
    streams = torch.tensor(factors).prod().item()
    columns = kronecker_columns(factors)
    x, y = normal(5, streams, 3).requires_grad_(), normal(5, 3, seed=1).requires_grad_()
    weight, bias = normal(columns, 3 * streams, seed=2).requires_grad_(), normal(columns, seed=3).requires_grad_()
    results = []
    for backend in ("reference", "eager"):
        _, h = kronecker_pre(x, weight, bias, factors=factors, backend=backend)
        outs = kronecker_step(x, y, h, weight, bias, factors=factors, backend=backend)
        grads = torch.autograd.grad(sum(o.square().sum() for o in outs), [x, y, weight, bias])
        results.append([*outs, *grads])
        matrix = kronecker_matrix(h, streams, factors=factors)
        torch.testing.assert_close(matrix.sum(-1), torch.ones_like(matrix[..., 0]))
        torch.testing.assert_close(matrix.sum(-2), torch.ones_like(matrix[..., 0]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_factors_are_chosen_and_checked():
    assert kronecker_factors(8) == (2, 2, 2) and kronecker_factors(12) == (2, 2, 3) and kronecker_factors(1) == ()
    for streams, factors in ((0, None), (-4, None), (2.0, None), (10, None), (8, (2, 2)), (6, (6,)), (4, (1, 4))):
        with pytest.raises(ValueError, match="num_streams"):
            kronecker_factors(streams, factors)


def test_autocast_leaves_the_coefficients_alone():
    tensors = {name: t.float() for name, t in make_step(6, streams=4, dim=8).items()}
    expected = kronecker_step(**tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = kronecker_step(**tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_half_branch_joins_float32_streams():
    t = {name: value.float() for name, value in make_step(6, streams=4, dim=8).items()}
    half = t["y"].bfloat16()
    assert torch.equal(kronecker_post(t["x"], half, t["h"]), kronecker_post(t["x"], half.float(), t["h"]))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(4)}, ValueError, ("x", "(4,)")),
        ({"x": torch.zeros(6, 1, 8)}, ValueError, ("x", "n >= 2")),
        ({"x": torch.zeros(6, 4, 8, dtype=torch.int32)}, TypeError, ("x", "int32")),
        ({"x": torch.zeros(6, 7, 8)}, ValueError, ("num_streams", "7")),
        ({"y": torch.zeros(6, 7)}, ValueError, ("y", "(6, 8)", "(6, 7)")),
        ({"y": torch.zeros(6, 8, dtype=torch.float64)}, TypeError, ("y", "float64")),
        ({"y": torch.zeros(6, 8, dtype=torch.int64)}, TypeError, ("y", "int64")),
        ({"h": torch.zeros(6, 12)}, ValueError, ("h", "(6, 10)", "(6, 12)")),
        ({"weight": torch.zeros(10, 30)}, ValueError, ("weight", "(10, 32)", "(10, 30)")),
        ({"weight": torch.zeros(10, 32, device="meta")}, ValueError, ("weight", "meta")),
        ({"bias": torch.zeros(9)}, ValueError, ("bias", "(10,)", "(9,)")),
        ({"eps": 0.0}, ValueError, ("eps", "0")),
        ({"factors": (2, 3)}, ValueError, ("factors", "(2, 3)")),
        ({"backend": "fast"}, ValueError, ("backend", "fast")),
    ],
)
def test_bad_input_names_itself(change, error, words):
    tensors = {name: t.float() for name, t in make_step(6, streams=4, dim=8).items()}
    with pytest.raises(error) as caught:
        kronecker_step(**(tensors | change))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(("call", "make"), [(kronecker_pre, make_pre), (kronecker_step, make_step)])
def test_gradients_of_one_output_alone(call, make):
    tensors = {name: t.requires_grad_() for name, t in make(5, streams=4, dim=3).items()}
    for index in range(len(call(**tensors))):
        found, expected = (
            torch.autograd.grad(call(**tensors, backend=backend)[index].square().sum(), list(tensors.values()),
                                allow_unused=True, materialize_grads=True)
            for backend in ("eager", "reference")
        )  # fmt: skip
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_a_scale_whose_gradient_cancels_keeps_its_digits():
    # of these four channels, mixing_scale's gradient is 0.0025, a thousandth of its largest terms
    spec = next(spec for spec in SPECS if spec.name == "kronecker_projection")
    check_backend(spec, projection_case("", 2, 2), "cpp", torch.float32)


@pytest.mark.parametrize("backend", ["reference", "eager", None])
@pytest.mark.parametrize("shape", [(1,), (1, 1, 1)])
def test_scales_have_any_shape(shape, backend):
    tensors = make_projection(streams=4, dim=8)
    scales = {name: tensors[name].reshape(shape).requires_grad_() for name in tensors if name.endswith("_scale")}
    expected = kronecker_projection(**tensors, backend=backend)
    found = kronecker_projection(**(tensors | scales), backend=backend)
    torch.testing.assert_close(found, expected)
    assert [g.shape for g in torch.autograd.grad(found[0].sum(), list(scales.values()))] == [shape] * 3


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"alpha": torch.zeros(32, 7)}, ValueError, ("alpha", "8", "(32, 7)")),
        ({"alpha": torch.zeros(30, 8)}, ValueError, ("alpha", "(30, 8)")),
        ({"alpha": torch.zeros(32, 8, dtype=torch.int64)}, TypeError, ("alpha", "int64")),
        ({"beta": torch.zeros(32)}, ValueError, ("beta", "(32,)")),
        ({"beta": torch.zeros(32, 7)}, ValueError, ("num_streams", "7")),
        ({"gamma": torch.zeros(31)}, ValueError, ("gamma", "(32,)", "(31,)")),
        ({"gamma": torch.zeros(32, dtype=torch.float64)}, TypeError, ("gamma", "float64")),
        ({"gamma": torch.zeros(32, device="meta")}, ValueError, ("gamma", "meta")),
        ({"post_scale": torch.zeros(2)}, ValueError, ("post_scale", "one number", "(2,)")),
        ({"static_alpha": torch.zeros(4)}, ValueError, ("static_alpha", "(8,)", "(4,)")),
        ({"factors": (2, 3)}, ValueError, ("factors", "(2, 3)")),
        ({"backend": "fast"}, ValueError, ("backend", "fast")),
    ],
)
def test_bad_parameters_name_themselves(change, error, words):
    tensors = {name: t.float() for name, t in make_projection(streams=4, dim=8).items()}
    with pytest.raises(error) as caught:
        kronecker_projection(**(tensors | change))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_projection_of_larger_factors_and_its_transpose():
    tensors = make_projection(streams=4, dim=6)
    tensors |= {"alpha": normal(24, 28, seed=8), "static_alpha": normal(28, seed=9)}
    weight, bias = kronecker_projection(**tensors, factors=(4,))
    turned, _ = kronecker_projection(**tensors, factors=(4,), transposed=True)
    scale = 24**0.5 * (1 + tensors["gamma"])
    assert torch.allclose(weight[8:].T, tensors["mixing_scale"] * tensors["alpha"][:, 4:] * scale[:, None])
    assert torch.equal(turned[8:], weight[8:][reference.inverses(4)]) and torch.equal(turned[:8], weight[:8])
    assert torch.equal(
        bias, torch.cat([tensors["static_alpha"][:4], tensors["static_beta"], tensors["static_alpha"][4:]])
    )
    with pytest.raises(BackendError, match="factors of 2"):
        kronecker_projection(**tensors, factors=(4,), backend="cpp")


def test_a_backend_that_cannot_is_an_error():
    t = {name: value.float() for name, value in make_step(6, streams=64, dim=8).items()}
    with pytest.raises(BackendError, match="32 streams, got 64" if "cpp" in BACKENDS else None):
        kronecker_step(**t, backend="cpp")
    x, h = torch.zeros(2, 3, 4), torch.zeros(2, 12)
    with pytest.raises(BackendError, match="factors of 2"):
        kronecker_post(x, torch.zeros(2, 4), h, backend="cpp")
    with pytest.raises(ValueError, match="h must be"):
        kronecker_matrix(torch.zeros(2, 9), 4)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
def test_results_do_not_depend_on_the_threads(set_threads):
    tensors = {name: t.float().requires_grad_() for name, t in make_step(700, streams=4, dim=33).items()}
    results = []
    for count in (1, 2):
        set_threads(count)
        outs = kronecker_step(**tensors, backend="cpp")
        grads = torch.autograd.grad(sum(o.square().sum() for o in outs), list(tensors.values()))
        results.append([*outs, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", [1e-3, 1e-4, 1e-6])
def test_a_norm_below_eps_is_a_constant(backend, eps):
    """Whether it was is decided as it was clamped, in float32."""
    tensors = make_pre(1, streams=4, dim=8)
    tensors["x"] *= 0.01 * eps
    grads = []
    for dtype, name in ((torch.float64, "reference"), (torch.float32, backend)):
        t = {n: v.to(dtype).requires_grad_() for n, v in tensors.items()}
        grads.append(torch.autograd.grad(kronecker_pre(**t, eps=eps, backend=name)[1].sum(), t["x"])[0])
    assert (grads[1] - grads[0]).norm() < 1e-5 * grads[0].norm()
