"""Arguments of any shape, dtype and value: ValueError or TypeError, or a result of the right shape; never a crash."""

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from grassland.kernels.kronecker import kronecker_factors, kronecker_pre
from grassland.kernels.moe import moe_route
from grassland.kernels.plucker import gated_blend, plucker_mix
from grassland.kernels.subspace import grassmann_step, subspace_cross_entropy, subspace_logits

FIXED = settings(derandomize=True, deadline=None, database=None, max_examples=80)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool])
ODD = st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.just("two")


@st.composite
def tensors(draw, most=3):
    """Small tensors, mostly float32, with whatever layout."""
    shape = draw(st.lists(st.integers(0, 6), max_size=most))
    dtype = draw(st.just(torch.float32) | DTYPES)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)
    return tensor.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else tensor


def attempt(call):
    try:
        return call()
    except (ValueError, TypeError) as error:
        assert str(error)
        return None


@FIXED
@given(z=tensors(), weight=tensors(2), bias=st.none() | tensors(1), offsets=st.lists(ODD, max_size=3) | ODD, eps=ODD)
def test_plucker_mix(z, weight, bias, offsets, eps):
    out = attempt(lambda: plucker_mix(z, weight, bias, offsets=offsets, eps=eps))
    assert out is None or out.shape == (*z.shape[:-1], weight.shape[0])


@FIXED
@given(x=tensors(), g=tensors(), weight=tensors(2), bias=tensors(1))
def test_gated_blend(x, g, weight, bias):
    out = attempt(lambda: gated_blend(x, g, weight, bias))
    assert out is None or out.shape == x.shape


@FIXED
@given(streams=ODD | st.integers(-5, 40), factors=st.none() | st.lists(ODD, max_size=3))
def test_kronecker_factors(streams, factors):
    found = attempt(lambda: kronecker_factors(streams, factors))
    assert found is None or all(factor in (2, 3, 4) for factor in found)


@FIXED
@given(x=tensors(), weight=tensors(2), bias=tensors(1), factors=st.none() | st.lists(st.integers(-1, 5), max_size=3))
def test_kronecker_pre(x, weight, bias, factors):
    attempt(lambda: kronecker_pre(x, weight, bias, factors=factors))


@FIXED
@given(logits=tensors(), top_k=ODD, capacity=ODD, mask=st.none() | tensors(2))
def test_moe_route(logits, top_k, capacity, mask):
    attempt(lambda: moe_route(logits, top_k=top_k, capacity=capacity, mask=mask))


@FIXED
@given(x=tensors(), weight=tensors(2), k=ODD, scale=ODD)
def test_subspace_logits(x, weight, k, scale):
    out = attempt(lambda: subspace_logits(x, weight, k, scale))
    assert out is None or out.shape == (*x.shape[:-1], weight.shape[0] // k)


@FIXED
@given(x=tensors(), weight=tensors(2), target=tensors(2), k=ODD, smoothing=ODD, kind=st.sampled_from(["mean", "max"]))
def test_subspace_cross_entropy(x, weight, target, k, smoothing, kind):
    attempt(lambda: subspace_cross_entropy(x, weight, target, k, 25.0, smoothing, reduction=kind))


@FIXED
@given(weight=tensors(2), buffer=tensors(2), grad=tensors(2), k=ODD, lr=ODD, momentum=ODD)
def test_grassmann_step(weight, buffer, grad, k, lr, momentum):
    attempt(lambda: grassmann_step(weight, buffer, grad, k, lr, momentum))


@FIXED
@given(backend=st.text(max_size=8) | st.just(3))
def test_an_unknown_backend(backend):
    hypothesis.assume(backend not in ("reference", "eager", "cpp", "triton", ""))
    z, weight = torch.randn(1, 4, 3), torch.randn(5, 3)
    with pytest.raises((ValueError, TypeError)):
        plucker_mix(z, weight, offsets=(1,), backend=backend)
