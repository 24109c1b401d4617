"""Calls of any size agree with the reference. With one argument of any shape, dtype and value: ValueError or TypeError,
or a result of the right shape; never a crash."""

import math

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from grassland.kernels.cross_entropy import linear_cross_entropy
from grassland.kernels.kronecker import kronecker_columns, kronecker_factors, kronecker_pre
from grassland.kernels.moe import moe_route
from grassland.kernels.plucker import gated_blend, plucker_mix
from grassland.kernels.subspace import grassmann_step, subspace_cross_entropy, subspace_logits
from grassland.kernels.testing import normal

FIXED = settings(derandomize=True, deadline=None, database=None, max_examples=80)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool])
ODD = st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.just("two")


def laid_out(draw, tensor):
    """The same numbers, at times with the last dimensions in the other order in memory."""
    return tensor.mT.contiguous().mT if tensor.dim() > 1 and draw(st.booleans()) else tensor


@st.composite
def tensors(draw, most=3):
    """Small tensors, mostly float32, with whatever layout."""
    shape = draw(st.lists(st.integers(0, 6), max_size=most))
    return laid_out(draw, normal(*shape, seed=len(shape)).to(draw(st.just(torch.float32) | DTYPES)))


def drawn(draw, *shape, seed=0):
    return laid_out(draw, normal(*shape, seed=seed).float())


def leading(draw):
    return draw(st.lists(st.integers(0, 4), max_size=2))


def mixing(draw):
    batch, length, rank, dim = (draw(st.integers(low, 7)) for low in (0, 0, 2, 0))
    arguments = {"z": drawn(draw, batch, length, rank), "weight": drawn(draw, dim, rank * (rank - 1) // 2, seed=1)}
    arguments["bias"] = draw(st.sampled_from([None, normal(dim, seed=2).float()]))
    return arguments | {"offsets": draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)), "eps": 1e-6}


def blending(draw):
    rows, dim = leading(draw), draw(st.integers(0, 7))
    x, g, weight = drawn(draw, *rows, dim), drawn(draw, *rows, dim, seed=1), drawn(draw, dim, 2 * dim, seed=2)
    return {"x": x, "g": g, "weight": weight, "bias": normal(dim, seed=3).float()}


def opening(draw):
    factors = draw(st.lists(st.integers(2, 4), min_size=1, max_size=2))
    streams, dim = math.prod(factors), draw(st.integers(1, 5))
    weight = drawn(draw, kronecker_columns(factors), streams * dim, seed=1)
    x, bias = drawn(draw, *leading(draw), streams, dim), normal(weight.shape[0], seed=2).float()
    return {"x": x, "weight": weight, "bias": bias, "factors": factors}


def routing(draw):
    tokens, experts = draw(st.integers(0, 9)), draw(st.integers(1, 6))
    mask = draw(st.none() | st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    arguments = {"logits": drawn(draw, tokens, experts), "top_k": draw(st.integers(1, experts))}
    arguments["capacity"] = draw(st.none() | st.integers(1, 5))
    return arguments | {"mask": None if mask is None else torch.tensor(mask, dtype=torch.bool)}


def subspaces(draw):
    k = draw(st.integers(1, 4))
    classes, n = draw(st.integers(1, 5)), draw(st.integers(k, 7))
    weight = torch.linalg.qr(normal(classes, n, k, seed=1))[0].mT.reshape(classes * k, n).float()
    return {"weight": laid_out(draw, weight), "k": k}


def projecting(draw):
    head = subspaces(draw)
    return head | {"x": drawn(draw, *leading(draw), head["weight"].shape[1]), "scale": draw(st.floats(0.5, 30))}


def classifying(draw):
    head = projecting(draw)
    del head["scale"]
    classes, rows = head["weight"].shape[0] // head["k"], head["x"].shape[:-1]
    labels, soft = torch.arange(math.prod(rows)).reshape(rows) % classes, torch.full((*rows, classes), 1 / classes)
    return head | {"target": draw(st.sampled_from([labels, soft])), "label_smoothing": 0.1, "reduction": "sum"}


def predicting(draw):
    vocab, dim = draw(st.integers(1, 40)), draw(st.integers(1, 7))
    x = drawn(draw, *leading(draw), dim)
    target = (torch.arange(math.prod(x.shape[:-1])) % vocab).reshape(x.shape[:-1])
    options = {"label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])), "reduction": "sum"}
    return {"x": x, "weight": drawn(draw, vocab, dim, seed=1), "target": target} | options


def stepping(draw):
    head = subspaces(draw)
    buffer, grad = (drawn(draw, *head["weight"].shape, seed=seed) for seed in (2, 3))
    return head | {"buffer": buffer, "grad": grad, "lr": draw(st.floats(0, 0.5)), "momentum": 0.9}


# Of each op: its valid calls, and what may stand in for one of their arguments.
OPS = {
    plucker_mix: (mixing, {"offsets": st.lists(ODD, max_size=3) | ODD, "eps": ODD}),
    gated_blend: (blending, {}),
    kronecker_pre: (opening, {"factors": st.none() | st.lists(st.integers(-1, 5), max_size=3)}),
    moe_route: (routing, {"top_k": ODD, "capacity": ODD}),
    subspace_logits: (projecting, {"k": ODD, "scale": ODD}),
    subspace_cross_entropy: (classifying, {"k": ODD, "label_smoothing": ODD, "reduction": st.just("max")}),
    linear_cross_entropy: (predicting, {"label_smoothing": ODD, "reduction": st.just("max")}),
    grassmann_step: (stepping, {"k": ODD, "lr": ODD, "momentum": ODD}),
}
EVERY = [pytest.param(op, id=op.__name__) for op in OPS]


def results(op, arguments, **options):
    found = op(**arguments, **options)
    return [found] if isinstance(found, torch.Tensor) else list(found)


@pytest.mark.parametrize("op", EVERY)
def test_valid_calls_agree_with_the_reference(op):
    valid, _ = OPS[op]

    @FIXED
    @given(st.data())
    def check(data):
        arguments = valid(data.draw)
        exact = {
            n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in arguments.items()
        }
        for a, b in zip(results(op, arguments), results(op, exact, backend="reference"), strict=True):
            torch.testing.assert_close(a, b.to(a.dtype), atol=1e-4, rtol=1e-4)

    check()


@pytest.mark.parametrize("op", EVERY)
def test_one_wrong_argument(op):
    valid, others = OPS[op]

    @FIXED
    @given(st.data())
    def check(data):
        arguments = valid(data.draw)
        name = data.draw(st.sampled_from(list(arguments)))
        arguments[name] = data.draw(others[name] if name in others else tensors())
        try:
            found = results(op, arguments)
        except (ValueError, TypeError) as error:
            assert str(error)
            return
        assert [t.shape for t in found] == [t.shape for t in results(op, arguments, backend="reference")]

    check()


@FIXED
@given(streams=ODD | st.integers(-5, 40), factors=st.none() | st.lists(ODD, max_size=3))
def test_kronecker_factors(streams, factors):
    try:
        found = kronecker_factors(streams, factors)
    except (ValueError, TypeError) as error:
        assert str(error)
        return
    assert all(factor in (2, 3, 4) for factor in found)


@FIXED
@given(backend=st.text(max_size=8) | st.just(3))
def test_an_unknown_backend(backend):
    hypothesis.assume(backend not in ("reference", "eager", "cpp", "triton", "cuda", ""))
    z, weight = torch.randn(1, 4, 3), torch.randn(5, 3)
    with pytest.raises((ValueError, TypeError)):
        plucker_mix(z, weight, offsets=(1,), backend=backend)
